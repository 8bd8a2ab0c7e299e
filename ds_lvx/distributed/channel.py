"""Communication between the ranks of one group. The only module that imports ``torch.distributed``.

A `Channel` has two planes. The *data plane* is the process group itself: tensors of known shape,
asynchronously where there is something to run meanwhile. The *control plane* is a gloo group on
the CPU: small JSON records, so that agreeing on lengths never makes an accelerator's stream wait
for the host. Every transfer takes the `Spec` of what arrives; `ds_lvx.traffic` counts what leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvx.distributed import agreement
from ds_lvx.distributed.bundles import (
    Bundle,
    Spec,
    Unwritten,
    closed_up,
    go_alike,
    lengthened,
    or_a_byte,
    pack_rows,
    readable,
    specs_of,
    unpack_rows,
)
from ds_lvx.distributed.group_names import named
from ds_lvx.distributed.pending import Pending, blocking
from ds_lvx.distributed.traffic import count, count_control

ProcessGroup: TypeAlias = dist.ProcessGroup

# torch 2.13 gave the collective a new name and warns at the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Channel:
    """One group of ranks: its data plane, its control plane, and this rank's place in it.

    It refers to its group weakly: an autograd graph or a `SequenceParallelGroups` that a script
    still holds at its end must not keep the group's threads alive (see `ds_lvx.shutdown`).

    Args:
        group: a process group of which this rank is a member; ``None`` is a group of this
            process alone, which communicates with nobody.
        home: another one of the same ranks, for results on their way home: what goes out next does
            not queue behind them; ``None`` is ``group`` itself.
    """

    # One gloo group for every accelerator group that asked for a control plane.
    _control_groups: ClassVar[WeakKeyDictionary[ProcessGroup, ProcessGroup]] = WeakKeyDictionary()

    def __init__(self, group: ProcessGroup | None, *, home: ProcessGroup | None = None) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                "got a process group that this rank does not belong to; pass the group that "
                "this rank shares its sequence with"
            )
        self.size = 1 if group is None else dist.get_world_size(group)
        self._group = None if group is None else ref(group)
        self._home = self._group if home is None else ref(home)
        config = "" if group is None else str(dist.get_backend_config(group))
        self._speaks_gloo = "cpu:gloo" in config
        # This rank's tokens of the last batch where they are not side by side (`gather_sequence`).
        self.scattered: int | None = None

    @property
    def group(self) -> ProcessGroup | None:
        """The process group; None for a process alone.

        Raises:
            RuntimeError: the group has ended.
        """
        return _alive(self._group)

    @property
    def home(self) -> ProcessGroup | None:
        """The process group of what goes home; likewise."""
        return _alive(self._home)

    @classmethod
    def world(cls) -> Channel:
        """All ranks of the job; this process alone when ``torch.distributed`` does not run."""
        return cls(dist.group.WORLD if is_initialized() else None)

    def job_store(self, prefix: str) -> tuple[Any, Any] | None:
        """A connection of our own to the job's key-value store, and the job's own, which serves.

        None for a process alone, and where there is no second connection.
        """
        with suppress(RuntimeError):
            store: Any = dist.distributed_c10d._get_default_store() if self.size > 1 else None
            return None if store is None else (dist.PrefixStore(prefix, store.clone()), store)
        return None

    # ---- control plane

    def agree(self, record: dict[str, Any], error: Exception | None = None) -> list[dict[str, Any]]:
        """Exchange one small JSON record between all ranks of the group, on the CPU.

        Args:
            record: what this rank has to say; must be JSON.
            error: what this rank found wrong. Then every rank raises, and none is left waiting.

        Returns:
            The records by rank.

        Raises:
            ValueError: a rank passed an error (also for its subclasses).
            NotImplementedError, RuntimeError: likewise; the error names its rank.

        Collectives: one all-gather of 2 KiB a rank on the control group; a second one when a
        record is longer.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [record]
        return agreement.decode(self._exchange(agreement.encode(record, error)), error)

    def agree_on(self, record: dict[str, Any], *, what: str) -> None:
        """Check a record that must be the same on every rank.

        Raises:
            ValueError: on all ranks, naming the key, the values and who has which.
        """
        records = self.agree(record)
        keys = dict.fromkeys(key for each in records for key in each)
        agreement.require_same(records, keys, what=what)

    def _exchange(self, message: bytes) -> list[bytes]:
        capacity, needed = 0, agreement.RECORD_BYTES
        while needed > capacity:
            capacity = needed
            messages, needed = self._exchange_once(agreement.framed(message, capacity))
        return messages

    def _exchange_once(self, frame: bytearray) -> tuple[list[bytes], int]:
        mine = torch.frombuffer(frame, dtype=torch.uint8)
        everyone = torch.empty(self.size * len(mine), dtype=torch.uint8, device="cpu")
        with blocking("agreement"):
            dist.all_to_all_single(everyone, mine.repeat(self.size), group=self._control())
        count_control((self.size - 1) * len(mine))
        return agreement.unframed([bytes(row) for row in everyone.view(self.size, -1).numpy()])

    def _control(self) -> ProcessGroup:
        group, made = self.group, Channel._control_groups
        assert group is not None
        if self._speaks_gloo:
            return group
        if group not in made:
            gloo = {"timeout": _timeout(group), "backend": "gloo"}
            made[group] = new_group_of(ranks_of(group), within=group, purpose="control", **gloo)
        return made[group]

    # ---- data plane

    def gather_rows(
        self, mine: Bundle, dims: Sequence[int], lengths: Sequence[int]
    ) -> Pending[Bundle]:
        """All-gather tensors that have rows in common, as one message.

        Args:
            mine: this rank's tensors, on one device.
            dims: which dimension of each has the rows.
            lengths: rows of every rank; other dimensions are the same on all.

        Returns:
            A `Pending` of the same tensors with the rows of all ranks, in the order of ranks; on
            an accelerator rows that kernels can read there stay where they arrived.

        Bytes sent: ``(n - 1)`` times this rank's rows; see `_gather`.
        """
        if self.size == 1:
            return Pending(None, (), lambda: mine)
        specs = [Spec.of(tensor) for tensor in mine]
        packed = pack_rows(mine, dims)
        row = packed.shape[1]

        def finish(arrived: Tensor) -> Bundle:
            rows = unpack_rows(arrived.view(sum(lengths), row), specs, dims)
            return [readable(tensor) for tensor in rows]

        return self._gather(packed.view(-1), [length * row for length in lengths]).then(finish)

    def exchange_rows(
        self, tensors: Bundle | Unwritten, dims: Sequence[int], lengths: Sequence[int]
    ) -> Pending[Bundle]:
        """Send every rank its rows of tensors that have rows in common, as one message each.

        Args:
            tensors: with the rows of all ranks, in the order of ranks, on one device; or unwritten.
            dims: which dimension of each has the rows.
            lengths: rows of every rank.

        Returns:
            A `Pending` of the same tensors with this rank's rows only, those that each rank had:
            ``[n, ...]``, by sender.

        Bytes sent: the rows of others.
        """
        specs = specs_of(tensors)
        packed = pack_rows(tensors, dims)
        row, own = packed.shape[1], lengths[self.rank]
        if self.size == 1:
            return Pending(None, (), lambda: unpack_rows(packed.unsqueeze(0), specs, dims))
        arrived, flat = packed.new_empty(self.size, own, row), packed.view(-1)
        sizes = [own * row] * self.size, [length * row for length in lengths]
        count("all_to_all", flat.numel() - own * row)
        work = dist.all_to_all_single(
            arrived.view(-1), flat, *sizes, group=self.home, async_op=True
        )
        return Pending("all_to_all", [work], lambda: unpack_rows(arrived, specs, dims), keep=packed)

    def shift(self, mine: Bundle, specs: Sequence[Spec], *, hops: int = 1) -> Pending[Bundle]:
        """Send a bundle ``hops`` ranks ahead on the ring and receive one from as far behind.

        Args:
            mine: this rank's tensors. Sent from where they lie when they are contiguous.
            specs: the specs of what rank ``rank - hops`` sends.
            hops: distance on the ring, not a multiple of its size; negative is backwards, home.

        Returns:
            A `Pending` of the bundle that arrives.

        Bytes sent: those of ``mine``.
        """
        group = self.group if hops > 0 else self.home
        assert group is not None
        arrived = [spec.empty(mine[0].device) for spec in specs]
        sent, landing = [or_a_byte(t.contiguous()) for t in mine], [or_a_byte(t) for t in arrived]
        receiver, sender = (self.rank + hops) % self.size, (self.rank - hops) % self.size
        count("send_recv", sum(tensor.nbytes for tensor in sent))
        works = _swap(sent, landing, receiver, sender, group=group)
        return Pending("send_recv", works, lambda: arrived, keep=(sent, landing))

    def copies_of_shared(self, device: torch.device) -> int:
        """Rows of what `share` sends: on a CPU one for every rank (see `_gather`)."""
        return self.size if device.type == "cpu" else 1

    def share(self, sent: Tensor, arrived: Tensor) -> None:
        """All-gather a message between buffers that their owner keeps, and wait for it.

        Args:
            sent: ``[copies, bytes]``, this rank's message, as often as `copies_of_shared` says.
            arrived: ``[n, bytes]``, for those of all ranks.
        """
        collective = dist.all_to_all_single if sent.shape[0] == self.size else _all_gather
        with blocking("all_gather"):
            collective(arrived, sent, group=self.group)
        count("all_gather", (self.size - 1) * sent[0].nbytes)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the group, in its own dtype; ``tensor`` is left as it is.

        Bytes sent: ``2 (n - 1) / n`` of the tensor.
        """
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with blocking("all_reduce"):
                dist.all_reduce(total, group=self.group)
            count("all_reduce", 2 * (self.size - 1) * total.nbytes // self.size)
        return total

    def barrier(self) -> None:
        """Wait on the CPU until every rank of the group is here."""
        self.agree({})

    def _gather(self, mine: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        """All-gather bytes: those of all ranks, one after the other.

        On an accelerator messages that hardly differ are as long as the longest, which NCCL's own
        all-gather wants: between nodes it sends each of them once, and not once to every rank.

        Args:
            mine: uint8 ``[bytes]``.
            sizes: bytes of every rank.
        """
        if go_alike(mine, sizes):
            each = max(sizes)
            sent, arrived = lengthened(mine, each), mine.new_empty(self.size * each)
            work = _all_gather(arrived, sent, group=self.group, async_op=True)
        else:
            # Each rank writes to each other: for unequal shards, and because gloo's all-gather goes
            # round a ring, which takes three times as long for messages of some kilobytes.
            each, sent = len(mine), mine.repeat(self.size)
            arrived, own = mine.new_empty(sum(sizes)), [each] * self.size
            work = dist.all_to_all_single(
                arrived, sent, list(sizes), own, group=self.group, async_op=True
            )
        count("all_gather", each * (self.size - 1))
        return Pending("all_gather", [work], lambda: closed_up(arrived, sizes), keep=sent)


def _alive(group: ref[ProcessGroup] | None) -> ProcessGroup | None:
    found = None if group is None else group()
    if group is not None and found is None:
        raise RuntimeError(
            "got a process group that has ended; make a new one, and call ds_lvx.shutdown or close "
            "the groups only after the last use"
        )
    return found


def _swap(
    sent: Bundle, landing: Bundle, receiver: int, sender: int, *, group: ProcessGroup
) -> Sequence[Any]:
    """Send tensors to one rank of the group and receive from another; the handles.

    gloo tells the sender that it may begin on the connection that the answer takes: behind what
    this rank sends, two neighbours would send one after the other. Hence receiving comes first.
    """
    if sent[0].device.type == "cpu":  # gloo has no batches, and the checks of one take its time
        works = [group.recv([tensor], sender, 0) for tensor in landing]
        return works + [group.send([tensor], receiver, 0) for tensor in sent]
    operations = [dist.P2POp(dist.irecv, t, group=group, group_peer=sender) for t in landing]
    operations += [dist.P2POp(dist.isend, t, group=group, group_peer=receiver) for t in sent]
    return dist.batch_isend_irecv(operations)


def is_initialized() -> bool:
    """Whether ``torch.distributed`` runs in this process."""
    return dist.is_available() and dist.is_initialized()


def new_groups(ranks_by_group: Sequence[Sequence[int]]) -> ProcessGroup:
    """Make process groups on every rank of the world; return the one that this rank is in.

    On NCCL their streams have priority: a transfer waits for no kernel that runs beside it.
    """
    mine = None
    for ranks in ranks_by_group:
        group = dist.new_group(list(ranks), **_options())
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None, "the groups must cover the world"
    return mine


def runs_nccl() -> bool:
    """Whether the ranks of the world talk over NCCL."""
    return "nccl" in str(dist.get_backend_config(dist.group.WORLD))


def _options() -> dict[str, Any]:
    timeout = _timeout(dist.group.WORLD)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if runs_nccl() else None
    if options is not None and timeout is not None:
        options._timeout = timeout  # torch warns where it is another one
    return {"timeout": timeout, "pg_options": options}


def new_group_of(
    ranks: Sequence[int], *, within: ProcessGroup, purpose: str, **options: Any
) -> ProcessGroup:
    """A process group of some ranks, this one among them; no other takes part.

    Args:
        ranks: of the world.
        within: a group of which they all are members, whose name it takes.
        purpose: what distinguishes it from others of the same ranks within that group.
        options: of torch's ``new_group``; those of `new_groups` where there are none.
    """
    settings = options or _options()
    with named(dist.distributed_c10d, f"{within.group_name}, {purpose} {list(ranks)}"):
        return dist.new_group(list(ranks), use_local_synchronization=True, **settings)


def ranks_of(group: ProcessGroup) -> list[int]:
    """The members of a group, by their ranks in the world."""
    return dist.get_process_group_ranks(group)


def _timeout(group: ProcessGroup | None) -> timedelta | None:
    """How long the group waits for a rank; a new group would get torch's 30 minutes instead."""
    assert group is not None
    options = getattr(group._get_backend(group._device_types[-1]), "options", None)
    return getattr(options, "_timeout", None)


def destroy_group(group: ProcessGroup | None) -> None:
    """End a process group and its control plane, unless ``torch.distributed`` has ended already."""
    control = None if group is None else Channel._control_groups.pop(group, None)
    if is_initialized():
        for ended in (control, group):
            if ended is not None:
                dist.destroy_process_group(ended)


def destroy_all() -> None:
    """End ``torch.distributed`` in this process."""
    if is_initialized():
        dist.destroy_process_group()
