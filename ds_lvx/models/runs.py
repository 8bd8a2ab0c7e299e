"""Which units of its sample each text token sees: a run of them (`ds_lvx.models.visual`).

Shapes: ``B`` samples, ``T`` text tokens, ``N`` units of a sample, ``tiles`` of a unit, ``P`` visual
tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.prefixes import Merge

PADDING = -1
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Runs:
    """The run of images that each token sees, on the CPU.

    Attributes:
        start, end: int32 ``[B, T]``, images ``start`` to ``end - 1``; equal where the token sees
            no image.
        tiles: bool ``[B, N, tiles]``, the tiles that are no padding; None when it is not known
            here (`Runs.of_visible_images`: it is in the frames' own ``aspect_ratio_mask``).
        images: N, or None when any number of images agrees with the runs.
    """

    start: Tensor
    end: Tensor
    tiles: Tensor | None
    images: int | None

    @classmethod
    def of_mask(cls, mask: Tensor) -> Runs:
        """The runs of a ``cross_attention_mask [B, T, N, tiles]`` as the processor makes it.

        Reads the mask twice, a bounded piece at a time.

        Raises:
            ValueError: some token sees a set of tiles that is no run of images.
        """
        batch, length, images, max_tiles = mask.shape
        start = torch.zeros(batch, length, dtype=torch.int32)
        end = torch.zeros(batch, length, dtype=torch.int32)
        tiles = torch.zeros(batch, images, max_tiles, dtype=torch.bool)
        for sample in range(batch):
            for rows in _chunks(length, images * max_tiles):
                seen = _seen(mask[sample, rows])
                tiles[sample] |= seen.any(dim=0)
                first, last = _first_and_last(seen.any(dim=-1))
                start[sample, rows], end[sample, rows] = first, last
        runs = cls(start, end, tiles, images)
        runs._check(mask)
        return runs

    @classmethod
    def of_visible_images(cls, visible: Tensor) -> Runs:
        """The runs as the caller gives them, int ``[B, T, 2]`` (`visible_images`)."""
        start, end = (part.to(torch.int32) for part in visible.detach().cpu().unbind(dim=-1))
        return cls(start, torch.maximum(start, end), None, None)

    def check_images(self, images: int) -> None:
        """Compare with the number of images that came.

        Raises:
            ValueError: the runs are those of another number of images.
        """
        if self.images is not None and self.images != images:
            raise ValueError(
                f"got cross_attention_mask for {self.images} images a sample, and {images} images; "
                "expected the same number: the mask is that of the whole batch, never of a shard"
            )
        reach = int(self.end.max()) if self.end.numel() else 0
        if int(self.start.min() if self.start.numel() else 0) < 0 or reach > images:
            raise ValueError(
                f"got visible_images that reach to image {reach}; expected runs within the "
                f"{images} images of a sample: one image for each image token"
            )

    @property
    def sees_nothing(self) -> Tensor:
        """bool ``[B, T]``: tokens that no image is visible to."""
        return self.start >= self.end

    def joined(self, rows: Merge) -> Self:
        """The same where rows that begin alike, with the same images, are one."""
        tiles = None if self.tiles is None else self.tiles[rows.firsts]
        start, end = (rows.taken(each, 0) for each in (self.start, self.end))
        return replace(self, start=start, end=end, tiles=tiles)

    def visibility(
        self,
        tiles: Tensor,
        *,
        patches: int,
        blind_see_all: bool = False,
        counts: Tensor | None = None,
    ) -> Visibility:
        """The rule for the whole text and the visual tokens of all its images.

        Args:
            tiles: bool ``[B, N, tiles]``, True where no padding.
            patches: P.
            blind_see_all, counts: see `Visual`.

        Returns:
            `Visibility` with ``kv_pos`` ``[B, N * tiles * P]``: the image's index, -1 for padding
            within an image, `EVERYTHING` for an image that pads the batch, where ``counts`` tells.
        """
        index = torch.arange(tiles.shape[1], dtype=torch.int32)
        position = torch.where(tiles, index[None, :, None], PADDING)
        if counts is not None:
            pads = index >= counts.cpu()[:, None]
            position = position.masked_fill(pads[..., None], EVERYTHING)
        position = position.flatten(1)
        start, end = self.start, self.end
        if blind_see_all:
            start = start.masked_fill(self.sees_nothing, PADDING)
            end = end.masked_fill(self.sees_nothing, EVERYTHING)
        return Visibility(start, end, position.repeat_interleave(patches, dim=1))

    def _check(self, mask: Tensor) -> None:
        assert self.tiles is not None
        index = torch.arange(mask.shape[2], dtype=torch.int32)
        for sample in range(mask.shape[0]):
            for rows in _chunks(mask.shape[1], mask.shape[2] * mask.shape[3]):
                start, end = (
                    self.start[sample, rows, None],
                    self.end[sample, rows, None],
                )
                run = (start <= index) & (index < end)
                wrong = _seen(mask[sample, rows]) != (run[..., None] & self.tiles[sample])
                if wrong.any():
                    token = rows.start + int(wrong.flatten(1).any(dim=1).nonzero()[0])
                    raise ValueError(
                        f"got a cross_attention_mask in which token {token} of sample {sample} "
                        "sees a set of tiles that is no run of images; expected, for every token, "
                        "all tiles (those without padding, the same for every token) of images "
                        "a, a + 1, ..., b, or no tile at all: the mask that the processor makes"
                    )


def _chunks(length: int, row_elements: int) -> list[slice]:
    """Slices of rows, each of a bounded number of elements."""
    step = max(_CHUNK_ELEMENTS // max(row_elements, 1), 1)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _seen(mask: Tensor) -> Tensor:
    # transformers inverts the mask and hides whatever is not zero then: only a 1 is visible.
    return (mask == 1).cpu()


def _first_and_last(seen: Tensor) -> tuple[Tensor, Tensor]:
    """First image seen and one past the last, of ``seen`` bool ``[rows, N]``; 0 and 0 if none."""
    rows, images = seen.shape
    if images == 0:
        return torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    index = torch.arange(images, dtype=torch.int32)
    end = torch.where(seen, index + 1, 0).amax(dim=1)
    start = torch.where(seen, index, images).amin(dim=1)
    return torch.minimum(start, end), end
