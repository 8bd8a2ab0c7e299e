"""A rank that runs out of memory says so by name, with the size it asked for, to all ranks.

The other ranks learn of it when their communication with it fails. On gloo, and in every agreement
on the control plane, that is as soon as its groups or its process end. A rank in an NCCL collective
waits on the device, and one in DeepSpeed's shared-memory collective spins: nothing here reaches
them. The launcher ends them on the same node, within seconds; on others NCCL's watchdog does, at
the latest after the group's time-out.

A process that the operating system's out-of-memory killer ends (exit code -9) says nothing at all.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.notes import Mailbox, PeerError, explain
from ds_lvx.distributed.shutdown import remember

_GIB = 2**30
# How messages begin that are of no class of their own. An error that all ranks agreed on begins
# with the rank that it is from, which need not be this one.
_ON_HOST = re.compile(
    r"\[enforce fail at [^\]]*\].*DefaultCPUAllocator: "
    r"|std::bad_alloc"
    r"|unable to (mmap|allocate shared memory).*Cannot allocate memory",
    re.DOTALL,
)
_ON_DEVICE = re.compile(
    r"(CUDA|HIP)( driver)? error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)"
    r"|cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
)
_SIZE = re.compile(r"(?:allocate|mmap) (?:more than )?(\d[\d.]*) ?(bytes|[KMGTPE]i?B)")
_UNITS = "KMGTPE"
_FOR_ACTIVATIONS = (
    'keep less for backward ("recompute_kv": true, an "activation_checkpointing" section), '
    'attend in pieces ("kv_chunk_tokens"), keep the features on the host ("features": "offload"), '
    "take more ranks for a sample (sequence_parallel_size) or fewer frames; docs/memory.md says "
    "what each of them saves"
)
_FOR_ONE = (
    "one image or frame is never split, so that neither more ranks nor fewer frames make it "
    "smaller: take fewer pixels or tiles for each (the processor's sizes, --max_pixels), train "
    "less of the tower (--freeze_vision), or "
)
_FOR_STATES = (
    "take a higher ZeRO stage, more ranks, ZeRO's offload (offload_optimizer, offload_param) or "
    "LoRA; docs/memory.md says what each of them saves"
)
_FOR_KEYS = (
    "take more ranks for a sample (sequence_parallel_size), fewer frames, or fewer beams and "
    "returned sequences, for each of which the text has a cache; docs/generation.md says what a "
    "rank keeps"
)
_ADVICE = {
    "step": _FOR_STATES,
    "deepspeed.initialize": _FOR_STATES,
    "ds_lvx.generate": _FOR_KEYS,
}


class RankOutOfMemoryError(torch.OutOfMemoryError):
    """This rank ran out of memory, on whichever device; the message says where, how much and when.

    It is a ``torch.OutOfMemoryError``, so that code which catches that on a GPU catches this too,
    and on a CPU as well. The original error is its cause.
    """


def open_mailbox(world: Channel) -> Mailbox:
    """A mailbox of this rank, for notes that no other one reads.

    Args:
        world: the channel of all ranks.

    Collectives: one agreement.
    """
    # A store may serve several jobs, or one that starts anew.
    (word, *_) = [record["word"] for record in world.agree({"word": secrets.token_hex(8)})]
    store = world.job_store(f"ds_lvx/notes/{word}")
    return Mailbox(store, rank=world.rank, size=world.size)


class Guard:
    """Turns running out of memory in an engine's calls into a `RankOutOfMemoryError`.

    Args:
        groups: of the engine.

    Collectives: one agreement over all ranks.
    """

    def __init__(self, groups: SequenceParallelGroups) -> None:
        self._groups = groups
        self._mailbox = open_mailbox(groups.world_channel)
        self._engine: Any = None
        self._units: int | None = None
        self._watched: dict[str, Callable[..., Any]] = {}

    def watch(self, engine: Any) -> None:
        """Watch forward, backward and step of this instance until `close`."""
        self._engine = engine
        remember(engine)
        for name in ("forward", "backward", "step"):
            self._watched[name] = self._watching(name, getattr(engine, name))
            setattr(engine, name, self._watched[name])

    def close(self) -> None:
        """Give the engine its methods back. Calling it twice is allowed."""
        for name, method in self._watched.items():
            # Whoever has patched the engine since keeps his place.
            if self._engine.__dict__.get(name) is method:
                delattr(self._engine, name)
        self._engine, self._watched = None, {}
        self._mailbox.close()

    @contextmanager
    def named(self, doing: str) -> Iterator[None]:
        """As `named`, for the ranks of these groups, and what this rank holds of a batch."""
        units = self._units if doing in ("forward", "backward") else None
        with named(doing, self._groups, units=units):
            yield
        if self._mailbox.has_sent:
            # Somebody caught the error and went on: it explains nothing that comes later.
            self._mailbox.send("")

    def _watching(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if name == "forward":
                self._units = getattr(kwargs.get("ds_lvx"), "units", None)
            with self.named(name):
                return method(*args, **kwargs)

        return watched


@contextmanager
def named(
    doing: str, groups: SequenceParallelGroups | None = None, *, units: int | None = None
) -> Iterator[None]:
    """Name this rank in the error when it runs out of memory in here, and tell all other ranks.

    Args:
        doing: what runs here, for the message.
        groups: to name the rank in; None is the current ones.
        units: images or frames that this rank holds; of one alone the error says that it is whole.

    Raises:
        RankOutOfMemoryError: in the place of what torch, the allocator or Python raised.
        PeerError: in the place of a RuntimeError, where another rank's note explains it.

    Every other error passes through as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RankOutOfMemoryError | PeerError):
            raise
        cause = _out_of_memory(error)
        if cause is None:
            why = explain(error)
            if why is None:
                raise
            raise why from error
        what = _describe(cause, doing, groups)
        if units == 1:
            what = f"{what}, and holds one image or frame, which is not split"
        mailbox = Mailbox.current()
        if mailbox is not None:
            mailbox.send(what)
        advice = _ADVICE.get(doing, _FOR_ACTIVATIONS)
        advice = f"{_FOR_ONE}{advice}" if units == 1 else advice
        raise RankOutOfMemoryError(f"{what}; {advice}") from error


def _out_of_memory(error: BaseException) -> BaseException | None:
    """The error, or the one that it was raised from, that is about memory of this process."""
    found: BaseException | None = error
    while found is not None and not (_is_on_host(found) or _is_on_device(found)):
        found = found.__cause__
    return found


def _is_on_host(error: BaseException) -> bool:
    by_message = isinstance(error, RuntimeError) and _ON_HOST.match(str(error)) is not None
    return isinstance(error, MemoryError) or by_message


def _is_on_device(error: BaseException) -> bool:
    by_message = isinstance(error, RuntimeError) and _ON_DEVICE.match(str(error)) is not None
    return isinstance(error, torch.OutOfMemoryError) or by_message


def _describe(error: BaseException, doing: str, groups: SequenceParallelGroups | None) -> str:
    groups = SequenceParallelGroups.current() if groups is None else groups
    place = f"host {socket.gethostname()}"
    if groups is not None:
        place = f"rank {groups.sp_rank} of the {groups.sp_size} that share a sample, {place}"
    return (
        f"rank {Channel.world().rank} ({place}) ran out of memory in {doing}: "
        f"asked for {_requested(str(error))} on {_device(on_host=_is_on_host(error))}"
    )


def _requested(message: str) -> str:
    """The size that an allocator's message gives."""
    found = _SIZE.search(message)
    if found is None:
        return "a size that its error does not give"
    number, unit = found.groups()
    if unit == "bytes":
        return f"{int(number) / _GIB:,.2f} GiB ({int(number):,} bytes)"
    # In other units it comes rounded.
    nbytes = float(number) * 1024 ** (_UNITS.index(unit[0]) + 1)
    return f"{nbytes / _GIB:,.2f} GiB (about {nbytes:,.0f} bytes)"


def _device(*, on_host: bool) -> str:
    """The device that has no more, and what is in use there."""
    accelerator = get_accelerator()
    if on_host or accelerator.device_name() == "cpu":
        page = os.sysconf("SC_PAGE_SIZE")
        used = int(Path("/proc/self/statm").read_text().split()[1]) * page
        total = os.sysconf("SC_PHYS_PAGES") * page
        return f"cpu, where this process holds {used / _GIB:,.2f} of {total / _GIB:,.2f} GiB"
    used, cached = accelerator.memory_allocated(), accelerator.memory_reserved()
    return (
        f"{accelerator.current_device_name()}, where {used / _GIB:,.2f} of "
        f"{accelerator.total_memory() / _GIB:,.2f} GiB are allocated (with the allocator's cache "
        f"{cached / _GIB:,.2f} GiB)"
    )
