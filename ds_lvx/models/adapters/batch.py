"""Batches in which every image, or frame, has its places among the tokens of the text.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of all samples, ``P`` places of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.cuts import span, split
from ds_lvx.models.text import Here, Text
from ds_lvx.models.visual import COUNTS, PIXELS, Visual

ROWS = "image_rows"
"""What stands at the image tokens of this rank's text, in order: int64, rows of what the encoders
of all ranks made, one rank after the other."""
LENGTHS = "image_lengths"
"""How many rows each rank made."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Visual):
    """The images of a batch, one after the other in the order of the text, and who holds them.

    Attributes:
        places: bool ``[B, T]``, the image tokens of the text.
        here: int64 ``[B]``, images of each sample that are at hand.
        held: int64 ``[ranks, B]``, those that each rank holds; None where only this rank's are
            known. Those of a sample lie on the ranks in order.
        skips_padding: positions count the tokens that ``attention_mask`` keeps, padding is at -1.
    """

    places: Tensor
    here: Tensor
    held: Tensor | None = None
    skips_padding: bool = False

    @property
    def attended(self) -> bool:
        """Images stand among the text; no layer attends to them beside it."""
        return False

    def part(self, rank: int, size: int) -> Images:
        """This rank's images, of images that are those of all."""
        self._check(self.here)
        shares = split(self.count, size)
        owner = torch.arange(size).repeat_interleave(torch.tensor(shares))
        sample = torch.arange(len(self.here)).repeat_interleave(self.here)
        held = torch.zeros(size, len(self.here), dtype=torch.int64)
        held.index_put_((owner, sample), torch.ones_like(owner), accumulate=True)
        mine = span(shares, rank)
        cut = {key: value[mine] for key, value in self.arguments.items()}
        return replace(self, held=held, arguments=cut)

    def record(self) -> dict[str, Any]:
        """What the other ranks must hear of: how many images are here, where they do not know."""
        alone = {} if self.held is not None else {COUNTS: self.here.tolist()}
        return {**super().record(), **alone}

    def settled(self, records: Sequence[Any]) -> Images:
        """With what each rank holds."""
        if self.held is not None:
            return self
        held = torch.tensor([record[COUNTS] for record in records])
        self._check(held.sum(dim=0))
        return replace(self, held=held)

    def shares(self, parts: int) -> tuple[int, ...]:
        """Images by rank."""
        return tuple(self._held.sum(dim=1).tolist())

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Where the rows of this rank's image tokens are to be found, and positions."""
        lengths = tuple((self._held.sum(dim=1) * self.unit_tokens).tolist())
        number = self.places.flatten().cumsum(0).view(self.places.shape) - 1
        mine = number[:, here][self.places[:, here]]
        found: dict[str, Any] = {ROWS: self._rows()[mine], LENGTHS: lengths}
        mask = text.attention_mask
        if self.skips_padding and text.position_ids is None and mask is not None:
            kept = (mask != 0).long()
            found["position_ids"] = (kept.cumsum(dim=1) * kept - 1)[:, here]
        return found

    @property
    def _held(self) -> Tensor:
        assert self.held is not None, "part() or settled() comes first"
        return self.held

    def _rows(self) -> Tensor:
        """int64 ``[N * P]``: the row of every image token of the batch, in the text's order."""
        counts = self._held.flatten()
        first = (counts.cumsum(0) - counts).view(self._held.shape).T.flatten()
        counts = self._held.T.flatten()  # by sample, then by rank: the order of the text
        before = counts.cumsum(0) - counts
        image = torch.arange(int(counts.sum())) + (first - before).repeat_interleave(counts)
        tokens = torch.arange(self.unit_tokens)
        return (image[:, None] * self.unit_tokens + tokens).flatten()

    def _check(self, found: Tensor) -> None:
        """Compare images by sample, int64 ``[B]``, with the text."""
        wanted = images_of(self.places, self.unit_tokens)
        if not torch.equal(found, wanted):
            raise ValueError(
                f"got {PIXELS} of {found.tolist()} images by sample, and a text with places for "
                f"{wanted.tolist()}, {self.unit_tokens} tokens each; expected an image for each: "
                'pass the images of all ranks, or frames="local" and on all ranks together all'
            )


def places_of(text: Text, token: int | None, *, unit_tokens: int) -> Tensor:
    """bool ``[B, T]``: where the images of a text stand.

    Args:
        text: the whole text.
        token: the image token's id.
        unit_tokens: P.

    Raises:
        ValueError: there is no such token, or a sample has no whole number of images.
    """
    if token is None:
        raise ValueError(
            "got a model whose config has no image token; expected the places of images among the "
            "text: load checkpoint and processor in a form that transformers 5 writes"
        )
    places = text.input_ids.cpu() == token
    found = places.sum(dim=1)
    wrong = (found % unit_tokens).nonzero().flatten()
    if len(wrong) > 0:
        sample = int(wrong[0])
        raise ValueError(
            f"got {int(found[sample])} image tokens in sample {sample}; expected a multiple of "
            f"{unit_tokens}, the places of an image: cut no text in the midst of them"
        )
    return places


def images_of(places: Tensor, unit_tokens: int) -> Tensor:
    """int64 ``[B]``: images of each sample by the places of its text."""
    return places.sum(dim=1) // unit_tokens


def check_pixels(pixels: Any, sides: tuple[int, int], *, images: str) -> None:
    """Compare pixels with the images that a model takes.

    Args:
        pixels: as the caller has them.
        sides: height and width.
        images: what their first dimensions are.

    Raises:
        ValueError: they are others.
    """
    found: Any = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    expected = (3, *sides)
    if not isinstance(found, tuple) or len(found) != 4 or found[1:] != expected:
        raise ValueError(
            f"got {PIXELS} {found}; expected ({images}, {', '.join(map(str, expected))}), or all "
            f"samples' one after the other, with {COUNTS}: use the model's own processor"
        )
