"""The frames of a batch of MOSS-VL, and the positions that text and frames take (XRoPE).

An image is a frame, a video is many. A frame of ``h x w`` patches becomes ``eh x ew`` visual tokens
(each merges 2 x 2 patches) and one separator. Text and frames share one line of positions: a text
token takes one place of it; a frame that starts at t covers ``(t, t + row, t + column)``, and its
separator, with the frame's token in the text, stands behind the longer side: ``t + max(eh, ew)``.

Worked example, a frame of 2 x 2 merged patches at anchor 7: ``T 7 7 7 7 9``, ``H 7 7 8 8 9``,
``W 7 8 7 8 9``; the next text token is at 10.

Shapes: ``B`` samples, ``T`` text tokens, ``F`` frames of all samples, sample after sample; all of
it int64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.cuts import before, parts_of


@dataclass(frozen=True, eq=False)
class Grid:
    """The frames of a batch, sample after sample.

    Attributes:
        sample: ``[F]``, whose frame it is.
        height, width: ``[F]``, in patches.
        merge: patches of a visual token, by side.
    """

    sample: Tensor
    height: Tensor
    width: Tensor
    merge: int

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], merge: int) -> Grid:
        """From rows ``(sample, frames, height, width)``, sorted by sample."""
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
        each = table[:, [0, 2, 3]].repeat_interleave(table[:, 1], dim=0)
        return cls(each[:, 0], each[:, 1], each[:, 2], merge)

    def __len__(self) -> int:
        return len(self.sample)

    def rows(self) -> list[list[int]]:
        """As `of_rows` takes them: neighbours of one sample and size are one row."""
        table = torch.stack((self.sample, self.height, self.width), dim=1)
        if not len(table):
            return []
        unique, counts = torch.unique_consecutive(table, dim=0, return_counts=True)
        return torch.cat((unique[:, :1], counts[:, None], unique[:, 1:]), dim=1).tolist()

    def part(self, which: Tensor) -> Grid:
        """Some of the frames, by a mask ``[F]`` or by indices."""
        return Grid(self.sample[which], self.height[which], self.width[which], self.merge)

    @property
    def patches(self) -> Tensor:
        """``[F]``, rows of ``pixel_values``."""
        return self.height * self.width

    @property
    def tokens(self) -> Tensor:
        """``[F]``, visual tokens, the separator among them."""
        return self.patches // self.merge**2 + 1

    @property
    def extent(self) -> Tensor:
        """``[F]``, places from the start of a frame to its separator."""
        return torch.maximum(self.height, self.width) // self.merge

    def counts(self, batch_size: int) -> Tensor:
        """``[B]``, frames of each sample."""
        return torch.bincount(self.sample, minlength=batch_size)

    @property
    def index(self) -> Tensor:
        """``[F]``, which frame of its sample it is."""
        return torch.arange(len(self)) - before(self.counts(0))[self.sample]

    def dealt(self, ranks: int) -> Tensor:
        """``[F]``: which rank gets it. Each sample's frames are cut into runs of about as many
        visual tokens each: a frame goes where the middle of its tokens lies."""
        tokens = self.tokens
        totals = torch.zeros(int(self.sample.max()) + 1 if len(self) else 0, dtype=torch.int64)
        totals.index_add_(0, self.sample, tokens)
        starts = before(tokens) - before(totals)[self.sample]
        return parts_of(starts, tokens, totals[self.sample], ranks)

    def in_runs(self, runs: int) -> list[Grid]:
        """All frames in so many runs of about as many patches each; some may be empty."""
        patches = self.patches
        part = parts_of(before(patches), patches, patches.sum(), runs)
        return [self.part(part == number) for number in range(runs)]

    def offsets(self, holder: Tensor) -> Tensor:
        """``[F]``: where a frame starts among the tokens of its sample that its rank holds."""
        place = torch.empty_like(self.sample)
        for rank in holder.unique().tolist():
            (mine,) = torch.where(holder == rank)
            held = self.part(mine)
            starts = before(held.tokens)
            samples = held.sample
            first = torch.searchsorted(samples, samples)
            place[mine] = starts - starts[first]
        return place


def text_positions(
    pads: Tensor, valid: Tensor, grid: Grid, *, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where the text's tokens and the frames stand.

    Args:
        pads: bool ``[B, T]``, tokens that stand for a frame; the n-th of a sample for its n-th.
        valid: bool ``[B, T]``, False at padding.
        grid: the frames; those beyond the tokens are seen by nobody, and stand at 0.
        begins: bool ``[B or 1, T]``, where a further sample of a row begins: at 0, as the first.

    Returns:
        Positions of the text ``[B, T]``, 0 at padding; starts of the frames ``[F]``.
    """
    regular = (valid & ~pads).long()
    line = regular.cumsum(1) - regular
    rows, columns = torch.where(pads)
    number = pads.long().cumsum(1)[rows, columns] - 1
    frame = before(grid.counts(len(pads)))[rows] + number
    steps = torch.zeros_like(line)
    steps[rows, columns] = grid.extent[frame] + 1
    shift = steps.cumsum(1)
    now = line + shift - steps
    if begins is not None:
        before_sample = torch.where(begins, now, 0).cummax(dim=1).values
        line, now = line - before_sample, now - before_sample
    starts = torch.zeros(len(grid), dtype=torch.int64)
    starts[frame] = now[rows, columns]
    text = line + shift - pads.long()
    return text.masked_fill(~valid, 0), starts


def frame_positions(grid: Grid, starts: Tensor) -> Tensor:
    """``[3, tokens]``: time, height and width of every visual token, frame after frame."""
    tokens = grid.tokens
    frame = torch.arange(len(grid)).repeat_interleave(tokens)
    within = torch.arange(int(tokens.sum())) - before(tokens)[frame]
    width = (grid.width // grid.merge)[frame]
    separator = within == tokens[frame] - 1
    end = grid.extent[frame]
    row = torch.where(separator, end, within // width)
    column = torch.where(separator, end, within % width)
    time = torch.where(separator, end, 0)
    return starts[frame] + torch.stack((time, row, column))


def read_grid(batch: Any, batch_size: int, merge: int) -> Grid:
    """The frames that a batch names by ``grid_thw`` and ``media_nums_per_sample``.

    Raises:
        ValueError: the two do not belong together, or sides are no multiples of ``merge``.
    """
    given = batch.get("grid_thw")
    counts = batch.get("media_nums_per_sample")
    if given is None:
        return Grid.of_rows([], merge)
    if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != 3:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"got grid_thw {found}; expected a tensor [media, 3], frames, height and width in "
            "patches: pass the batch as the processor returns it"
        )
    table = given.detach().cpu().to(torch.int64)
    if counts is None and batch_size == 1:
        counts = [len(table)]
    numbers = [] if counts is None else [int(count) for count in counts]
    if len(numbers) != batch_size or sum(numbers) != len(table) or min(numbers, default=0) < 0:
        raise ValueError(
            f"got media_nums_per_sample {counts} for {batch_size} samples and {len(table)} rows of "
            "grid_thw; expected the number of media of each sample"
        )
    if len(table) and (int(table.min()) < 1 or bool((table[:, 1:] % merge).any())):
        raise ValueError(
            f"got grid_thw with the row {table[_first_bad(table, merge)].tolist()}; expected at "
            f"least one frame, and sides that are multiples of {merge} patches"
        )
    samples = torch.arange(batch_size).repeat_interleave(torch.tensor(numbers))
    return Grid.of_rows(torch.cat((samples[:, None], table), dim=1).tolist(), merge)


def _first_bad(table: Tensor, merge: int) -> int:
    bad = (table < 1).any(dim=1) | (table[:, 1:] % merge != 0).any(dim=1)
    return int(bad.nonzero()[0])
