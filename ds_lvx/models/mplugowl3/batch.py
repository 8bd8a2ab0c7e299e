"""mPLUG-Owl3's batches: images packed one after the other, and where each stands in the text.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of all samples, ``P`` visual tokens of an
image, ``n_r`` images of the sample with the most of them on rank r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.cuts import split
from ds_lvx.models.prefixes import Merge, alike
from ds_lvx.models.runs import Runs
from ds_lvx.models.samples import images_at_hand
from ds_lvx.models.text import Here, Text, digest
from ds_lvx.models.visual import COUNTS, PIXELS, Visual

OFFSETS = "media_offset"
KEYS = (PIXELS, OFFSETS, COUNTS)
PADDING = -1
"""In offsets that are one tensor, where a sample has fewer images than another."""
PLACES = "image_places"
"""Where each image of this rank goes in ``[B * n_r]``: int64 ``[images]``."""
POSITIONS = "image_positions"
"""Its token's number in the text, for rotary embeddings: int64 ``[B, n_r]``, 0 where none is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Visual):
    """The images of a batch, and who holds them.

    Attributes:
        sample, position: int64 ``[N]``, of each image: its sample, and where it stands in the text.
        here: int64 ``[B]``, images of each sample whose pixels are at hand.
        holder: int64 ``[N]``, the rank of each image; None where only this rank's are known.
        ranks: that share the batch, where ``holder`` is known.
        strictly: a token does not see the image that it stands for, and images stand a place later
            for rotary embeddings (release 240728).
    """

    sample: Tensor
    position: Tensor
    here: Tensor
    holder: Tensor | None = None
    ranks: int = 0
    strictly: bool = False

    def alike(self, samples: int) -> list[int]:
        """Of each sample, the number of the first one whose images are the same, at its places."""
        self._check(self.here)
        counts = self._counts().tolist()
        places = [tuple(each.tolist()) for each in self.position.split(counts)]
        pixels = self.arguments.get(PIXELS, torch.zeros(0))
        return alike([*zip(places, pixels.split(counts), strict=True)])

    @property
    def ends(self) -> Tensor:
        """All tokens of images are in common, or none."""
        assert self.runs is not None
        samples, length = self.runs.start.shape
        last = torch.zeros(samples, dtype=torch.int64)
        last = last.scatter_reduce(0, self.sample, self.position + 1, "amax")
        return torch.maximum(torch.arange(1, length + 1), last[:, None])

    def joined(self, rows: Merge) -> Images:
        """See `Visual.joined`."""
        assert self.runs is not None
        firsts = torch.tensor(rows.firsts)
        kept = torch.isin(self.sample, firsts)
        samples = torch.arange(len(self.here)).repeat_interleave(self.here)
        mine = torch.isin(samples, firsts)  # of the images at hand
        return replace(
            self,
            count=int(mine.sum()),
            arguments={key: value[mine] for key, value in self.arguments.items()},
            runs=self.runs.joined(rows),
            sample=torch.searchsorted(firsts, self.sample[kept]),
            position=self.position[kept],
            here=self.here[firsts],
        )

    def part(self, rank: int, size: int) -> Images:
        """This rank's images, of pixels that are those of all."""
        self._check(self.here)
        holder = self._dealt(size)
        cut = {key: value[holder == rank] for key, value in self.arguments.items()}
        return replace(self, holder=holder, ranks=size, arguments=cut)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        return {**super().shared_record(), OFFSETS: digest(self.sample, self.position)}

    def record(self) -> dict[str, Any]:
        """What the other ranks must hear of: how many images are here, where they do not know."""
        alone = {} if self.holder is not None else {COUNTS: self.here.tolist()}
        return {**super().record(), **alone}

    def settled(self, records: Sequence[Mapping[str, Any]]) -> Images:
        """With the rank of each image: those of a sample lie on the ranks in order."""
        whole = self
        if self.holder is None:
            held = torch.tensor([record[COUNTS] for record in records])
            self._check(held.sum(dim=0))
            ranks = torch.arange(len(records)).repeat(held.shape[1])
            holder = ranks.repeat_interleave(held.T.flatten())
            whole = replace(self, holder=holder, ranks=len(records))
        return whole._a_place_later() if self.strictly else whole

    def shares(self, parts: int) -> tuple[int, ...]:
        """Images by rank."""
        return tuple(torch.bincount(self._dealt(parts), minlength=parts).tolist())

    def lengths(self, shares: Sequence[int] = ()) -> tuple[int, ...]:
        """Visual tokens of a sample by rank, ``n_r P``."""
        return tuple(int(n) * self.unit_tokens for n in self._held().amax(dim=1))

    @property
    def tells_padding(self) -> bool:
        """The offsets say it, and every rank knows those."""
        return False

    def rule(self, valid: Tensor) -> Visibility:
        """Images by their number in the sample; what pads a sample is seen by nobody."""
        assert self.runs is not None
        held = self._held()
        most = held.amax(dim=1)
        position = torch.full((held.shape[1], int(most.sum())), EVERYTHING, dtype=torch.int32)
        column = (most.cumsum(0) - most)[self._holder] + self._numbers(of_rank=True)
        position[self.sample, column] = self._numbers(of_rank=False).to(torch.int32)
        position = position.repeat_interleave(self.unit_tokens, dim=1)
        return Visibility(self.runs.start, self.runs.end, position)

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Where this rank's images go, and where they stand in the text."""
        mine = self._holder == rank
        most = int(self._held()[rank].max())
        places = (self.sample * most + self._numbers(of_rank=True))[mine]
        positions = torch.zeros(text.shape[0] * most, dtype=torch.int64)
        positions[places] = self.position[mine]
        return {PLACES: places, POSITIONS: positions.view(text.shape[0], most)}

    def prompt_positions(self, text: Text) -> Tensor:
        """Places in the row, as those of images are.

        Raises:
            ValueError: in release 240728, a prompt that ends with an image.
        """
        behind = self.sample[self.position >= text.shape[1]].tolist()
        if behind:  # its place was moved to the next token
            raise ValueError(
                f"got a prompt of sample {behind[0]} that ends with an image; expected text behind "
                "it: in mPLUG-Owl3's release 240728 that token does not see the image, and new "
                "ones would"
            )
        return torch.arange(text.shape[1]).expand(text.shape)

    @property
    def _holder(self) -> Tensor:
        assert self.holder is not None, "part() comes first"
        return self.holder

    def _a_place_later(self) -> Images:
        """As if each image's token stood at the next place: before it an image is not seen."""
        assert self.runs is not None
        end = torch.nn.functional.pad(self.runs.end[:, :-1], (1, 0))
        return replace(self, position=self.position + 1, runs=replace(self.runs, end=end))

    def _check(self, found: Tensor) -> None:
        """Compare images by sample, int64 ``[B]``, with the offsets."""
        if not torch.equal(found, self._counts()):
            raise ValueError(
                f"got {PIXELS} of {found.tolist()} images by sample, and {OFFSETS} of "
                f"{self._counts().tolist()}; expected an image for each of its tokens in the text: "
                'pass the images of all ranks, or frames="local" and on all ranks together all'
            )

    def _dealt(self, parts: int) -> Tensor:
        """The rank of each image: each sample's in runs of about as many."""
        each = [
            torch.arange(parts).repeat_interleave(torch.tensor(split(int(count), parts)))
            for count in self._counts()
        ]
        return torch.cat(each)

    def _counts(self) -> Tensor:
        assert self.runs is not None
        return torch.bincount(self.sample, minlength=self.runs.start.shape[0])

    def _held(self) -> Tensor:
        """int64 ``[ranks, B]``: images of a sample on a rank."""
        held = torch.zeros(self.ranks, len(self._counts()), dtype=torch.int64)
        ones = torch.ones_like(self.sample)
        return held.index_put_((self._holder, self.sample), ones, accumulate=True)

    def _numbers(self, *, of_rank: bool) -> Tensor:
        """The number of each image in its sample, or among those of the sample on its rank."""
        counts = self._held().T.flatten() if of_rank else self._counts()
        first = counts.cumsum(0) - counts
        return torch.arange(len(self.sample)) - first.repeat_interleave(counts)


def visual(batch: Mapping[str, Any], text: Text, model: Any) -> Images:
    """The visual part of a batch, as mPLUG-Owl3's processor has it.

    ``media_offset`` lists for each sample the numbers of its images' tokens; a token sees the
    images whose tokens are before it, or are it.

    Raises:
        ValueError: offsets that do not fit the text, pixels that do not fit the offsets or the
            model, or positions of the caller's own.
    """
    rule = text.visibility()
    assert rule is not None, "the text is causal"
    first = rule.q_start.long()  # where each token's sample begins in its row
    _check_positions(text, first)
    offsets = _offsets(batch, text)
    counts = torch.tensor([len(each) for each in offsets])
    index = torch.arange(text.shape[1])
    seen = [torch.searchsorted(each, index, right=True) for each in offsets]
    end = torch.stack(seen).to(torch.int32)
    before = [torch.searchsorted(each, row) for each, row in zip(offsets, first, strict=True)]
    places = [each - row[each] for each, row in zip(offsets, first, strict=True)]
    rows = _check_pixels(batch.get(PIXELS), model.config.vision_config)
    return Images(
        count=rows,
        unit_tokens=image_tokens(model.config),
        arguments={PIXELS: batch[PIXELS]} if PIXELS in batch else {},
        runs=Runs(torch.stack(before).to(torch.int32), end, None, None),
        sample=torch.arange(len(counts)).repeat_interleave(counts),
        position=torch.cat([torch.zeros(0, dtype=torch.int64), *places]),
        here=images_at_hand(batch.get(COUNTS), rows, counts),
    )


def _check_positions(text: Text, first: Tensor) -> None:
    """Positions are the tokens' places in their sample, as those of their images are."""
    places = torch.arange(text.shape[1]) - first
    if text.position_ids is not None and bool((text.position_ids.cpu() != places).any()):
        raise ValueError(
            "got position_ids that are not 0, 1, 2, ...; expected none: images stand where their "
            "tokens are; samples that share a row start anew at 0 each, without attention_mask, "
            "with which a token sees all before it"
        )


def _check_pixels(pixels: Any, vision: Any) -> int:
    """How many images there are."""
    if pixels is None:
        return 0
    found: Any = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    side = vision.image_size
    images = found[0] if isinstance(found, tuple) and found else 0
    if found != (images, 3, side, side):
        raise ValueError(
            f"got {PIXELS} {found}; expected (images, 3, {side}, {side}), all samples' one after "
            "the other: use the processor that belongs to the model"
        )
    return int(images)


def _offsets(batch: Mapping[str, Any], text: Text) -> list[Tensor]:
    """Of each sample, int64 ``[images]``."""
    samples, length = text.shape
    given = batch.get(OFFSETS, [()] * samples)
    if isinstance(given, Tensor) and given.ndim == 3:
        given = _places_of_counts(given, text)
    if not isinstance(given, Sequence | Tensor) or len(given) != samples:
        raise ValueError(
            f"got {OFFSETS} of {type(given).__name__}; expected a list with a tensor for each of "
            f"{samples} samples, the numbers of its images' tokens, or one tensor of them, padded "
            f"with {PADDING}"
        )
    offsets = [torch.as_tensor(each, dtype=torch.int64).cpu().flatten() for each in given]
    if isinstance(given, Tensor):
        offsets = [each[each != PADDING] for each in offsets]
    for sample, each in enumerate(offsets):
        inside = bool(((each >= 0) & (each < length)).all())
        if not inside or bool((each.diff() < 0).any()):
            raise ValueError(
                f"got {OFFSETS} {each.tolist()} for sample {sample}; expected numbers of tokens "
                f"that never go down, from 0 to {length - 1}"
            )
    return offsets


def _places_of_counts(given: Tensor, text: Text) -> list[Tensor]:
    """The numbers of images' tokens, from how many images stand before each token.

    Args:
        given: int ``[B, T, 2]``, as the processor of release 240728 has it: images of the samples
            before, and those and the images before the token.
        text: the whole text.
    """
    if given.shape != (*text.shape, 2):
        raise ValueError(
            f"got {OFFSETS} {tuple(given.shape)}; expected {(*text.shape, 2)}, the first two as "
            "input_ids: the whole sequence, never a shard"
        )
    more = given.cpu().diff(dim=2)[..., 0].clamp(min=0).diff(dim=1)
    return [torch.where(row > 0)[0] for row in more]


def image_tokens(config: Any) -> int:
    """Visual tokens of an image."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def blank(model: Any) -> dict[str, Tensor]:
    """One blank image."""
    side = model.config.vision_config.image_size
    return {PIXELS: torch.zeros(1, 3, side, side)}
