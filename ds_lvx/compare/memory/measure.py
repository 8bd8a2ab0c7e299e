"""Memory of a training step by setting: bytes a visual token, and the most tokens that fit.

Every size is measured in fresh processes. The slope over three sizes is what a visual token costs;
weights, gradients, the text and everything else that does not grow with the visual input are in the
intercept. Tokens are those of one rank.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ds_lvx.compare.case import Case, ds_config
from ds_lvx.compare.memory.peak import PROMPT_FREEING
from ds_lvx.compare.memory.rank import Request, run
from ds_lvx.plan.memory import CrossAttention, Load, Setting, kept, peak_per_key

GIB = 2**30
HEAVY_BYTES = 65_536
"""A setting that needs more than this a token is measured at smaller sizes."""

ALSO_FROZEN = (
    "lvx",
    "lvx, recompute",
    "lvx, recompute, checkpointing, chunks",
    "lvx, recompute, checkpointing, chunks, offload",
)
"""Settings that are measured with frozen features too."""


@dataclass(frozen=True)
class Plan:
    """How the settings are measured.

    Attributes:
        case: what is trained; its ``features`` are set by each measurement.
        ranks: that share the sample; each is a process.
        frames: the smallest visual input of a rank, at which step times are compared.
        steps: measured at that size; one at others.
        budget_bytes: what the largest run may add to a rank's memory; 0: it is not so large.
        threads: of a rank on a CPU.
    """

    case: Case
    ranks: int = 2
    frames: int = 32
    steps: int = 3
    budget_bytes: int = GIB
    threads: int = 1


def settings(chunk_tokens: int) -> dict[str, Setting]:
    """What is compared, by name."""
    recompute = Setting(recompute_kv=True)
    both = replace(recompute, checkpointing=True)
    chunks = replace(both, kv_chunk_tokens=chunk_tokens)
    return {
        "lvx": Setting(),
        "lvx, recompute": recompute,
        "lvx, recompute, checkpointing": both,
        "lvx, recompute, checkpointing, offload": replace(both, features="offload"),
        "lvx, recompute, checkpointing, chunks": chunks,
        "lvx, recompute, checkpointing, chunks, offload": replace(chunks, features="offload"),
        "ulysses": Setting(method="ulysses"),
        "ulysses, checkpointing": Setting(method="ulysses", checkpointing=True),
        "ring": Setting(method="ring"),
        "ring, checkpointing": Setting(method="ring", checkpointing=True),
    }


def time_steps(setting: Setting, plan: Plan, *, features: str) -> dict[str, Any]:
    """Step times of one setting at the plan's smallest size; see `measure`."""
    case = replace(plan.case, features=features)
    timed = _run(case, setting, plan, frames=plan.frames, timed=True)
    return {**timed, "load_average": os.getloadavg()}


def measure(
    name: str,
    setting: Setting,
    plan: Plan,
    *,
    features: str,
    timed: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure one setting: bytes at three sizes, the last as large as fits.

    Args:
        name: of the setting.
        setting: how the cross-attention layers run.
        plan: sizes and steps.
        features: ``"trained"`` or ``"frozen"``: whether they want a gradient.
        timed: what `time_steps` measured; neighbours disturb times and not bytes, so that all
            settings are timed before any of these long runs.
        say: gets a line about every run.

    Returns:
        A record for the JSON: the ds_config, predicted and measured bytes a token, every sample.
    """
    case = replace(plan.case, features=features)
    predicted = predict(setting, case, ranks=plan.ranks, cuda=torch.cuda.is_available())
    cost = predicted["peak_bytes_per_token"]
    say(f"{name}, features {features}: {timed['step_s'][-1]:.1f} s a step")
    first, second, third = (2, 3, 4) if cost > HEAVY_BYTES else (3, 6, 9)
    runs = [_run(case, setting, plan, frames=factor * plan.frames) for factor in (first, second)]
    frames = third * plan.frames
    if plan.budget_bytes > 0:
        frames = _frames_that_fit(runs, cost, plan.budget_bytes, case.frame_tokens)
    runs.append(_run(case, setting, plan, frames=frames))
    record = {
        "name": name,
        "features": features,
        "setting": asdict(setting),
        "case": asdict(case),
        "ds_config": ds_config(setting, case, ranks=plan.ranks),
        "budget_bytes": plan.budget_bytes,
        "environment_of_the_ranks": PROMPT_FREEING,
        "timed": timed,
        "runs": runs,
    }
    record |= compared(record, ranks=plan.ranks, cuda=torch.cuda.is_available())
    say(f"  {record['peak_bytes_per_token']:,.0f} bytes a token; {runs[-1]['tokens']:,} tokens:")
    say(f"  {runs[-1]['peak_bytes'] / GIB:.3f} GiB, {runs[-1]['step_s'][-1]:.1f} s")
    return record


def enlarge(record: Mapping[str, Any], plan: Plan, *, command: str) -> dict[str, Any]:
    """A record with one more run, the largest that the plan's budget allows.

    Args:
        record: of `measure`, in the same case and on as many ranks.
        plan: its budget counts.
        command: that asked for it, for the JSON.

    Returns:
        The record as it would be if the run had been its last from the start.
    """
    setting, case = Setting(**record["setting"]), Case(**record["case"])
    cuda = torch.cuda.is_available()
    cost = predict(setting, case, ranks=plan.ranks, cuda=cuda)["peak_bytes_per_token"]
    frames = _frames_that_fit(record["runs"], cost, plan.budget_bytes, case.frame_tokens)
    run = {**_run(case, setting, plan, frames=frames), "command": command}
    larger = {
        **record,
        "budget_bytes": plan.budget_bytes,
        "runs": sorted([*record["runs"], run], key=lambda each: int(each["tokens"])),
    }
    return larger | compared(larger, ranks=plan.ranks, cuda=cuda)


def _frames_that_fit(
    runs: Sequence[Mapping[str, Any]], cost: float, budget_bytes: int, frame_tokens: int
) -> int:
    """Frames that fill the budget, from smaller runs and the bytes a token by the formula."""
    slope, intercept = _line(runs, "peak_bytes")
    # Where sizes are too small for a slope, the formula keeps the run from being endless.
    return max(int((budget_bytes - intercept) / max(slope, cost) / frame_tokens), 1)


def _line(runs: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float]:
    """Slope and intercept of bytes over tokens."""
    tokens = [run["tokens"] for run in runs]
    slope, intercept = np.polyfit(tokens, [run[column] for run in runs], 1)
    return float(slope), float(intercept)


def compared(record: Mapping[str, Any], *, ranks: int, cuda: bool) -> dict[str, Any]:
    """What follows from a record's samples: slopes, times, and the formulas beside them."""
    setting, case = Setting(**record["setting"]), Case(**record["case"])
    predicted = predict(setting, case, ranks=ranks, cuda=cuda)
    slope, _ = _line(record["runs"], "peak_bytes")
    return {
        "kept_bytes_per_token": _line(record["runs"], "kept_bytes")[0],
        "peak_bytes_per_token": slope,
        "tokens_per_gib": GIB / slope,
        "predicted": predicted,
        "measured_over_predicted": slope / predicted["peak_bytes_per_token"],
        "step_s": spread(record["timed"]["step_s"]),
        "processor_s": spread(record["timed"]["processor_s"]),
    }


def predict(setting: Setting, case: Case, *, ranks: int, cuda: bool) -> dict[str, float]:
    """Bytes that a visual token costs by the formulas of `ds_lvx.plan.memory`.

    Args:
        setting, case, ranks: what is measured.
        cuda: where; on a CPU the same is predicted for an accelerator as well.
    """
    attention = CrossAttention(
        hidden=case.hidden,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.hidden // case.heads,
        layers=case.cross_layers,
    )
    here = Load(
        keys=1,
        ranks=ranks,
        features_train=case.features != "frozen",
        host_is_device=not cuda,
    )
    saved = kept(attention, setting, here)
    accelerator = replace(here, host_is_device=False)
    return {
        "kept_bytes_per_token": saved.features + attention.layers * saved.of_keys,
        "kept_by_a_layer_bytes_per_token": saved.of_keys,
        "peak_bytes_per_token": peak_per_key(attention, setting, here),
        "peak_bytes_per_token_on_an_accelerator": peak_per_key(attention, setting, accelerator),
    }


def _run(
    case: Case, setting: Setting, plan: Plan, *, frames: int, timed: bool = False
) -> dict[str, Any]:
    """One run: each rank's samples, and the rank that needs most.

    A run for times warms up at full size. One for bytes does not: what malloc has left over from a
    step of the same size would count as there before.
    """
    request = Request(
        case,
        setting,
        ranks=plan.ranks,
        frames=frames,
        warm_up_frames=frames if timed else 1,
        steps=plan.steps if timed else 1,
    )
    ranks = run(request, threads=plan.threads)
    return {
        "tokens": frames * case.frame_tokens,
        "kept_bytes": max(statistics.median(rank["kept_bytes"]) for rank in ranks),
        "peak_bytes": max(statistics.median(rank["peak_bytes"]) for rank in ranks),
        "step_s": slowest(ranks, "step_s"),
        "processor_s": slowest(ranks, "processor_s"),
        "ranks": ranks,
    }


def slowest(ranks: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """Seconds of each step on the rank that took longest."""
    return [max(times) for times in zip(*(rank[column] for rank in ranks), strict=True)]


def spread(samples: list[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile, and all samples."""
    return {
        "median": statistics.median(samples),
        "p10": float(np.percentile(samples, 10)),
        "p90": float(np.percentile(samples, 90)),
        "samples": samples,
    }
