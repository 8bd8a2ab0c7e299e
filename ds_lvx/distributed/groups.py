"""Sequence-parallel and data-parallel groups: who shares a sample with whom.

Ranks of one sequence-parallel group are adjacent, so that they share a node where they can; the
groups together are the data-parallel replicas::

    world 0 1 2 3 4 5, sequence_parallel_size 3:   sp groups [0 1 2] [3 4 5]   dp rank 0 and 1

`SequenceParallelGroups` is also the ``mpu`` that DeepSpeed takes. ZeRO shards and reduces over
data x sequence parallel, that is, over all ranks; there is no pure data-parallel group to be had
here on purpose: ZeRO-3 would reduce over it and the ranks' weights would drift apart.
"""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

from ds_lvx.config.words import in_ranks
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import (
    Channel,
    ProcessGroup,
    destroy_group,
    is_initialized,
    new_group_of,
    new_groups,
    ranks_of,
    runs_nccl,
)
from ds_lvx.distributed.subgroups import Divisions


class SequenceParallelGroups:
    """The sequence-parallel group of this rank, and the ``mpu`` for ``deepspeed.initialize``.

    The newest one that is not closed is the current one: ``group=None`` means its group.

    Args:
        sequence_parallel_size: ranks that share one sample; must divide the world.

    Attributes:
        sp_rank, sp_size: this rank's place in its sequence-parallel group, and the group's size.
        dp_rank, dp_size: which replica this rank is part of, and how many there are.
        channel: the `Channel` of the sequence-parallel group.
        world_channel: the `Channel` of all ranks (data x sequence parallel).

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: a size that is no positive divisor of the world size; on every rank.

    Collectives: making the groups; every rank must construct it, at the same point.
    """

    _open: ClassVar[list[SequenceParallelGroups]] = []

    def __init__(self, sequence_parallel_size: int) -> None:
        if not is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised; call deepspeed.init_distributed() before "
                "SequenceParallelGroups, or let ds_lvx.initialize do both"
            )
        world = Channel.world()
        _agree_on_size(sequence_parallel_size, world)
        starts = range(0, world.size, sequence_parallel_size)
        ranks_by_group = [range(start, start + sequence_parallel_size) for start in starts]
        # A communicator of NCCL runs one transfer after the other; gloo's do not wait in line.
        two = sequence_parallel_size > 1 and runs_nccl()
        group = new_groups(ranks_by_group)
        self.channel = Channel(group, home=new_groups(ranks_by_group) if two else None)
        self.sp_size = sequence_parallel_size
        self.dp_rank, self.sp_rank = divmod(world.rank, sequence_parallel_size)
        self.dp_size = world.size // sequence_parallel_size
        self.world_channel = world
        # DeepSpeed takes None for the world, and would sum gradient norms over it.
        alone = new_group_of([ranks_of(group)[self.sp_rank]], within=group, purpose="alone")
        self._alone = Channel(alone)
        # A rank that closed them at once would break connections that another still makes.
        world.agree({"made": sequence_parallel_size})
        self._open.append(self)

    @classmethod
    def current(cls) -> SequenceParallelGroups | None:
        """The newest groups that are not closed, or None."""
        return cls._open[-1] if cls._open else None

    def divide(self, size: int) -> None:
        """Make the subgroups of ``size`` adjacent ranks that a hybrid needs.

        Collectives: making the groups; every rank of this one's group must call it.
        """
        Divisions.of(self.channel, size)

    def close(self) -> None:
        """End the groups. Calling it twice is allowed, and after the end of torch.distributed."""
        if self not in self._open:
            return
        self._open.remove(self)
        for group in _left(self.channel, self._alone):
            Divisions.close(group)
            destroy_group(group)
        _forget_in_deepspeed(self)

    @property
    def sp_group(self) -> ProcessGroup:
        """The process group whose ranks share a sample."""
        group = self.channel.group
        assert group is not None
        return group

    # ---- what DeepSpeed asks an mpu

    def initialize_sequence_parallel(self) -> None:
        """Nothing to do; DeepSpeed takes the existence of this method for sequence parallelism."""

    def get_sequence_parallel_group(self) -> ProcessGroup:
        """The group whose ranks share a sample."""
        return self.sp_group

    def get_sequence_parallel_world_size(self) -> int:
        """Ranks that share a sample."""
        return self.sp_size

    def get_sequence_parallel_rank(self) -> int:
        """This rank's place in its sequence-parallel group."""
        return self.sp_rank

    def get_sequence_data_parallel_group(self) -> ProcessGroup:
        """Data x sequence parallel, which is every rank: ZeRO shards and reduces over it."""
        assert self.world_channel.group is not None
        return self.world_channel.group

    def get_sequence_data_parallel_world_size(self) -> int:
        """Ranks over which ZeRO shards."""
        return self.world_channel.size

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank's place among all ranks."""
        return self.world_channel.rank

    def get_data_parallel_world_size(self) -> int:
        """Replicas: how many different samples a micro-batch holds at once."""
        return self.dp_size

    def get_data_parallel_rank(self) -> int:
        """Which replica this rank is part of."""
        return self.dp_rank

    def get_model_parallel_world_size(self) -> int:
        """1: there is no tensor parallelism here."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """0: there is no tensor parallelism here."""
        return 0

    def get_model_parallel_group(self) -> ProcessGroup:
        """A group of this rank alone: there is no tensor parallelism here."""
        group = self._alone.group
        assert group is not None
        return group

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group


def resolve(group: ProcessGroup | SequenceParallelGroups | None) -> Channel:
    """The channel of a ``group`` argument: None is the current groups' one, or the world."""
    if isinstance(group, SequenceParallelGroups):
        return group.channel
    # torch's mark of a rank outside of a new group is a number, which `Channel` refuses.
    if not (group is None or isinstance(group, ProcessGroup | int)):
        raise ValueError(
            f"group: got {type(group).__name__}; expected a process group (of a DeviceMesh its "
            "get_group()), SequenceParallelGroups, or None"
        )
    if group is not None:
        return Channel(group)
    current = SequenceParallelGroups.current()
    return Channel.world() if current is None else current.channel


def resolve_groups(groups: SequenceParallelGroups | None) -> SequenceParallelGroups:
    """The given groups or the current ones.

    Raises:
        RuntimeError: there are none.
    """
    found = SequenceParallelGroups.current() if groups is None else groups
    if found is None:
        raise RuntimeError(
            "there are no sequence-parallel groups; call ds_lvx.initialize(...) or "
            "ds_lvx.SequenceParallelGroups(size) first, or pass groups="
        )
    return found


def _left(*channels: Channel) -> list[ProcessGroup]:
    """Their groups that have not ended: a script may have called ``destroy_process_group``."""
    found: list[ProcessGroup | None] = []
    for channel in channels:
        with suppress(RuntimeError):
            found += [channel.home, channel.group]
    return list(dict.fromkeys(group for group in found if group is not None))


def _agree_on_size(size: int, world: Channel) -> None:
    error = None
    try:
        _check_size(size, world.size)
    except ValueError as raised:
        error = raised
    records = world.agree({"sequence_parallel_size": size if error is None else None}, error)
    require_same(records, ["sequence_parallel_size"], what="SequenceParallelGroups")


def _check_size(size: int, world_size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or world_size % size:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"sequence_parallel_size: got {size!r} for a world of {in_ranks(world_size)}; expected "
            f"one of {divisors}; change it or the number of processes"
        )


def _forget_in_deepspeed(groups: SequenceParallelGroups) -> None:
    # DeepSpeed keeps the last mpu in a module and hands it to the next engine of the process.
    from deepspeed.utils import groups as deepspeed_groups

    if deepspeed_groups.mpu is groups:
        deepspeed_groups.mpu = None
        deepspeed_groups.mesh_device = None
