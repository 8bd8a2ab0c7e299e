"""Which kernels this machine can run, and what ``auto`` makes of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_lvx.config.registry import AUTO, kernel_words
from ds_lvx.doctor.findings import Finding, State
from ds_lvx.kernels.choice import describe, kernel_for

_MOST_LINES = 12
_NEEDLESS = "kernel: got "  # the reader has not asked for it


def findings(device: str) -> list[Finding]:
    """Every kernel on a kind of device, then what ``auto`` takes there and why."""
    probes = {
        short: torch.empty(1, 1, 8, 128, dtype=dtype, device=device)
        for short, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    found = [_kernel(name, probes) for name in kernel_words() if name != AUTO]
    for short, q in probes.items():
        lines = describe(q)
        details = lines[1:_MOST_LINES]
        if len(lines) > _MOST_LINES:
            details.append(f"and {len(lines) - _MOST_LINES} kinds more, with --json")
        facts = {"lines": lines}
        found.append(Finding(f"auto, {short}", lines[0], details=details, facts=facts))
    return found


def available(device: str) -> list[str]:
    """The kernels, ``auto`` among them, that do both bf16 and fp32 on a kind of device."""
    probes = [
        torch.empty(1, 1, 8, 64, dtype=dtype, device=device)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return [name for name in kernel_words() if all(why_not(name, q) is None for q in probes)]


def why_not(name: str, q: Tensor) -> str | None:
    """Why a kernel cannot do queries like ``q``; None when it can."""
    try:
        kernel_for(name, q)
    except ValueError as error:
        return str(error).removeprefix(_NEEDLESS)
    return None


def _kernel(name: str, probes: Mapping[str, Tensor]) -> Finding:
    reasons = {short: why_not(name, q) for short, q in probes.items()}
    facts = {"available": [short for short, reason in reasons.items() if reason is None]}
    if len(facts["available"]) == len(probes):
        return Finding(name, f"available for {' and '.join(probes)}", facts=facts)
    # Some are made for 16 bits; and without a GPU it is no fault that a GPU's kernel does not run.
    cpu = all(q.device.type == "cpu" for q in probes.values())
    lines = [
        f"available for {short}" if reason is None else f"not available for {short}: {reason}"
        for short, reason in reasons.items()
    ]
    if len(set(reasons.values())) == 1:
        lines = [f"not available: {next(iter(reasons.values()))}"]
    state = State.OK if facts["available"] else State.NOTE if cpu else State.WARNING
    return Finding(name, lines[0], state, details=lines[1:], facts={**facts, "reasons": reasons})
