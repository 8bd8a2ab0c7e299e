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
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.cuts import span, split
from ds_lvx.models.prefixes import Merge, alike
from ds_lvx.models.runs import Runs
from ds_lvx.models.text import Here, Text, digest

PIXELS = "pixel_values"
COUNTS = "images_per_sample"
"""How many of a sample's images the pixels at hand are: int64 ``[B]``, where a batch has the images
of all samples one after the other; of use for local images."""


@dataclass(frozen=True, eq=False)
class Visual:
    """What a family says of the visual part of a batch, on one rank.

    A family whose units differ in tokens, or whose arguments have no dimension of units, derives
    its own and overrides `shares`, `part`, `record`, `settled`, `lengths`, `rule` and `beside`; and
    `alike`, `ends`, `joined` and `positions` where it shares prefixes.

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

    def share(self, text: Text, together: Sequence[int] | None = None) -> tuple[Text, Visual]:
        """Text and units with rows that begin alike as one, where all of their units are alike;
        themselves where there are none, or where rows have several samples.

        Args:
            text: rows as they came, whose units these are: all of them.
            together: `ds_lvx.models.prefixes.TOGETHER`, of local units.
        """
        if together is None and (text.begins is not None or text.input_ids.numel() == 0):
            return text, self
        on_cpu = text.each(lambda tensor: tensor.cpu())
        mask = on_cpu.attention_mask
        number = torch.tensor(self.alike(text.shape[0]) if together is None else together)
        columns = [number[:, None].expand(text.shape)]
        if self.runs is not None:
            columns += [self.runs.start, self.runs.end]
        present = torch.ones(text.shape, dtype=torch.bool) if mask is None else mask != 0
        rows = on_cpu.alike(columns, present=present, ends=self.ends, together=together)
        if rows is None:
            return text, self
        return on_cpu.joined(rows, self.positions(on_cpu)), self.joined(rows)

    def alike(self, samples: int) -> list[int]:
        """Of each sample, the number of the first one whose units are the same."""
        of_runs = None if self.runs is None else self.runs.tiles
        counts = None if self.counts is None else self.counts.view(samples, -1)
        each = [*self.arguments.values(), of_runs, self.valid, counts]
        found = [alike([(None, own) for own in tensor]) for tensor in each if tensor is not None]
        numbers = [*zip(*found, strict=True)] or [()] * samples
        return [numbers.index(number) for number in numbers]

    @property
    def ends(self) -> Tensor | None:
        """See `ds_lvx.models.prefixes.find`."""
        return None

    def joined(self, rows: Merge) -> Self:
        """The same of rows that begin alike, with the same units, as one."""

        def kept(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows.firsts]

        return replace(
            self,
            arguments={key: value[rows.firsts] for key, value in self.arguments.items()},
            runs=None if self.runs is None else self.runs.joined(rows),
            valid=kept(self.valid),
            counts=kept(self.counts),
        )

    def positions(self, text: Text) -> Tensor | None:
        """The model's own positions ``[B, T]`` of the whole text where it has others than places
        and what the caller gave; else None."""
        return None

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


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros for pixels, of which only those that are written take memory."""
    words = np.zeros(shape, f"i{dtype.itemsize}")  # torch's own writes them all
    return torch.from_numpy(words).view(dtype)


def pack_tiles(tiles: Tensor) -> str:
    """bool ``[B, n, tiles]`` as a short text for a record; those of a video, all alike, in 30."""
    return base64.b85encode(zlib.compress(np.packbits(tiles.numpy()).tobytes())).decode()


def unpack_tiles(text: str, shape: tuple[int, int, int]) -> Tensor:
    """What `pack_tiles` packed."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    bits = np.unpackbits(packed, count=math.prod(shape))
    return torch.from_numpy(bits).bool().view(shape)
