"""Where the time of a training step goes: cross-attention, text, vision, communication, the rest.

At every moment a rank is in one phase (forward, backward, optimizer) and in one part of the model.
`Parts` follows it: by hooks on modules in forward, and in backward by hooks on the tensors between
the parts, because autograd runs the operations of a part together (later ones first). A moment is
noted at each change; of the time between two changes, what the rank waits for transfers is exposed
communication, and the remainder belongs to the part. So the parts add up to the step.

A checkpointed layer that runs again in backward is told by its modules' hooks, which run again too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.autograd import Variable

from ds_lvx.compare.case import Regions, part_of
from ds_lvx.distributed.pending import Clock, Observer, Transfer, watching

PHASES = ("forward", "backward", "optimizer")
PARTS = ("vision", "text", "cross_attention", "rest")
ZERO = "zero "
_COLLECTIVES = ("all_", "reduce", "broadcast", "inference_all_reduce", "barrier")
"""How the names of the backend's collectives begin."""
EXPOSED = tuple(f"exposed_{where}" for where in ("cross_attention", "text", "zero", "rest"))
COLUMNS = (*PARTS, *EXPOSED)
"""Parts of a phase: computing in a part of the model; waiting in one, or for ZeRO's transfers."""


@dataclass
class Breakdown:
    """One step of one rank, in seconds."""

    # Phase -> `COLUMNS` -> seconds; they add up to the step.
    parts_s: dict[str, dict[str, float]] = field(default_factory=dict)
    # Phase -> seconds in which a transfer was under way while the rank did something else. A
    # transfer counts from its start until its result has arrived and been asked for, so this is the
    # most that it can have hidden.
    hidden_s: dict[str, float] = field(default_factory=dict)


class Marks:
    """The moments of one step, by number: events on CUDA's current stream, else a clock's readings.

    On CUDA the host is far ahead of the device, so its own clock would tell nothing.
    """

    def __init__(self) -> None:
        self._on_cuda = get_accelerator().device_name() == "cuda"
        self._moments: list[Any] = []

    def mark(self) -> int:
        """Note this moment; returns its number, from 0."""
        if self._on_cuda:
            self._moments.append(torch.cuda.Event(enable_timing=True))
            self._moments[-1].record()
        else:
            self._moments.append(time.perf_counter())
        return len(self._moments) - 1

    def read(self) -> list[float]:
        """Seconds of every moment since moment 0, by number; the step is over."""
        first = self._moments[0]
        if not self._on_cuda:
            return [moment - first for moment in self._moments]
        torch.cuda.synchronize()
        return [first.elapsed_time(event) / 1e3 for event in self._moments]


class Parts:
    """Follows which part of a model computes; one step at a time, inside `recording`.

    The model has hooks until `remove`. A module in none of ``regions`` belongs to its nearest
    ancestor in one, and to ``"rest"`` where there is none.

    Raises:
        ValueError: the model has none of these modules.
    """

    def __init__(
        self, model: nn.Module, regions: Regions, *, marks: Callable[[], Any] = Marks
    ) -> None:
        self._new_marks = marks
        self._marks: Any = None
        self._changes: list[tuple[int, str, str]] = []
        self._phase = self._part = ""
        self._outer: list[str] = []
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if any(re.fullmatch(pattern, name) for pattern in regions):
                around = part_of(name.rpartition(".")[0], regions)
                self._follow(module, str(part_of(name, regions)), around=around or "rest")
        if not self._handles:
            raise ValueError(
                f"got a {type(model).__name__} without a module named like {list(regions)}; pass "
                "regions with the names of its vision, text and cross-attention modules"
            )

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def recording(self) -> Iterator[Breakdown]:
        """Record the step that runs inside; the `Breakdown` is filled in at the end."""
        result = Breakdown()
        transfers: list[Transfer] = []
        changes = self._changes = []
        self._outer, self._phase, self._part = [], "", ""
        marks = self._marks = self._new_marks()
        watch: dict[str, Any] = {"observer": transfers.append, "clock": marks.mark}
        try:
            with watching(**watch), zero_watched(**watch):
                self._change(PHASES[0], "rest")
                yield result
                end = marks.mark()
        finally:
            self._marks = None
        times = marks.read()
        moments = [(times[mark], phase, part) for mark, phase, part in changes]
        seconds = [
            Transfer(
                t.collective, *(times[int(mark)] for mark in (t.started_s, t.waited_s, t.done_s))
            )
            for t in transfers
        ]
        filled = broken_down(moments, times[end], seconds)
        result.parts_s, result.hidden_s = filled.parts_s, filled.hidden_s

    def enter(self, phase: str) -> None:
        """The step goes on to another of `PHASES`."""
        self._change(phase, "rest")

    # ---- hooks

    def _follow(self, module: nn.Module, part: str, *, around: str) -> None:
        begin, end = partial(self._begin, part, around), partial(self._end, part)
        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        # Also when a recomputation ends in the middle of a module, by an exception of its own.
        self._handles.append(module.register_forward_hook(end, always_call=True))

    def _begin(self, part: str, around: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._marks is None:
            return
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("inputs_embeds"))
        self._in_backward(given, around)
        self._outer.append(self._part)
        self._change(self._phase, part)

    def _end(self, part: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._marks is None:
            return
        if isinstance(output, Mapping):
            output = list(output.values())
        if isinstance(output, Sequence) and output:
            output = output[0]
        self._in_backward(output, part)
        self._change(self._phase, self._outer.pop())

    def _in_backward(self, tensor: Any, part: str) -> None:
        """When backward gets to what made this tensor, that is of ``part``: the first to say so."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or tensor.is_leaf:
            return
        if not hasattr(tensor, "_ds_lvx_part"):
            tensor._ds_lvx_part = part  # type: ignore[attr-defined]
            tensor.register_hook(partial(self._arrived, part))

    def _arrived(self, part: str, gradient: Tensor) -> None:
        if self._marks is None:
            return
        if self._part == "rest":
            # What follows autograd (ZeRO's last bucket) is no part of the model's last layer.
            Variable._execution_engine.queue_callback(partial(self._change, "backward", "rest"))
        self._change(self._phase, part)

    def _change(self, phase: str, part: str) -> None:
        if self._marks is not None and (phase, part) != (self._phase, self._part):
            self._phase, self._part = phase, part
            self._changes.append((self._marks.mark(), phase, part))


def broken_down(
    changes: Sequence[tuple[float, str, str]], end: float, transfers: Sequence[Transfer]
) -> Breakdown:
    """The parts of a step, from when it went on to which phase and part, in order, and its end.

    Where a transfer is waited for inside another, the outer one counts.
    """
    result = Breakdown(
        parts_s={phase: dict.fromkeys(COLUMNS, 0.0) for phase in PHASES},
        hidden_s=dict.fromkeys(PHASES, 0.0),
    )
    starts = [start for start, _, _ in changes]
    moments = [moment for t in transfers for moment in (t.started_s, t.waited_s, t.done_s)]
    edges = np.unique(np.clip([*starts, *moments, end], starts[0], end))
    places = np.searchsorted(starts, edges[:-1], side="right") - 1
    waits = [""] * len(places)  # whose: between each edge and the next
    under_way = np.zeros(len(places), dtype=bool)
    for transfer in sorted(transfers, key=lambda t: (t.waited_s, -t.done_s)):
        started, waited, done = np.searchsorted(
            edges, (transfer.started_s, transfer.waited_s, transfer.done_s)
        )
        for span in range(waited, done):
            waits[span] = waits[span] or transfer.collective
        if transfer.hidden_s > 0:
            under_way[started:done] = True
    for place, seconds, wait, hides in zip(places, np.diff(edges), waits, under_way, strict=True):
        _, phase, part = changes[place]
        result.parts_s[phase][_column(part, wait)] += float(seconds)
        if hides and not wait:
            result.hidden_s[phase] += float(seconds)
    return result


def _column(part: str, wait: str) -> str:
    if not wait:
        return part
    column = "exposed_zero" if wait.startswith(ZERO) else f"exposed_{part}"
    return column if column in EXPOSED else "exposed_rest"


# ---- the transfers of DeepSpeed itself: ZeRO's gradients and parameters


@contextmanager
def zero_watched(observer: Observer, *, clock: Clock) -> Iterator[None]:
    """Call ``observer`` with each transfer of DeepSpeed's backend; named ``"zero all_reduce"``.

    All of them go through one object; a stand-in takes its place that tells how long each call, and
    the first wait for its handle, takes. (DeepSpeed's own logger waits for every transfer where it
    starts.) One inside an operator of ds_lvx's (an all-to-all of Ulysses) is told twice.
    """

    def told(name: str, *args: Any, **kwargs: Any) -> Any:
        started = clock()
        result = getattr(backend, name)(*args, **kwargs)
        untold = [f"{ZERO}{name}"]

        def tell(waited: float) -> None:
            if untold:
                observer(Transfer(untold.pop(), started, waited, clock()))

        def wait(*args: Any, **kwargs: Any) -> Any:
            waited = clock()
            found = result.wait(*args, **kwargs)
            tell(waited)
            return found

        if hasattr(result, "wait"):
            return _StandIn(result, wait=wait)
        tell(started)
        return result

    backend = deepspeed_comm.cdb
    names = (name for name in dir(backend) if name.startswith(_COLLECTIVES))
    own = {name: partial(told, name) for name in names if callable(getattr(backend, name))}
    deepspeed_comm.cdb = _StandIn(backend, **own)
    try:
        yield
    finally:
        deepspeed_comm.cdb = backend


class _StandIn:
    """An object, but for some of its methods."""

    def __init__(self, whole: Any, **methods: Callable[..., Any]) -> None:
        self._whole = whole
        vars(self).update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)
