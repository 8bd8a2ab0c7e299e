"""One rank of a fine-tuning job by one method, in a process of its own.

    python -m ds_lvx.compare.model.rank REQUEST.json

The first step is for comparing: its loss and the norm of every gradient. Then come steps to warm
up, steps that are timed as they are, and as many that are broken down
(`ds_lvx.compare.model.breakdown`), which costs some time of its own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

import ds_lvx
from ds_lvx.compare.fresh import answer
from ds_lvx.compare.model.breakdown import Parts
from ds_lvx.compare.model.job import Job, build, ds_config, make_batch, sizes
from ds_lvx.compare.network import read_counters
from ds_lvx.distributed.pending import without_overlap

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Request:
    """What a rank does.

    Attributes:
        job: what is trained.
        method: of the cross-attention.
        warmup: steps after the first and before the timed ones.
        repeats: timed steps, and broken-down ones.
        overlap: transfers run under what is computed.
    """

    job: Job
    method: str
    warmup: int = 1
    repeats: int = 3
    overlap: bool = True

    @classmethod
    def of(cls, record: dict[str, Any]) -> Request:
        """From JSON."""
        return cls(**{**record, "job": Job.of(record["job"])})


def main() -> None:
    """Run the request, write this rank's answer."""
    answer(lambda record: measure(Request.of(record)))


def measure(request: Request) -> dict[str, Any]:
    """Train some steps on this rank.

    Returns:
        ``losses`` of all steps (the whole sample's) and ``gradient_norms`` by parameter after the
        first; by timed step ``step_s``, ``processor_s`` (of all threads of this process),
        ``attention_bytes`` (`ds_lvx.traffic`) and ``interface_bytes`` (what the network interface
        sent without packet headers, DeepSpeed's own included; None where ranks share it);
        ``broken_down``: a `Breakdown` for each further step; ``sizes``.
    """
    # torch 2.13 renamed collectives that DeepSpeed calls by their old names: a warning each.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    ranks = int(os.environ["WORLD_SIZE"])
    model: Any = build(request.job)
    of_sample = sizes(request.job, model.config)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = ds_lvx.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=LEARNING_RATE),
        model_parameters=trained,
        config=ds_config(request.job, request.method, ranks=ranks),
    )
    del model, trained  # the engine's alone, so that nothing of them outlives the shutdown
    try:
        with nullcontext() if request.overlap else without_overlap():
            return {**_Run(engine, request).samples(), "sizes": of_sample}
    finally:
        ds_lvx.shutdown(engine)


class _Run:
    """The steps of one engine."""

    def __init__(self, engine: Any, request: Request) -> None:
        self._engine = engine
        self._request = request
        job = request.job
        config = engine.ds_lvx.patch.model.config
        self._batch = make_batch(job, config, frames=ds_lvx.owned(job.frames))
        self._losses: list[float] = []

    def samples(self) -> dict[str, Any]:
        """All steps; see `measure`."""
        norms = self._first_step()
        for _ in range(self._request.warmup):
            self._keep(self._step())
        timed = [self._timed() for _ in range(self._request.repeats)]
        parts = Parts(self._engine.module)
        broken_down = [self._broken_down(parts) for _ in range(self._request.repeats)]
        parts.remove()
        columns = {name: [sample[name] for sample in timed] for name in timed[0]}
        return {
            "losses": self._losses,
            "gradient_norms": norms,
            **columns,
            "broken_down": broken_down,
        }

    def _first_step(self) -> dict[str, float]:
        norms: dict[str, float] = {}

        def look(phase: str) -> None:
            if phase == "optimizer":
                norms.update(gradient_norms(self._engine))

        self._keep(self._step(look))
        return norms

    def _step(self, enter: Callable[[str], None] = lambda phase: None) -> Tensor:
        """One optimizer step; ``enter`` is told of each phase after the first."""
        shard = ds_lvx.shard_batch(self._batch, model=self._engine.module, frames="local")
        loss: Tensor = self._engine(**shard).loss
        enter("backward")
        self._engine.backward(loss)
        enter("optimizer")
        self._engine.step()
        return loss

    def _timed(self) -> dict[str, Any]:
        start, worked, counted = self._begin(), time.process_time(), _interface_bytes()
        with ds_lvx.traffic() as traffic:
            loss = self._step()
        sample = {
            "step_s": _now() - start,
            "processor_s": time.process_time() - worked,
            "attention_bytes": traffic.bytes_sent,
            "interface_bytes": None if counted is None else (_interface_bytes() or 0) - counted,
        }
        self._keep(loss)
        return sample

    def _broken_down(self, parts: Parts) -> dict[str, Any]:
        self._engine.ds_lvx.distributed.groups.world_channel.barrier()
        with parts.recording() as breakdown:
            start = _now()
            loss = self._step(parts.enter)
            breakdown.whole_s = _now() - start
        self._keep(loss)
        return asdict(breakdown)

    def _begin(self) -> float:
        """The time, with all ranks here."""
        self._engine.ds_lvx.distributed.groups.world_channel.barrier()
        return _now()

    def _keep(self, loss: Tensor) -> None:
        self._losses.append(float(ds_lvx.mean_loss(loss)))


def gradient_norms(engine: Any) -> dict[str, float]:
    """The norm of each parameter's gradient of the whole sample, after backward.

    Collectives: those by which ZeRO puts a gradient together; on all ranks.
    """
    norms = {}
    for name, parameter in engine.ds_lvx.patch.model.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter)
            norms[name] = 0.0 if gradient is None else float(gradient.float().norm())
    return norms


def _now() -> float:
    get_accelerator().synchronize()
    return time.perf_counter()


def _interface_bytes() -> int | None:
    """What this rank's interface sent, where the network is its own."""
    if "NETLAB" not in os.environ:
        return None
    counters = read_counters(os.environ["GLOO_SOCKET_IFNAME"])
    return None if counters is None else counters.sent_payload_bytes


if __name__ == "__main__":
    main()
