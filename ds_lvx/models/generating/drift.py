"""What is wrong when the ranks of a generation say different things."""

from __future__ import annotations

ENDED, FAILED = -1, -2
"""States of a rank beside the number of its token."""


def difference(said: list[list[int]]) -> str:
    """What is wrong when ranks say different things, by rank: a state, or which token; its ids."""
    states = [each[0] for each in said]
    failed, ended = (_ranks(states, state) for state in (FAILED, ENDED))
    token = max(states)
    if failed:
        where = f" at new token {token}" if token > 0 else ""
        return f"{failed} failed{where}, and so the others stop as well; its own error says why"
    if ended and token > 0:
        wrong = f"{ended} ended where others went on from new token {token}"
    elif ended:
        wrong = "the ranks return different sequences"
    else:
        tokens = ", ".join(f"{each[1:]} on rank {rank}" for rank, each in enumerate(said))
        wrong = f"the ranks disagree on new token {token} of each row: {tokens}"
    return (
        f"{wrong}; expected the same on every rank of the group: the same weights, dtype, versions "
        "and kind of device, and processors and criteria that go by their arguments alone"
    )


def _ranks(states: list[int], state: int) -> str:
    """The ranks in a state, in words; empty for none."""
    found = [str(rank) for rank, each in enumerate(states) if each == state]
    return "" if not found else f"{'rank' if len(found) == 1 else 'ranks'} {', '.join(found)}"
