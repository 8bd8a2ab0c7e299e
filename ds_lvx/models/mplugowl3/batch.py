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
from ds_lvx.models.batch import Text, split
from ds_lvx.models.visual import Runs, Visual

PIXELS = "pixel_values"
OFFSETS = "media_offset"
KEYS = (PIXELS, OFFSETS)
PLACES = "image_places"
"""Where each image of this rank goes in ``[B * n_r]``: int64 ``[images]``."""
POSITIONS = "image_positions"
"""Its token's number in the text, for rotary embeddings: int64 ``[B, n_r]``, 0 where none is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Visual):
    """The images of a batch, and who holds them.

    Attributes:
        sample, position: int64 ``[N]``, of each image: its sample, and where it stands in the text.
        holder: int64 ``[N]``, the rank of each image; None where all are at hand.
        ranks: that share the batch, where ``holder`` is known.
    """

    sample: Tensor
    position: Tensor
    holder: Tensor | None = None
    ranks: int = 0

    def part(self, rank: int, size: int) -> Images:
        """This rank's images, of pixels that are those of all."""
        holder = self._dealt(size)
        cut = {key: value[holder == rank] for key, value in self.arguments.items()}
        return replace(self, holder=holder, ranks=size, arguments=cut)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        return {**super().shared_record(), OFFSETS: self.position.tolist()}

    def record(self) -> dict[str, Any]:
        """Nothing that the other ranks do not know.

        Raises:
            NotImplementedError: images that are on their ranks already.
        """
        if self.holder is None:
            raise NotImplementedError(
                'got frames="local" for mPLUG-Owl3; expected frames="all": the whole batch on '
                "every rank"
            )
        return super().record()

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

    def beside(self, rank: int, text: Text, here: slice) -> dict[str, Any]:
        """Where this rank's images go, and where they stand in the text."""
        mine = self._holder == rank
        most = int(self._held()[rank].max())
        places = (self.sample * most + self._numbers(of_rank=True))[mine]
        positions = torch.zeros(text.shape[0] * most, dtype=torch.int64)
        positions[places] = self.position[mine]
        return {PLACES: places, POSITIONS: positions.view(text.shape[0], most)}

    @property
    def _holder(self) -> Tensor:
        assert self.holder is not None, "part() comes first"
        return self.holder

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
        ValueError: offsets that do not fit the text, or pixels that do not fit the offsets.
    """
    offsets = _offsets(batch, text)
    position = torch.cat([torch.zeros(0, dtype=torch.int64), *offsets])
    counts = torch.tensor([len(each) for each in offsets])
    pixels, side = batch.get(PIXELS), model.config.vision_config.image_size
    found = 0 if pixels is None else tuple(pixels.shape)
    wanted = (len(position), 3, side, side)
    if found != wanted and (pixels is not None or len(position)):
        raise ValueError(
            f"got {PIXELS} {found} for {len(position)} images in {OFFSETS}; expected {wanted}: "
            "use the processor that belongs to the model"
        )
    index = torch.arange(text.shape[1])
    seen = [torch.searchsorted(each, index, right=True) for each in offsets]
    end = torch.stack(seen).to(torch.int32)
    return Images(
        count=len(position),
        unit_tokens=image_tokens(model.config),
        arguments={} if pixels is None else {PIXELS: pixels},
        runs=Runs(torch.zeros_like(end), end, None, None),
        sample=torch.arange(len(counts)).repeat_interleave(counts),
        position=position,
    )


def _offsets(batch: Mapping[str, Any], text: Text) -> list[Tensor]:
    samples, length = text.shape
    given = batch.get(OFFSETS, [()] * samples)
    if not isinstance(given, Sequence) or len(given) != samples:
        raise ValueError(
            f"got {OFFSETS} of {type(given).__name__}; expected a list with a tensor for each of "
            f"{samples} samples: the numbers of its images' tokens"
        )
    offsets = [torch.as_tensor(each, dtype=torch.int64).cpu().flatten() for each in given]
    for sample, each in enumerate(offsets):
        inside = bool(((each >= 0) & (each < length)).all())
        if not inside or bool((each.diff() <= 0).any()):
            raise ValueError(
                f"got {OFFSETS} {each.tolist()} for sample {sample}; expected numbers of tokens "
                f"that go up, from 0 to {length - 1}"
            )
    return offsets


def image_tokens(config: Any) -> int:
    """Visual tokens of an image."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def blank(model: Any) -> dict[str, Tensor]:
    """One blank image."""
    side = model.config.vision_config.image_size
    return {PIXELS: torch.zeros(1, 3, side, side)}
