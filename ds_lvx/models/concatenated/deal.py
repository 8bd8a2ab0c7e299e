"""Who holds which tokens of a row: whole frames, and as much text as evens out tokens and work.

A token attends to those before it, so that late ones cost more. Each rank gets an early and a late
piece of the frames, and an early and a late piece of the text between and around them::

    frames  0 0 1 1 2 2 | 2 2 1 1 0 0        text  0 1 2 | 2 1 0

Text is shared out last, and by cost: it makes up for frames, which no rank cuts. A row of text
alone is dealt as zigzag. In one of several completions a token does not see those of others, and
costs less. Nothing here depends on a rank: every rank finds the same.

Legend: ``B`` rows, ``T`` tokens of a row, n ranks, ``n_r`` tokens of the longest part on rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

TEXT = -1
"""In the place of a unit's number: a token of text."""
PADS = -1
"""In the place of a token's: a part is shorter than that of another row."""
_ROUNDS = 40
_FEW, _SWAPS = 16, 4
"""Units and exchanges for each rank."""
_EVEN = 0.05
"""Of a rank's share: a difference in work that is left as it is."""


@dataclass(frozen=True, eq=False)
class Deal:
    """Who holds what of a batch.

    Attributes:
        owner: the rank of each unit.
        column: int64 ``[B, n_0 + n_1 + ...]``, of every token of every rank, ranks in order: its
            place in its row, or `PADS`. Those of a rank are in the row's order.
        lengths: ``n_r`` of every rank, at least 1.
    """

    owner: tuple[int, ...]
    column: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        kept: Tensor,
        number: Tensor,
        tokens: Sequence[int],
        ranks: int,
        *,
        gaps: tuple[Tensor, Tensor] | None = None,
    ) -> Deal:
        """Deal out rows, each by itself.

        Args:
            kept: bool ``[B, T]``, the tokens that somebody has to hold.
            number: int64 ``[B, T]``, of every token its unit's number, or `TEXT`; units are
                numbered over all rows, in order.
            tokens: of each unit.
            ranks: n.
            gaps: int64 ``[B, T]`` each, first and stop of the places before a token that it does
                not see; None: it sees all before it.
        """
        owner: list[int] = []
        rows = []
        for row, held in enumerate(kept):
            places = held.nonzero()[:, 0]
            units = number[row, places]
            mine = tokens[len(owner) : int(number[row].max()) + 1]
            owner += owners(mine, ranks)
            cost = torch.arange(1, len(places) + 1)  # keys that a token sees
            if gaps is not None:
                before = torch.nn.functional.pad(held.cumsum(0), (1, 0))
                start, stop = (before[each[row, places]] for each in gaps)
                cost -= stop - start
            rows.append((places, _ranks(units, torch.tensor([*owner, TEXT]), cost, ranks)))
        counts = torch.stack([torch.bincount(held, minlength=ranks) for _, held in rows])
        lengths = [max(int(most), 1) for most in counts.amax(dim=0)]
        column = torch.full((len(rows), sum(lengths)), PADS)
        firsts = [0, *accumulate(lengths)]
        for row, (places, held) in enumerate(rows):
            for rank in range(ranks):
                part = places[held == rank]
                column[row, firsts[rank] : firsts[rank] + len(part)] = part
        return cls(tuple(owner), column, tuple(lengths))

    def order(self, length: int) -> Tensor:
        """int64 ``[B, T]``: where in ``column`` a token of a row of ``length`` stands, or `PADS`"""
        found = torch.full((len(self.column), length + 1), PADS)
        # What pads goes to a place beyond the row.
        at = torch.where(self.column == PADS, length, self.column)
        found.scatter_(1, at, torch.arange(at.shape[1]).expand_as(at))
        return found[:, :length]


def owners(tokens: Sequence[int], ranks: int) -> list[int]:
    """The rank of each of a row's units: an early and a late piece, about as many tokens for each.

    Where a rank has so few units that this leaves work uneven, some are exchanged.

    Args:
        tokens: of each unit, in the row's order.
        ranks: n.
    """
    total = sum(tokens)
    held = [0] * ranks
    owner: list[int] = []
    # Everything 2 n times as large, so that shares are whole numbers.
    for turn in (range(ranks), range(ranks - 1, -1, -1)):
        early = turn.step > 0
        reached = 2 * ranks * sum(held)
        wanted = reached
        for rank in turn:
            wanted += total if early else 2 * total - 2 * ranks * held[rank]
            # A unit is on the rank in whose piece its middle lies.
            while len(owner) < len(tokens) and reached + ranks * tokens[len(owner)] <= wanted:
                each = tokens[len(owner)]
                reached += 2 * ranks * each
                held[rank] += each
                owner.append(rank)
    return _swap(owner + [0] * (len(tokens) - len(owner)), tokens, ranks)


def _swap(owner: list[int], tokens: Sequence[int], ranks: int) -> list[int]:
    """Exchange units of a size between ranks, the pair that evens out most first.

    Args:
        owner: the rank of each unit.
        tokens: of each unit.
        ranks: n.
    """
    if len(owner) > _FEW * ranks:
        return owner
    held, size = torch.tensor(owner, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)
    cost = size * (2 * size.cumsum(0) - size)
    more, same = cost[:, None] - cost, size[:, None] == size
    for _ in range(_SWAPS * ranks):
        work = torch.zeros(ranks, dtype=torch.int64).index_add_(0, held, cost)
        if int(work.max() - work.min()) * ranks <= _EVEN * int(work.sum()):
            break
        # Products of work: beyond int64 from some 100,000 tokens.
        gain = more.double() * (work[held][:, None] - work[held] - more) * same
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= 0:
            break
        pair = torch.tensor(divmod(best, len(held)))
        held[pair] = held[pair.flip(0)]
    return held.tolist()


def _ranks(units: Tensor, owner: Tensor, cost: Tensor, ranks: int) -> Tensor:
    """int64 ``[tokens]``: who holds each of a row's tokens.

    Args:
        units: int64, of each token its unit's number, or `TEXT`.
        owner: int64, the rank of each unit, and `TEXT` behind the last.
        cost: int64, of each token.
        ranks: n.
    """
    held = owner[units]
    visual, text = held != TEXT, held == TEXT
    tokens = torch.bincount(held[visual], minlength=ranks)
    work = torch.zeros(ranks, dtype=torch.int64).index_add_(0, held[visual], cost[visual])
    shares = _filled(tokens.tolist(), int(text.sum()))
    wanted = [int(cost.sum()) // ranks - each for each in work.tolist()]
    held[text] = _pieces(cost[text], shares, wanted)
    return held


def _filled(tokens: Sequence[int], count: int) -> list[int]:
    """How many of ``count`` tokens each rank gets, so that all of them have as many.

    Args:
        tokens: that each rank has already.
        count: of the tokens of text.
    """
    low, high = 0, max(tokens) + count
    while low < high:  # the highest level that the text reaches
        level = (low + high + 1) // 2
        if sum(max(level - each, 0) for each in tokens) <= count:
            low = level
        else:
            high = level - 1
    shares = [max(low - each, 0) for each in tokens]
    left = count - sum(shares)
    for rank, each in enumerate(tokens):
        if left > 0 and each <= low:
            shares[rank] += 1
            left -= 1
    return shares


def _pieces(cost: Tensor, shares: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """int64 ``[count]``: who holds each token of text: an early and a late piece of it.

    How long the early one is decides what both cost.

    Args:
        cost: int64 ``[count]``, of each token.
        shares: tokens that each rank gets, all of them together.
        wanted: what those are to cost.
    """
    rises = bool((cost.diff() > 0).all())
    early = (_step_by_step if rises else _one_by_one)(cost, shares, wanted)
    turns = torch.tensor([*range(len(shares)), *reversed(range(len(shares)))])
    return turns.repeat_interleave(torch.tensor(_ends(early, shares)).diff())


def _one_by_one(cost: Tensor, shares: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """How long the early pieces are where the cost falls at places: of what the ranks before leave,
    which are the outermost tokens of their kind, the best."""
    sums = torch.nn.functional.pad(cost.cumsum(0), (1, 0))
    first, stop, early = 0, len(cost), []
    for share, want in zip(shares, wanted, strict=True):
        each = torch.arange(share + 1)
        found = sums[first + each] - sums[first] + sums[stop] - sums[stop - share + each]
        early.append(int((found - want).abs().argmin()))
        first, stop = first + early[-1], stop - share + early[-1]
    return early


def _step_by_step(cost: Tensor, shares: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The same where the cost rises."""
    sums = [0, *cost.cumsum(0).tolist()]
    span = max((int(cost[-1]) - int(cost[0])) / 2, 1.0) if len(cost) > 0 else 1.0
    early = [share // 2 for share in shares]
    best, least = early, float("inf")
    for _ in range(_ROUNDS):
        ends = _ends(early, shares)
        costs = [sums[end] - sums[start] for start, end in pairwise(ends)]
        found = [front + back for front, back in zip(costs, reversed(costs), strict=True)]
        missing = [want - have for want, have in zip(wanted, found, strict=False)]
        worst = max(map(abs, missing))
        if worst < least:
            best, least = early, worst
        early = [
            min(max(each - round(miss / span / 2), 0), share)
            for each, miss, share in zip(early, missing, shares, strict=True)
        ]
    return best


def _ends(early: Sequence[int], shares: Sequence[int]) -> list[int]:
    """Where the early pieces end, ranks in order, and the late ones, in reverse; 0 at first."""
    late = [share - each for share, each in zip(shares, early, strict=True)]
    return [0, *accumulate((*early, *reversed(late)))]
