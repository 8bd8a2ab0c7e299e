"""Subgroups of a group's adjacent ranks, and the groups across them.

Six ranks in subgroups of two: ``[0 1] [2 3] [4 5]``; across them, by place, ``[0 2 4] [1 3 5]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from ds_lvx.distributed.channel import (
    Channel,
    ProcessGroup,
    destroy_group,
    new_group_of,
    ranks_of,
    runs_nccl,
)


class Subgroups(NamedTuple):
    """The channels of one rank.

    Attributes:
        inside: the adjacent ranks of this rank's subgroup.
        across: the ranks of all subgroups that have this rank's place in theirs.
    """

    inside: Channel
    across: Channel


class Divisions:
    """The subgroups of each group by their size; they live as long as the group."""

    # A Channel refers to its group weakly; what is held here are the groups themselves.
    _made: ClassVar[
        WeakKeyDictionary[ProcessGroup, dict[int, tuple[Subgroups, list[ProcessGroup]]]]
    ] = WeakKeyDictionary()

    @classmethod
    def of(cls, channel: Channel, size: int) -> Subgroups:
        """The subgroups of ``size`` adjacent ranks.

        Args:
            channel: the group.
            size: ranks of a subgroup; a divisor of the group's.

        Collectives: the first time, making the groups; every rank of the group must ask.
        """
        group = channel.group
        if group is None:
            return Subgroups(channel, channel)
        if size not in cls._made.get(group, {}):
            ranks = ranks_of(group)
            first = channel.rank // size * size
            inside, across = ranks[first : first + size], ranks[channel.rank % size :: size]
            cls._keep(
                group,
                size,
                _group_of(inside, group, f"inside {size}"),
                _group_of(across, group, f"across {size}"),
            )
            channel.agree({"made": size})  # as `SequenceParallelGroups` does
        return cls._made[group][size][0]

    @classmethod
    def close(cls, group: ProcessGroup) -> None:
        """End what was made for a group."""
        for _, held in cls._made.pop(group, {}).values():
            for each in held:
                destroy_group(each)

    @classmethod
    def _keep(
        cls, group: ProcessGroup, size: int, inside: list[ProcessGroup], across: list[ProcessGroup]
    ) -> None:
        subgroups = Subgroups(_channel(inside), _channel(across))
        cls._made.setdefault(group, {})[size] = subgroups, inside + across


def check_division(ranks: int, size: int) -> None:
    """Raise a ValueError unless ``size`` adjacent ranks make up subgroups of so many ranks."""
    if ranks % size:
        divisors = [each for each in range(1, ranks + 1) if ranks % each == 0]
        raise ValueError(
            f"ulysses: got {size} for a group of {ranks} ranks; expected one of {divisors}, so "
            "that every subgroup has as many ranks"
        )


def _group_of(ranks: Sequence[int], within: ProcessGroup, purpose: str) -> list[ProcessGroup]:
    """A group of some ranks, and one for what goes home; none for this rank alone."""
    return [
        new_group_of(ranks, within=within, purpose=f"{purpose} {way}")
        for way in ("out", "home")[: _needed(ranks)]
    ]


def _needed(ranks: Sequence[int]) -> int:
    # As of `SequenceParallelGroups`: what goes home does not queue behind what goes out.
    return 0 if len(ranks) == 1 else 2 if runs_nccl() else 1


def _channel(groups: Sequence[ProcessGroup]) -> Channel:
    return Channel(groups[0], home=groups[-1]) if groups else Channel(None)
