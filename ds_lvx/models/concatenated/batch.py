"""Batches in which every unit, an image or a frame, has its tokens among those of the text.

The rank that encodes a unit holds its tokens; text is dealt around them (`deal`). Padding is left
out. A part holds its tokens in the order of the row, of which each knows its place: attention goes
by places, positions and labels are cut like the tokens.

Legend: ``B`` rows, ``T`` tokens of a row, ``n_r`` of the longest part on rank r: others are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.batch import RECENT
from ds_lvx.models.concatenated.deal import PADS, TEXT, Deal
from ds_lvx.models.prefixes import Merge
from ds_lvx.models.text import IGNORED_LABEL, ITEMS_KEY, TEXT_KEYS, Here, Text, digest
from ds_lvx.models.visual import Visual

PLACES = "visual_places"
"""Where the tokens of this rank's units go in its part of the rows, ``[B * n_r]``: int64."""


@dataclass(frozen=True)
class Unit:
    """What no rank cuts.

    Attributes:
        row: of the batch that it stands in.
        tokens: that it has there.
        source: the entry of the batch that has its pixels.
        rows: of that entry; those of the units of a source follow each other in order.
        about: what else the family knows of it, such as its grid.
    """

    row: int
    tokens: int
    source: str
    rows: int
    about: tuple[int, ...] = ()


Arrange: TypeAlias = "Callable[[Sequence[Unit], Sequence[Tensor]], dict[str, Any]]"
"""Some units and the rows of each -> what the model takes of them: tensors, which go to the device,
and tuples, which the host reads. It pickles: a function of a module, or a partial of one."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Units of rows that begin alike, which are there once in what these became.

    Attributes:
        came: units of the rows as they came.
        numbers: which of them there are now, by the order of rows and tokens now.
    """

    came: tuple[Unit, ...]
    numbers: tuple[int, ...]

    def pixels(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the units that there are now, in order; a view where they lie side by side."""
        return {key: self._rows(each, key) for key, each in pixels.items()}

    def _rows(self, pixels: Tensor, source: str) -> Tensor:
        rows = [unit.rows if unit.source == source else 0 for unit in self.came]
        first = [0, *accumulate(rows)]
        runs: list[tuple[int, int]] = []
        for unit in self.numbers:
            start, stop = first[unit], first[unit + 1]
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        parts = [pixels[start:stop] for start, stop in runs if start < stop]
        return parts[0] if len(parts) == 1 else torch.cat([pixels[:0], *parts])


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequences(Text):
    """Rows of text and visual tokens, on the CPU.

    ``position_ids`` are ``[..., B, T]``, with as many axes as the model's.

    Attributes:
        units: in the order of the rows and their tokens.
        number: int64 ``[B, T]``, of every token its unit's number, or `TEXT`.
        deal: who holds what, once `dealt` was asked.
        ends: int64 ``[B, T]``, one past the last place that each token sees, of images whose tokens
            see each other; None: a token sees none behind it.
        recent_ends: the same in layers with a window, where it holds in these alone.
        kept: of rows that several were made to, their units; None: they are as they came.
        unbroken: padding between tokens is held as well, and a part with some has its
            ``attention_mask``: it moves the state of layers that carry one along the text.
    """

    units: tuple[Unit, ...]
    number: Tensor
    deal: Deal | None = None
    ends: Tensor | None = None
    recent_ends: Tensor | None = None
    kept: Kept | None = None
    unbroken: bool = False
    stays_sharded: ClassVar[bool] = True

    @classmethod
    def with_units(cls, text: Text, visual: Tensor, units: Sequence[Unit]) -> Self:
        """A text and what stands in it.

        Args:
            text: the whole text.
            visual: bool ``[B, T]``, tokens that stand for units.
            units: in the order of their tokens.

        Raises:
            ValueError: as many tokens as the units have are not there.
        """
        number = torch.full(text.shape, TEXT)
        for row, places in enumerate(visual):
            each = [(n, unit.tokens) for n, unit in enumerate(units) if unit.row == row]
            found, wanted = int(places.sum()), sum(tokens for _, tokens in each)
            if found != wanted:
                raise ValueError(
                    f"got {found} visual tokens in sample {row}, and {len(each)} images or frames "
                    f"of {wanted}; expected as many: use the processor that belongs to the model, "
                    "and cut no text in the midst of them"
                )
            numbers = torch.tensor([n for n, _ in each], dtype=torch.int64)
            counts = torch.tensor([tokens for _, tokens in each], dtype=torch.int64)
            number[row, places] = numbers.repeat_interleave(counts)
        parts: dict[str, Any] = {key: getattr(text, key) for key in (*TEXT_KEYS, "items")}
        return cls(**parts, units=tuple(units), number=number)

    def joined(self, rows: Merge, positions: Tensor | None = None) -> Self:
        """See `Text.joined`."""

        def moved(ends: Tensor | None) -> Tensor | None:
            return None if ends is None else rows.taken(ends, 0) + rows.shift

        number = rows.taken(self.number, TEXT)
        kept: dict[int, int] = {}  # and the row that has it
        for row, of_row in enumerate(number):
            for unit in of_row[of_row != TEXT].unique_consecutive().tolist():
                kept.setdefault(unit, row)
        anew = torch.full((len(self.units) + 1,), TEXT)  # the last is of text
        anew[[*kept]] = torch.arange(len(kept))
        return replace(
            super().joined(rows, positions),
            units=tuple(replace(self.units[n], row=row) for n, row in kept.items()),
            number=anew[number],
            ends=moved(self.ends),
            recent_ends=moved(self.recent_ends),
            kept=Kept(self.units, tuple(kept)),
        )

    def at(self, positions: Tensor | None) -> Self:
        """The same with the model's positions; None: places in the row."""
        return replace(self, position_ids=positions)

    def dealt(self, size: int) -> Self:
        """The same for ``size`` ranks.

        Raises:
            ValueError: there is no token.
        """
        if self.number.numel() == 0:
            raise ValueError(
                f"got input_ids {self.shape}; expected at least one sample, and one token of it"
            )
        kept = self.number != TEXT
        if self.attention_mask is None:
            kept = torch.ones_like(kept)
        else:
            kept |= self.attention_mask != 0
            if self.labels is not None:  # what is learnt counts, even where padding is to say it
                kept |= _shifted(self.labels) != IGNORED_LABEL
            if self.unbroken:
                begun, ends = (kept.cummax(dim=1).values, kept.flip(1).cummax(dim=1).values.flip(1))
                kept = begun & ends
        tokens, rows = [unit.tokens for unit in self.units], self.branches
        gaps = None if rows is None else (rows.gap_start, rows.gap_end)
        return replace(self, deal=Deal.of(kept, self.number, tokens, size, gaps=gaps))

    @property
    def settled(self) -> Deal:
        """Who holds what."""
        assert self.deal is not None, "dealt() comes first"
        return self.deal

    def lengths(self, size: int) -> tuple[int, ...]:
        """Tokens by rank, ``n_r``."""
        return self.settled.lengths

    def order(self) -> Tensor:
        """See `ds_lvx.models.batch.ShardedBatch.order`."""
        return self.settled.order(self.shape[1])

    def visibility(self) -> Visibility:
        """Causal by place, but for ``ends``; neither padding nor what ``attention_mask`` drops is
        seen."""
        column = self.settled.column
        pads, at = column == PADS, column.clamp(min=0)
        hidden = pads
        if self.attention_mask is not None:
            hidden = hidden | (self.attention_mask.gather(1, at) == 0)
        place = column.to(torch.int32)
        end = place + 1  # of what pads: 0, and it sees nothing
        if self.ends is not None:
            end = self.ends.gather(1, at).to(torch.int32).masked_fill(pads, 0)
        keys, gaps = place.masked_fill(hidden, EVERYTHING), self._gaps(at)
        return Visibility.of((torch.zeros_like(place), end, *gaps), keys)

    def recent(self, window: int) -> Visibility:
        """The same where a token sees so many places before it, with its own."""
        ends = self.ends if self.recent_ends is None else self.recent_ends
        rule = replace(self, ends=ends).visibility()
        start = self.settled.column.to(torch.int32) - (window - 1)
        if rule.gap_start is not None and rule.gap_end is not None:
            # The gap is not of the places that a window has.
            before = start - (rule.gap_end - rule.gap_start)
            start = torch.where(before < rule.gap_start, before, start)
        return replace(rule, q_start=start.clamp(min=0))

    def _gaps(self, at: Tensor) -> list[Tensor]:
        """int32, of tokens at these places of their rows, both ends of their gaps; none: no gap."""
        if self.branches is None:
            return []
        gaps = (self.branches.gap_start, self.branches.gap_end)
        return [each.gather(1, at).to(torch.int32) for each in gaps]

    def digest(self) -> int:
        """See `Text.digest`."""
        found = super().digest()
        ends = [each for each in (self.ends, self.recent_ends) if each is not None]
        return digest(torch.tensor(found, device="cpu"), *ends) if ends else found

    def shard(self, here: Here) -> dict[str, Any]:
        """The model's text arguments for a rank's part, with its positions in the whole."""
        column = self.settled.column[:, here]
        pads, at = column == PADS, column.clamp(min=0)

        def part(whole: Tensor, fill: int) -> Tensor:
            index = at.expand(*whole.shape[:-1], at.shape[1])
            return whole.gather(-1, index).masked_fill(pads, fill)

        positions = self.position_ids
        if positions is None:
            positions = torch.arange(self.shape[1]).expand(self.shape)
        shard: dict[str, Any] = {
            "input_ids": part(self.input_ids, 0),
            "position_ids": part(positions, 0),
        }
        if self.unbroken and self.attention_mask is not None:
            mask = part(self.attention_mask, 0)
            if bool(((mask == 0) & ~pads).any()):
                shard["attention_mask"] = mask
        if self.labels is not None:
            shard["labels"] = part(self.labels, IGNORED_LABEL)
            shard["shift_labels"] = part(_shifted(self.labels), IGNORED_LABEL).contiguous()
            shard[ITEMS_KEY] = self.divisor
        return shard

    def places(self, here: Here) -> Tensor:
        """`PLACES` of a rank's part."""
        column = self.settled.column[:, here]
        unit = self.number.gather(1, column.clamp(min=0)).masked_fill(column == PADS, TEXT)
        return (unit != TEXT).flatten().nonzero()[:, 0]


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


@dataclass(frozen=True, eq=False, kw_only=True)
class Units(Visual):
    """The units of a batch and their pixels.

    Attributes:
        units: in the order of the rows and their tokens.
        owner: the rank of each.
        arrange: makes the model's arguments of some units.
    """

    units: tuple[Unit, ...]
    owner: tuple[int, ...]
    arrange: Arrange

    @classmethod
    def of(cls, text: Text, pixels: Mapping[str, Tensor], arrange: Arrange) -> Units:
        """The units of a text, `Sequences`, and the pixels at hand by source."""
        assert isinstance(text, Sequences)
        units, owner = text.units, text.settled.owner
        if text.kept is not None:
            pixels = text.kept.pixels(pixels)
        return cls(
            count=len(units),
            unit_tokens=1,
            arguments=pixels,
            units=units,
            owner=owner,
            arrange=arrange,
        )

    @property
    def attended(self) -> bool:
        """Units stand among the text; no layer attends to them beside it."""
        return False

    def part(self, rank: int, size: int) -> Units:
        """This rank's units, of pixels that are those of all."""
        do = 'of all samples, or frames="local"'
        return self._arranged(rank, range(len(self.units)), do)

    def at_hand(self, rank: int, size: int) -> Units:
        """The same, of pixels that are this rank's."""
        mine = self._mine(rank)
        do = "of the images and frames that ds_lvx.owned names for this rank, in their order"
        return replace(self._arranged(rank, mine, do), count=len(mine))

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        each = [(unit.row, unit.tokens, unit.rows, *unit.about) for unit in self.units]
        kinds = [number for about in each for number in (len(about), *about)]
        return {"images and frames (a checksum)": digest(torch.tensor(kinds, device="cpu"))}

    def shares(self, parts: int) -> tuple[int, ...]:
        """Units by rank."""
        return tuple(self.owner.count(rank) for rank in range(parts))

    def among(self, parts: int) -> tuple[int, ...]:
        """Tokens of the units by rank."""
        pairs = list(zip(self.units, self.owner, strict=True))
        return tuple(sum(u.tokens for u, owner in pairs if owner == rank) for rank in range(parts))

    def prompt_positions(self, text: Text) -> Tensor | None:
        """The model's own, and without any those that transformers' generate has: places among the
        tokens that are not padding."""
        mask = text.attention_mask
        if text.position_ids is not None:
            return text.position_ids
        if mask is None:
            return torch.arange(text.shape[1]).expand(text.shape)
        return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)

    def layouts(
        self, text: Text, *, channel: Channel, lengths: tuple[int, ...], device: torch.device
    ) -> Mapping[str, Layout]:
        """Of the text in a window, where layers have one."""
        # In generation a rank has its part of a prompt, or every rank has the tokens behind it.
        if text.window is None or lengths != text.lengths(channel.size):
            return {}
        assert isinstance(text, Sequences)
        rule = text.recent(text.window)
        return {RECENT: Layout.of_batch(channel, lengths, lengths, rule, device=device)}

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Where the tokens of this rank's units are."""
        assert isinstance(text, Sequences)
        return {PLACES: text.places(here)}

    def _mine(self, rank: int) -> list[int]:
        """Numbers of a rank's units."""
        return [number for number, owner in enumerate(self.owner) if owner == rank]

    def _arranged(self, rank: int, there: Sequence[int], do: str) -> Units:
        """With the arguments for one rank's units, of pixels of the units that are there."""
        starts = dict.fromkeys(self.arguments, 0)
        rows: dict[int, Tensor] = {}
        for number in there:
            unit = self.units[number]
            start = starts.get(unit.source, 0)
            starts[unit.source] = start + unit.rows
            if unit.source in self.arguments:
                rows[number] = self.arguments[unit.source][start : start + unit.rows]
        for key, wanted in starts.items():
            found = len(self.arguments[key]) if key in self.arguments else 0
            if found != wanted:
                raise ValueError(
                    f"got {key} of {found} rows, and a text with places for {wanted}; expected "
                    f"the pixels {do}"
                )
        mine = self._mine(rank)
        made = self.arrange([self.units[n] for n in mine], [rows[n] for n in mine]) if mine else {}
        return replace(self, arguments=made)
