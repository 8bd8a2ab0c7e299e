"""MOSS-VL's batches: frames of unequal size, and the rule by which text sees them.

Shapes: ``B`` samples, ``T`` text tokens, ``F`` frames of all samples, ``S_r`` visual tokens of a
sample that rank r holds, of the sample with the most of them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.cuts import before
from ds_lvx.models.moss_vl.grid import Grid, frame_positions, read_grid, text_positions
from ds_lvx.models.prefixes import Merge, alike
from ds_lvx.models.runs import Runs
from ds_lvx.models.samples import images_before, sample_begins
from ds_lvx.models.text import Here, Text
from ds_lvx.models.visual import Visual

PIXELS = "pixel_values"
MASK = "cross_attention_mask"
RUNS = "vision_runs"
SEEN = "visible_frames"
KEYS = (PIXELS, "grid_thw", "media_nums_per_sample", MASK, SEEN, RUNS)
PLACES = "frame_places"
"""Where the tower's tokens, then the separators, go in ``[B * S, hidden]``: int64 ``[tokens]``."""
PIECES = "frame_pieces"
"""Of each run of the tower: rows of ``grid_thw``, and of ``pixel_values``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Frames(Visual):
    """The frames of a batch, and who holds them.

    Attributes:
        grid: the frames at hand; of all ranks as soon as that is known.
        pads: bool ``[B, T]``, text tokens that stand for a frame.
        begins: bool ``[B, T]``, where a further sample of a row begins; None: each has its own.
        holder: int64 ``[F]``, the rank of each frame; None where only this rank's are known.
        ranks: that share the batch, where ``holder`` is known.
        tower_runs: how often the tower runs, over some of this rank's frames each time.
    """

    grid: Grid
    pads: Tensor
    begins: Tensor | None = None
    holder: Tensor | None = None
    ranks: int = 0
    tower_runs: int = 1

    def alike(self, samples: int) -> list[int]:
        """Of each sample, the number of the first one whose frames are the same."""
        self._check_pads()
        grids = [self.grid.part(self.grid.sample == sample) for sample in range(samples)]
        sizes = [tuple(tuple(row[1:]) for row in grid.rows()) for grid in grids]
        rows = [int(grid.patches.sum()) for grid in grids]
        pixels = self.arguments.get(PIXELS, torch.zeros(0))
        return alike([*zip(sizes, pixels.split(rows), strict=True)])

    @property
    def ends(self) -> Tensor:
        """All tokens of frames are in common, or none."""
        behind = torch.arange(1, self.pads.shape[1] + 1)
        last = (self.pads * behind).amax(dim=1, keepdim=True)
        return torch.maximum(behind, last)

    def joined(self, rows: Merge) -> Frames:
        """See `Visual.joined`."""
        assert self.runs is not None
        firsts = torch.tensor(rows.firsts)
        which = torch.isin(self.grid.sample, firsts)
        kept = self.grid.part(which)
        mine = which.repeat_interleave(self.grid.patches)
        return replace(
            self,
            count=len(kept),
            arguments={key: value[mine] for key, value in self.arguments.items()},
            runs=self.runs.joined(rows),
            grid=replace(kept, sample=torch.searchsorted(firsts, kept.sample)),
            pads=rows.taken(self.pads, 0),
        )

    def part(self, rank: int, size: int) -> Frames:
        """This rank's frames, of pixels that are those of all."""
        self._check_pads()
        holder = self.grid.dealt(size)
        cut = {}
        if PIXELS in self.arguments:
            pieces = self.arguments[PIXELS].split(self.grid.patches.tolist())
            mine = [piece for piece, of in zip(pieces, holder.tolist(), strict=True) if of == rank]
            cut[PIXELS] = torch.cat(mine) if mine else self.arguments[PIXELS][:0]
        sizes = torch.stack((self.grid.sample, self.grid.height, self.grid.width))
        return replace(self, holder=holder, ranks=size, counts=sizes, arguments=cut)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        return {**super().shared_record(), RUNS: self.tower_runs}

    def record(self) -> dict[str, Any]:
        """What the other ranks must hear of: which frames are here, where they do not know."""
        alone = {} if self.holder is not None else {"frames here": self.grid.rows()}
        return {**super().record(), **alone}

    def settled(self, records: Sequence[Mapping[str, Any]]) -> Frames:
        """With the frames of all ranks."""
        if self.holder is not None:
            return self
        rows = [(row, rank) for rank, record in enumerate(records) for row in record["frames here"]]
        rows.sort(key=lambda each: each[0][0])  # by sample; the ranks of a sample stay in order
        grid = Grid.of_rows([row for row, _ in rows], self.grid.merge)
        counts = torch.tensor([row[1] for row, _ in rows], dtype=torch.int64)
        ranks = torch.tensor([rank for _, rank in rows], dtype=torch.int64)
        holder = ranks.repeat_interleave(counts)
        whole = replace(self, grid=grid, holder=holder, ranks=len(records))
        whole._check_pads()
        return whole

    def shares(self, parts: int) -> tuple[int, ...]:
        """Frames by rank."""
        return tuple(torch.bincount(self.grid.dealt(parts), minlength=parts).tolist())

    def lengths(self, shares: Sequence[int] = ()) -> tuple[int, ...]:
        """``S_r`` by rank."""
        held = torch.zeros(self.ranks, len(self.pads), dtype=torch.int64)
        held.index_put_((self._holder, self.grid.sample), self.grid.tokens, accumulate=True)
        return tuple(held.amax(dim=1).tolist())

    @property
    def tells_padding(self) -> bool:
        """The grids say it, and every rank knows those."""
        return False

    def rule(self, valid: Tensor) -> Visibility:
        """Frames by their number; what pads a sample is seen by nobody."""
        assert self.runs is not None
        lengths = torch.tensor(self.lengths())
        position = torch.full((len(self.pads), int(lengths.sum())), EVERYTHING, dtype=torch.int32)
        tokens = self.grid.tokens
        column = before(lengths)[self._holder] + self.grid.offsets(self._holder)
        rows, columns = _each(self.grid.sample, column, tokens)
        position[rows, columns] = self.grid.index.to(torch.int32).repeat_interleave(tokens)
        return Visibility(self.runs.start, self.runs.end, position)

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Positions of this rank's text and frames, and where its frames' tokens go."""
        positions, starts = self._positions(text)
        (mine,) = torch.where(self._holder == rank)
        grid, length = self.grid.part(mine), self.lengths()[rank]
        tokens, samples = grid.tokens, len(self.pads)
        rows, columns = _each(grid.sample, grid.offsets(torch.zeros_like(mine)), tokens)
        of_frames = torch.zeros(3, samples, length, dtype=torch.int64)
        of_frames[:, rows, columns] = frame_positions(grid, starts[mine])
        places = rows * length + columns
        last = torch.zeros(len(places), dtype=torch.bool)
        last[tokens.cumsum(0) - 1] = True
        beside = {
            "position_ids": positions[:, here],
            "vision_position_ids": of_frames,
            PLACES: torch.cat((places[~last], places[last])),
        }
        if len(mine) == 0:  # a blank frame runs through the tower
            pieces = ((1, grid.merge**2), *[(0, 0)] * (self.tower_runs - 1))
            media = [1] + [0] * (samples - 1)
            return {**beside, PIECES: pieces, "media_nums_per_sample": media}
        runs = grid.in_runs(self.tower_runs)
        table = torch.tensor([row for run in runs for row in run.rows()])
        return {
            **beside,
            PIECES: tuple((len(run.rows()), int(run.patches.sum())) for run in runs),
            "grid_thw": table[:, 1:],
            "media_nums_per_sample": torch.bincount(table[:, 0], minlength=samples).tolist(),
        }

    def prompt_positions(self, text: Text) -> Tensor:
        """Padding behind a text stands at its end, from where new tokens go on."""
        return self._positions(text)[0].cummax(dim=1).values

    def _positions(self, text: Text) -> tuple[Tensor, Tensor]:
        """Of the whole text ``[B, T]``, and of the frames' starts ``[F]``."""
        valid = torch.ones_like(self.pads)
        if text.attention_mask is not None:
            valid = text.attention_mask.cpu() != 0
        positions, starts = text_positions(self.pads, valid, self.grid, begins=self.begins)
        if text.branches is not None:  # of others between, all of them text
            before = F.pad(valid.long().cumsum(1), (1, 0))
            gaps = text.branches.gap_start, text.branches.gap_end
            first, stop = (before.gather(1, each) for each in gaps)
            positions = (positions - (stop - first)).masked_fill(~valid, 0)
        return positions, starts

    @property
    def _holder(self) -> Tensor:
        assert self.holder is not None, "settled() comes first"
        return self.holder

    def _check_pads(self) -> None:
        """A sample's text must not have more tokens for frames than there are frames."""
        wanted, there = self.pads.sum(dim=1), self.grid.counts(len(self.pads))
        beyond = (wanted > there).nonzero()[:, 0].tolist()
        if beyond:
            row = beyond[0]
            raise ValueError(
                f"got {int(wanted[row])} image tokens in the text of sample {row} and "
                f"{int(there[row])} frames; expected a frame for each: an image token stands for "
                "an image or for one frame of a video"
            )
        if self.begins is not None and bool((wanted != there).any()):
            row = int((wanted != there).nonzero()[0])
            raise ValueError(
                f"got {int(wanted[row])} image tokens in row {row}, which several samples share, "
                f"and {int(there[row])} frames; expected one for each: whose a further frame is "
                "could not be told"
            )


def visual(batch: Mapping[str, Any], text: Text, model: Any) -> Frames:
    """The visual part of a batch, as MOSS-VL's processor has it.

    A token sees the first frames of its sample. How many is said by ``cross_attention_mask``, or by
    ``visible_frames``; without either it sees those whose tokens stand before it or are it, which
    is what the processor's mask says.
    """
    if MASK in batch and SEEN in batch:
        raise ValueError(f"got {MASK} and {SEEN}; expected one of them")
    begins = sample_begins(text)
    if begins is not None and (MASK in batch or SEEN in batch):
        raise ValueError(
            f"got {MASK if MASK in batch else SEEN} for samples that share a row; expected none: "
            "each token sees the frames of its own sample whose tokens stand before it or are it"
        )
    samples, config = len(text.input_ids), model.config
    grid = read_grid(batch, samples, config.vision_config.spatial_merge_size)
    _check_pixels(batch.get(PIXELS), grid, config.vision_config)
    pads = text.input_ids.cpu() == config.image_token_id
    if text.attention_mask is not None:
        pads &= text.attention_mask.cpu() != 0
    seen = pads.to(torch.int32).cumsum(1, dtype=torch.int32)
    if text.attention_mask is not None:
        seen = seen.masked_fill(text.attention_mask.cpu() == 0, 0)
    if MASK in batch:
        seen = _seen_of_mask(batch[MASK], text)
    elif SEEN in batch:
        seen = _seen_as_given(batch[SEEN], text)
    return Frames(
        count=len(grid),
        unit_tokens=0,
        arguments={PIXELS: batch[PIXELS]} if PIXELS in batch else {},
        runs=Runs(
            torch.zeros_like(seen) if begins is None else images_before(seen, begins),
            seen,
            None,
            None,
        ),
        grid=grid,
        pads=pads,
        begins=begins,
        tower_runs=_tower_runs(batch.get(RUNS, 1), model),
    )


def _tower_runs(runs: Any, model: Any) -> int:
    """How often the tower is to run.

    Raises:
        ValueError: no number from 1 on.
        NotImplementedError: a tower that trains.
    """
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"got {RUNS} {runs!r}; expected how often the tower runs, 1 or more")
    if runs > 1 and any(parameter.requires_grad for parameter in model.model.visual.parameters()):
        raise NotImplementedError(
            f"got {RUNS} {runs} for a vision tower that trains, whose activations wait for their "
            f"backward however often it runs; freeze it, or pass {RUNS} 1"
        )
    return runs


def blank(model: Any) -> dict[str, Tensor]:
    """One frame of one visual token."""
    config = model.config.vision_config
    merge = config.spatial_merge_size
    return {
        PIXELS: torch.zeros(merge**2, _pixels_of_a_patch(config)),
        "grid_thw": torch.tensor([[1, merge, merge]]),
    }


def _pixels_of_a_patch(config: Any) -> int:
    return int(config.in_channels * config.temporal_patch_size * config.patch_size**2)


def _check_pixels(pixels: Any, grid: Grid, config: Any) -> None:
    rows, width = int(grid.patches.sum()), _pixels_of_a_patch(config)
    found: Any = (0, width)
    if pixels is not None:
        found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    if found != (rows, width):
        raise ValueError(
            f"got pixel_values {found} for a grid_thw of {rows} patches; expected ({rows}, "
            f"{width}), a row for each patch of {config.patch_size} x {config.patch_size} pixels: "
            "use the processor that belongs to the model"
        )


def _seen_of_mask(mask: Any, text: Text) -> Tensor:
    """int32 ``[B, T]``: how many frames each token sees, by bool ``[B, 1, T, F]``, True = hidden.

    Raises:
        ValueError: another kind of mask, or one in which a token sees other frames than the first.
    """
    expected = (text.shape[0], 1, text.shape[1])
    if (
        not isinstance(mask, Tensor)
        or mask.dtype != torch.bool
        or tuple(mask.shape[:3]) != expected
    ):
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(
            f"got cross_attention_mask {found}; expected bool {[*expected, 'frames']}, True where "
            "a frame is hidden, of the whole sequence: pass what the processor returns"
        )
    shown = ~mask[:, 0].cpu()
    seen = shown.sum(dim=-1, dtype=torch.int32)
    wrong = (shown != (torch.arange(mask.shape[-1]) < seen[..., None])).any(dim=-1)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"got a cross_attention_mask in which token {token} of sample {row} sees frames that "
            "are not the first ones; expected, for every token, frames 0 to n, or none"
        )
    return seen


def _seen_as_given(seen: Any, text: Text) -> Tensor:
    if not isinstance(seen, Tensor) or tuple(seen.shape) != text.shape or bool((seen < 0).any()):
        found = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(
            f"got {SEEN} {found}; expected a tensor {text.shape} as input_ids, of numbers from 0 "
            "on: the frames that each token sees"
        )
    return seen.detach().cpu().to(torch.int32)


def _each(sample: Tensor, start: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every token of frames that start at a column."""
    within = torch.arange(int(tokens.sum())) - before(tokens).repeat_interleave(tokens)
    return sample.repeat_interleave(tokens), start.repeat_interleave(tokens) + within
