"""The visual part of a batch: its units, and which of them each text token sees.

In every model of the kind *cross* a token sees a *run* of units (images, frames), and of those what
is no padding: O(T + units) numbers, where the mask of a processor has T x units, and the one that
transformers makes of it T x visual tokens. Shapes: ``B`` samples, ``T`` text tokens, ``N`` units of
a sample, ``parts`` of a unit (mllama's tiles), each of the same number of visual tokens.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.cuts import span, split
from ds_lvx.models.text import Here, Text, digest

PADDING = -1
PIXELS = "pixel_values"
COUNTS = "images_per_sample"
"""How many of a sample's images the pixels at hand are: int64 ``[B]``, where a batch has the images
of all samples one after the other; of use for local images."""
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


@dataclass(frozen=True, eq=False)
class Visual:
    """What a family says of the visual part of a batch, on one rank.

    A family whose units differ in tokens, or whose arguments have no dimension of units, derives
    its own and overrides `shares`, `part`, `record`, `settled`, `lengths`, `rule` and `beside`.

    Attributes:
        count: units at hand: those of the sample, or with ``frames="local"`` this rank's.
        unit_tokens: visual tokens of a unit, padding included.
        arguments: what the model takes of the units at hand: each ``[B, count, ...]``, or where
            they are features already, ``[B, count * unit_tokens, hidden]``.
        runs: which units each token of the whole text sees; None: all of them.
        valid: bool ``[B, count, parts]``, the parts of the units at hand that are no padding; None:
            all are there, or the runs say it.
        blind_see_all: a token that sees no unit attends to all tokens of all, padding included, and
            not to nothing.
        encoded: the units are features already: there is no tower to run, and no blank unit.
        counts: int ``[B]``, units of each sample; what is beyond pads the batch, and nobody sees
            it, so that a sample's loss does not depend on who shares its batch. None: the model's
            own way with padding.
        has_more: the text looks at more than units, so at something also where there are none.
    """

    count: int
    unit_tokens: int
    arguments: Mapping[str, Tensor]
    runs: Runs | None = None
    valid: Tensor | None = None
    blind_see_all: bool = False
    encoded: bool = False
    counts: Tensor | None = None
    has_more: bool = False

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        runs = self.runs
        checksum = None if runs is None else digest(runs.start, runs.end, runs.tiles)
        counts = None if self.counts is None else digest(self.counts)
        return {
            "visibility of the images (a checksum)": checksum,
            "images of each sample (a checksum)": counts,
        }

    def record(self) -> dict[str, Any]:
        """What the other ranks must hear of the units at hand."""
        return {"share": self.count}

    def settled(self, records: Sequence[Mapping[str, Any]]) -> Visual:
        """The same, with what the other ranks' `record` say of their units."""
        return self

    def part(self, rank: int, size: int) -> Visual:
        """The same with one rank's units, of a batch that holds all."""
        here = span(self.shares(size), rank)
        return replace(self, arguments=self.cut(here))

    def at_hand(self, rank: int, size: int) -> Visual:
        """The same with one rank's units, of a batch that holds no others."""
        return self

    def prompt_positions(self, text: Text) -> Tensor | None:
        """Positions ``[B, T]`` of a prompt in which images take places; None: transformers' own.

        A new token stands one place behind the last, and sees what that sees.

        Raises:
            ValueError: a prompt behind which new tokens would see more; on every rank.
        """
        return None

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Further arguments of the model: what follows from the whole text and all units.

        Args:
            rank: whose arguments.
            text: the whole text.
            here: this rank's part of it, for ``whole[:, here]``: a slice, or places under zigzag.
        """
        return {}

    def layouts(
        self, text: Text, *, channel: Channel, lengths: tuple[int, ...], device: torch.device
    ) -> Mapping[str, Layout]:
        """Further layouts, for `ShardedBatch.others`.

        Args:
            text: the whole text.
            channel: the ranks that share it.
            lengths: its tokens by rank.
            device: where the model computes.
        """
        return {}

    def shares(self, parts: int) -> tuple[int, ...]:
        """How many of the sample's units each of ``parts`` ranks gets."""
        return split(self.count, parts)

    def lengths(self, shares: Sequence[int]) -> tuple[int, ...]:
        """Visual tokens by rank, from the units that each rank holds."""
        return tuple(share * self.unit_tokens for share in shares)

    def cut(self, units: slice) -> dict[str, Tensor]:
        """The arguments for some of the units at hand."""
        step = self.unit_tokens if self.encoded else 1
        here = slice(units.start * step, units.stop * step)
        return {key: value[:, here] for key, value in self.arguments.items()}

    @property
    def attended(self) -> bool:
        """Whether layers attend to the units; else these stand among the text, as its tokens."""
        return True

    def among(self, parts: int) -> tuple[int, ...] | None:
        """Tokens of the text that are the units', of all rows, by rank; None: units have none."""
        return None

    @property
    def replaced(self) -> Tensor | None:
        """bool ``[B, T]``, tokens of the text that are never embedded; None: each is."""
        return None

    @property
    def tells_padding(self) -> bool:
        """Whether only this rank knows which parts of its units are padding."""
        return self.runs is not None and self.runs.tiles is None

    def valid_parts(self, batch_size: int) -> Tensor:
        """bool ``[B, count, parts]``."""
        if self.runs is not None and self.runs.tiles is not None:
            return self.runs.tiles
        if self.valid is not None:
            return self.valid.cpu().bool()
        return torch.ones(batch_size, self.count, 1, dtype=torch.bool)

    def rule(self, valid: Tensor) -> Visibility | None:
        """The rule for the whole text and the visual tokens of all units.

        Args:
            valid: bool ``[B, N, parts]``, of all units in the order of ranks.
        """
        if self.runs is None:
            return None
        tokens = self.unit_tokens // valid.shape[2]
        return self.runs.visibility(
            valid, patches=tokens, blind_see_all=self.blind_see_all, counts=self.counts
        )


def pack_tiles(tiles: Tensor) -> str:
    """bool ``[B, n, tiles]`` as a short text for a record; those of a video, all alike, in 30."""
    return base64.b85encode(zlib.compress(np.packbits(tiles.numpy()).tobytes())).decode()


def unpack_tiles(text: str, shape: tuple[int, int, int]) -> Tensor:
    """What `pack_tiles` packed."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    bits = np.unpackbits(packed, count=math.prod(shape))
    return torch.from_numpy(bits).bool().view(shape)


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
