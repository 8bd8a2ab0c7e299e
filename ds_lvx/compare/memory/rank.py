"""One rank of one measured run, in a process of its own.

    python -m ds_lvx.compare.memory.rank REQUEST.json

The request says what to train and how often; the answer, beside it, has every sample. The parent
(`ds_lvx.compare.fresh`) sets RANK and the like.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import ds_lvx
from ds_lvx.compare.case import Case, build_model, ds_config, make_batch
from ds_lvx.compare.fresh import answer, run_fresh
from ds_lvx.compare.memory.peak import PROMPT_FREEING, meter
from ds_lvx.plan.memory import Setting

_TIMEOUT_S = 6 * 3600.0
"""A step that fills a rank's memory takes most of an hour on a CPU."""


@dataclass(frozen=True)
class Request:
    """What a run does.

    Attributes:
        case: what is trained.
        setting: how.
        ranks: processes.
        frames: visual input of a rank.
        warm_up_frames: visual input of a rank in the step before the measured ones.
        steps: measured ones.
    """

    case: Case
    setting: Setting
    ranks: int
    frames: int
    warm_up_frames: int
    steps: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> Request:
        """From JSON."""
        parts = {"case": Case(**record["case"]), "setting": Setting(**record["setting"])}
        return cls(**{**record, **parts})


def run(request: Request, *, threads: int) -> list[Any]:
    """Measure a request on fresh processes: what `measure` returned, by rank."""
    return run_fresh(
        __name__,
        asdict(request),
        ranks=request.ranks,
        threads=threads,
        timeout_s=_TIMEOUT_S,
        environment=PROMPT_FREEING,
    )


def main() -> None:
    """Run the request, write this rank's answer."""
    answer(lambda record: measure(Request.of(record)))


def measure(request: Request) -> dict[str, Any]:
    """Train some steps; bytes and seconds of each.

    Returns:
        ``before_bytes`` (before the first measured step), and lists with one entry a measured step:
        ``kept_bytes`` (after forward), ``peak_bytes``, both above what was there before the step,
        ``forward_s``, ``backward_s``, ``step_s`` (with the optimizer's), ``processor_s`` (of all
        threads in the same time, which neighbours on the machine do not lengthen), and ``loss``.
    """
    torch.manual_seed(0)
    model = build_model(request.case)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    config = ds_config(request.setting, request.case, ranks=request.ranks)
    engine, *_ = ds_lvx.initialize(
        model=model, optimizer=optimizer, model_parameters=weights, config=config
    )
    try:
        _step(engine, request, request.warm_up_frames)
        samples = [_step(engine, request, request.frames) for _ in range(request.steps)]
    finally:
        ds_lvx.shutdown(engine)
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {**columns, "before_bytes": columns["before_bytes"][0]}


def _step(engine: Any, request: Request, frames: int) -> dict[str, float]:
    batch = make_batch(request.case, frames=frames, ranks=request.ranks)
    shard = ds_lvx.shard_batch(batch, model=engine.module, frames="local")
    del batch
    memory = meter()
    memory.reset()
    before = memory.now_bytes()
    times, worked = [_now()], time.process_time()
    out = engine(**shard)
    times.append(_now())
    kept = memory.now_bytes() - before
    engine.backward(out.loss)
    times.append(_now())
    peak = memory.peak_bytes() - before
    engine.step()
    times.append(_now())
    return {
        "before_bytes": before,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "forward_s": times[1] - times[0],
        "backward_s": times[2] - times[1],
        "step_s": times[3] - times[0],
        "processor_s": time.process_time() - worked,
        "loss": out.loss.item(),
    }


def _now() -> float:
    get_accelerator().synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
