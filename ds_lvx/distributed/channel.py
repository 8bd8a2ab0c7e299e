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
    bundle_nbytes,
    pack,
    pack_rows,
    readable,
    specs_of,
    unpack,
    unpack_each,
    unpack_rows,
)
from ds_lvx.distributed.pending import Pending, blocking
from ds_lvx.distributed.traffic import count, count_control

ProcessGroup: TypeAlias = dist.ProcessGroup

_RECORD_BYTES = 2048
# torch 2.13 gave the collective a new name and warns at the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# --------------------------------------------------------------------------------------------
# The channel


class Channel:
    """One group of ranks: its data plane, its control plane, and this rank's place in it.

    It refers to its group weakly: an autograd graph or a `SequenceParallelGroups` that a script
    still holds at its end must not keep the group's threads alive (see `ds_lvx.shutdown`).

    Args:
        group: a process group of which this rank is a member; ``None`` is a group of this
            process alone, which communicates with nobody.
    """

    # One gloo group for every accelerator group that asked for a control plane.
    _control_groups: ClassVar[WeakKeyDictionary[ProcessGroup, ProcessGroup]] = WeakKeyDictionary()

    def __init__(self, group: ProcessGroup | None) -> None:
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                "got a process group that this rank does not belong to; pass the group that "
                "this rank shares its sequence with"
            )
        self.size = 1 if group is None else dist.get_world_size(group)
        self._group = None if group is None else ref(group)

    @property
    def group(self) -> ProcessGroup | None:
        """The process group; None for a process alone.

        Raises:
            RuntimeError: the group has ended.
        """
        if self._group is None:
            return None
        group = self._group()
        if group is None:
            raise RuntimeError(
                "got a process group that has ended; make a new one, and call ds_lvx.shutdown or "
                "close the groups only after the last use"
            )
        return group

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
        agreement.require_same(self.agree(record), record.keys(), what=what)

    def _exchange(self, payload: bytes) -> list[bytes]:
        capacity = _RECORD_BYTES
        while True:
            texts, longest = self._exchange_once(payload, capacity)
            if longest + 8 <= capacity:
                return texts
            capacity = longest + 8

    def _exchange_once(self, payload: bytes, capacity: int) -> tuple[list[bytes], int]:
        framed = len(payload).to_bytes(8, "little") + payload[: capacity - 8]
        mine = torch.frombuffer(bytearray(framed.ljust(capacity, b"\0")), dtype=torch.uint8)
        everyone = torch.empty(self.size * capacity, dtype=torch.uint8)
        with blocking("agreement"):
            dist.all_to_all_single(everyone, mine.repeat(self.size), group=self._control())
        count_control((self.size - 1) * capacity)
        rows = [bytes(row) for row in everyone.view(self.size, capacity).numpy()]
        lengths = [int.from_bytes(row[:8], "little") for row in rows]
        texts = [row[8 : 8 + length] for row, length in zip(rows, lengths, strict=True)]
        return texts, max(lengths)

    def _control(self) -> ProcessGroup:
        assert self.group is not None
        config = str(dist.get_backend_config(self.group))
        if "cpu:gloo" in config:
            return self.group
        if self.group not in Channel._control_groups:
            ranks = dist.get_process_group_ranks(self.group)
            Channel._control_groups[self.group] = dist.new_group(
                ranks,
                timeout=_timeout(self.group),
                backend="gloo",
                use_local_synchronization=True,
            )
        return Channel._control_groups[self.group]

    # ---- data plane

    def gather(self, mine: Bundle, specs: Sequence[Sequence[Spec]]) -> Pending[list[Bundle]]:
        """All-gather one bundle of tensors a rank, of any lengths, as one message.

        Args:
            mine: this rank's tensors, on one device.
            specs: the specs of every rank's bundle, by rank.

        Returns:
            A `Pending` of every rank's bundle, by rank.

        Bytes sent: ``(n - 1)`` times this rank's bundle.
        """
        if self.size == 1:
            return Pending(None, (), lambda: [mine])
        buffer = pack(mine)
        sizes = [bundle_nbytes(theirs) for theirs in specs]
        arrived = torch.empty(sum(sizes), dtype=torch.uint8, device=buffer.device)
        count("all_gather", (self.size - 1) * buffer.numel())
        work, keep = self._start_gather(arrived, buffer, sizes)
        return Pending("all_gather", [work], lambda: unpack_each(arrived, sizes, specs), keep=keep)

    def exchange(
        self, bundles: Sequence[Bundle], specs: Sequence[Sequence[Spec]]
    ) -> Pending[list[Bundle]]:
        """Send each rank its own bundle, and receive one from each, as one message each.

        Args:
            bundles: what goes to rank 0, 1, ...; this rank's own is handed through untouched.
            specs: the specs of what arrives from rank 0, 1, ...

        Returns:
            A `Pending` of the bundles that arrived, by sender.

        Bytes sent: those of the bundles for other ranks.
        """
        if self.size == 1:
            return Pending(None, (), lambda: list(bundles))
        own = bundles[self.rank]
        others = [pack(b) for rank, b in enumerate(bundles) if rank != self.rank]
        buffer = torch.cat(others)
        in_sizes = [0 if r == self.rank else bundle_nbytes(s) for r, s in enumerate(specs)]
        out_sizes = [piece.numel() for piece in others]
        out_sizes.insert(self.rank, 0)
        arrived = torch.empty(sum(in_sizes), dtype=torch.uint8, device=buffer.device)
        count("all_to_all", buffer.numel())
        work = self._all_to_all(arrived, buffer, in_sizes, out_sizes)

        def finish() -> list[Bundle]:
            pieces = arrived.split(in_sizes)
            return [
                own if rank == self.rank else unpack(pieces[rank], specs[rank])
                for rank in range(self.size)
            ]

        return Pending("all_to_all", [work], finish, keep=buffer)

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

        Bytes sent: ``(n - 1)`` times this rank's rows.
        """
        if self.size == 1:
            return Pending(None, (), lambda: mine)
        specs = [Spec.of(tensor) for tensor in mine]
        packed = pack_rows(mine, dims)
        row = packed.shape[1]
        arrived = packed.new_empty(sum(lengths), row)
        flat, sizes = packed.view(-1), [length * row for length in lengths]
        count("all_gather", (self.size - 1) * flat.numel())
        work, keep = self._start_gather(arrived.view(-1), flat, sizes)

        def finish() -> Bundle:
            return [readable(tensor) for tensor in unpack_rows(arrived, specs, dims)]

        return Pending("all_gather", [work], finish, keep=keep)

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
        arrived = packed.new_empty(self.size, own, row)
        in_sizes, out_sizes = [own * row] * self.size, [length * row for length in lengths]
        flat = packed.view(-1)
        count("all_to_all", flat.numel() - own * row)
        work = self._all_to_all(arrived.view(-1), flat, in_sizes, out_sizes)
        return Pending("all_to_all", [work], lambda: unpack_rows(arrived, specs, dims), keep=packed)

    def shift(self, mine: Bundle, specs: Sequence[Spec], *, hops: int = 1) -> Pending[Bundle]:
        """Send a bundle ``hops`` ranks ahead on the ring and receive one from as far behind.

        Args:
            mine: this rank's tensors. Sent from where they lie when they are contiguous.
            specs: the specs of what rank ``rank - hops`` sends.
            hops: distance on the ring, not a multiple of its size; negative is backwards.

        Returns:
            A `Pending` of the bundle that arrives.

        Bytes sent: those of ``mine``.
        """
        assert self.group is not None
        arrived = [spec.empty(mine[0].device) for spec in specs]
        # NCCL wants every rank in its first exchange: where there is nothing, one byte goes.
        nothing = torch.empty(1, dtype=torch.uint8, device=mine[0].device)
        sent = [tensor.contiguous() if tensor.numel() else nothing for tensor in mine]
        landing = [tensor if tensor.numel() else torch.empty_like(nothing) for tensor in arrived]
        receiver = dist.get_global_rank(self.group, (self.rank + hops) % self.size)
        sender = dist.get_global_rank(self.group, (self.rank - hops) % self.size)
        # gloo tells the sender that it may begin on the connection that the answer takes: behind
        # what this rank sends, two neighbours would send one after the other.
        operations = [dist.P2POp(dist.irecv, tensor, sender, self.group) for tensor in landing]
        operations += [dist.P2POp(dist.isend, tensor, receiver, self.group) for tensor in sent]
        count("send_recv", sum(tensor.nbytes for tensor in sent))
        works = dist.batch_isend_irecv(operations)
        return Pending("send_recv", works, lambda: arrived, keep=(sent, landing))

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

    def _start_gather(
        self, arrived: Tensor, mine: Tensor, sizes: Sequence[int]
    ) -> tuple[Any, Tensor]:
        """Begin an all-gather of bytes; the handle, and the buffer that must outlive it."""
        if min(sizes) == max(sizes) and mine.device.type != "cpu":
            return _all_gather(arrived, mine, group=self.group, async_op=True), mine
        # Each rank writes to each other: for unequal shards, and because gloo's all-gather goes
        # round a ring, which takes three times as long for messages of some kilobytes.
        copies = mine.repeat(self.size)
        own = [sizes[self.rank]] * self.size
        return self._all_to_all(arrived, copies, list(sizes), own), copies

    def _all_to_all(
        self, arrived: Tensor, sent: Tensor, in_sizes: list[int], out_sizes: list[int]
    ) -> Any:
        return dist.all_to_all_single(
            arrived, sent, in_sizes, out_sizes, group=self.group, async_op=True
        )


# --------------------------------------------------------------------------------------------
# Groups


def is_initialized() -> bool:
    """Whether ``torch.distributed`` runs in this process."""
    return dist.is_available() and dist.is_initialized()


def new_groups(ranks_by_group: Sequence[Sequence[int]]) -> ProcessGroup:
    """Make process groups on every rank of the world; return the one that this rank is in."""
    mine = None
    for ranks in ranks_by_group:
        group = dist.new_group(list(ranks), timeout=_timeout(dist.group.WORLD))
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None, "the groups must cover the world"
    return mine


def new_group_alone() -> ProcessGroup:
    """A process group of this rank alone; no other rank has to take part."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _timeout(group: ProcessGroup | None) -> timedelta | None:
    """How long the group waits for a rank; a new group would get torch's 30 minutes instead."""
    assert group is not None
    options = getattr(group._get_backend(group._device_types[-1]), "options", None)
    return getattr(options, "_timeout", None)


def destroy_group(group: ProcessGroup) -> None:
    """End a process group and its control plane, unless ``torch.distributed`` has ended already."""
    control = Channel._control_groups.pop(group, None)
    if is_initialized():
        for ended in (control, group):
            if ended is not None:
                dist.destroy_process_group(ended)


def destroy_all() -> None:
    """End ``torch.distributed`` in this process."""
    if is_initialized():
        dist.destroy_process_group()
