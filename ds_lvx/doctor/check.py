"""The self-check: every method on 1 and on 2 ranks, in fresh processes, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ds_lvx.compare.harness import Ranks, RunError, on_ranks
from ds_lvx.config.words import in_ranks
from ds_lvx.doctor import kernels, rank
from ds_lvx.doctor.findings import Finding, Section, State

BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest error that is right, relative to the largest value; see docs/doctor.md."""

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_LINES_OF_A_FAILURE = 2
_END_OF_OUTPUT = "; the end of its output:"  # of `RunError`; the details show it

Outcome = Mapping[str, Any]


def sections(
    device: str, *, timeout_s: float, blocked: str, tell: Callable[[str], None]
) -> Iterator[Section]:
    """Check on 1 rank and on 2, one after the other.

    Args:
        device: cpu or cuda. Two ranks want a GPU each and fall back to the CPU.
        timeout_s: for each of the two.
        blocked: why ranks cannot talk to each other here; empty when they can.
        tell: gets a line before something that takes long.
    """
    tell(f"self-check on 1 rank ({device}) ...")
    alone = _run(1, device, kernels_of(device), timeout_s=timeout_s)
    yield _section(1, device, alone)
    if blocked:
        value = f"not run: {blocked}"
        yield Section("Self-check on 2 ranks", [Finding("2 ranks", value, State.WARNING)])
        return
    place = "cuda" if device == "cuda" and torch.cuda.device_count() > 1 else "cpu"
    names = kernels_of(place)
    if place == device and not isinstance(alone, str):
        # What fails alone needs no second failure, which would hide those of the others.
        broken = {case["kernel"] for case in alone if _fault(case) is not None}
        names = [name for name in names if name not in broken]
        if not names:
            value = "not run: no kernel is right on 1 rank"
            yield Section("Self-check on 2 ranks", [Finding("2 ranks", value, State.NOTE)])
            return
    tell(f"self-check on 2 ranks ({place}) ...")
    right_alone = place == device and not isinstance(alone, str)
    outcomes = _run(2, place, names, timeout_s=timeout_s)
    yield _section(2, place, outcomes, right_alone=right_alone)


def kernels_of(device: str) -> list[str]:
    """The kernels to check: on a GPU all that run there, on a CPU what ``auto`` takes."""
    return kernels.available(device) if device == "cuda" else ["auto"]


def _run(ranks: int, device: str, names: list[str], *, timeout_s: float) -> list[Outcome] | str:
    """The worst outcome of each case over all ranks, or why there is none."""
    request = {"device": device, "kernels": names, "timeout_s": timeout_s / 2}
    environment = {"DS_ACCELERATOR": device}
    where = Ranks(ranks, device=device, timeout_s=timeout_s, environment=environment)
    try:
        answers = on_ranks(rank.check, request, where)
    except RunError as error:
        return str(error)
    return [_worst(cases) for cases in zip(*answers, strict=True)]


def _worst(cases: Sequence[Outcome]) -> Outcome:
    """The outcomes of one case on every rank as one: the largest errors, and where they are."""
    names = {name for case in cases for name in case["errors"]}
    by_rank = {name: [case["errors"].get(name, 0.0) for case in cases] for name in sorted(names)}
    problems = [f"{c['problem']} on rank {rank}" for rank, c in enumerate(cases) if c["problem"]]
    return {
        **cases[0],
        "errors": {name: max(errors) for name, errors in by_rank.items()},
        "rank": {name: errors.index(max(errors)) for name, errors in by_rank.items()},
        "bound": BOUNDS[cases[0]["dtype"]],
        "problem": "; ".join(problems),
    }


def _section(
    ranks: int, device: str, outcomes: list[Outcome] | str, *, right_alone: bool = False
) -> Section:
    title = (
        f"Self-check on {in_ranks(ranks)} ({device}): largest error of out, dq, dk "
        "and dv against float64, as a share of the largest value"
    )
    if isinstance(outcomes, str):
        return Section(title, [_unfinished(ranks, outcomes)])
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for case in outcomes:
        rows.setdefault((case["method"], case["kernel"]), []).append(case)
    found = [_finding(cases, device, right_alone=right_alone) for cases in rows.values()]
    return Section(title, found)


def _finding(cases: list[Outcome], device: str, *, right_alone: bool) -> Finding:
    """One line for the cases of a method and a kernel."""
    name = f"{cases[0]['method']}, kernel {cases[0]['kernel']}"
    facts = {"cases": [dict(case) for case in cases]}
    faults = [fault for case in cases if (fault := _fault(case)) is not None]
    if not faults:
        parts = []
        for dtype, bound in BOUNDS.items():
            worst = max(_error(case) for case in cases if case["dtype"] == dtype)
            parts.append(f"{_SHORT[dtype]} {worst:.1e} (at most {bound:.0e})")
        return Finding(name, ", ".join(parts), facts=facts)
    advice = _advice(cases[0]["kernel"], device, right_alone=right_alone)
    return Finding(name, faults[0], State.ERROR, advice=advice, details=faults[1:], facts=facts)


def _error(case: Outcome) -> float:
    return max(case["errors"].values(), default=0.0)


def _fault(case: Outcome) -> str | None:
    """What is wrong with an outcome; None when nothing is."""
    what = f"{_SHORT[case['dtype']]}, {'some' if case['rule'] else 'all'} keys visible"
    if case["problem"]:
        return f"{what}: {case['problem']}"
    if _error(case) <= case["bound"]:
        return None
    name = max(case["errors"], key=lambda result: case["errors"][result])
    where = f"{name} on rank {case['rank'][name]}"
    return f"{what}: {where} is off by {_error(case):.1e}, where {case['bound']:.0e} is allowed"


def _advice(kernel: str, device: str, *, right_alone: bool) -> str:
    if right_alone:
        means = {
            "cuda": "NCCL_DEBUG=INFO says what NCCL does, NCCL_P2P_DISABLE=1 forbids transfers "
            "from GPU to GPU",
            "cpu": "another interface by GLOO_SOCKET_IFNAME; then report this output",
        }
        return f"on 1 rank it is right, so look at the communication: {means[device]}"
    if kernel not in ("native", "reference"):
        return 'do without it: "kernel": "native" in the ds_lvx section; then report this output'
    return "compare the versions with constraints.txt, and report this output"


def _unfinished(ranks: int, reason: str) -> Finding:
    first, *tail = (line for line in reason.splitlines() if line.strip())
    advice = (
        "where the last line does not say it: a longer --timeout for a slow machine, a compiler "
        "for DeepSpeed's operator, memory that other processes hold"
    )
    if ranks > 1:
        advice += ", another interface by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    return Finding(
        in_ranks(ranks),
        first.removesuffix(_END_OF_OUTPUT) + ("" if tail else ", and had printed nothing"),
        State.ERROR,
        advice=advice,
        details=[line.strip() for line in tail[-_LINES_OF_A_FAILURE:]],
        facts={"output": reason},
    )
