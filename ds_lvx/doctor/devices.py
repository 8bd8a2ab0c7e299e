"""Which processors compute, and how much memory they have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_lvx.compare import machine
from ds_lvx.doctor.findings import Finding, State

GIB = 2**30


def findings() -> list[Finding]:
    """Every GPU, or why there is none, and the CPU."""
    return [*_gpus(), _cpu()]


def _gpus() -> list[Finding]:
    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    if not _has_nvidia():
        return [Finding("GPU", "none; everything runs on the CPU", State.NOTE)]
    if torch.version.cuda is None:
        value = "there is an NVIDIA GPU, but this torch is built for CPUs"
        advice = "install torch with CUDA: https://pytorch.org/get-started/locally"
        return [Finding("GPU", value, State.WARNING, advice=advice)]
    advice = "update NVIDIA's driver to one for this CUDA, or install torch for an older CUDA"
    value = f"torch cannot use the NVIDIA GPU: {_why_no_cuda()}"
    return [Finding("GPU", value, State.WARNING, advice=advice)]


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _why_no_cuda() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "it sees no device"


def _gpu(index: int) -> Finding:
    device = torch.cuda.get_device_properties(index)
    capability = f"{device.major}.{device.minor}"
    facts = {
        "name": device.name,
        "memory_bytes": device.total_memory,
        "compute_capability": capability,
        "multiprocessors": device.multi_processor_count,
    }
    value = (
        f"{device.name}, {device.total_memory / GIB:.1f} GiB, compute capability {capability}, "
        f"{device.multi_processor_count} multiprocessors"
    )
    return Finding(f"cuda:{index}", value, facts=facts)


def _cpu() -> Finding:
    name, bf16 = machine.processor()
    usable, memory_bytes = machine.cores(), _memory_bytes()
    facts: dict[str, Any] = {
        "name": name,
        "cores": psutil.cpu_count(logical=False),
        "usable_threads": usable,
        "memory_bytes": memory_bytes,
        "bf16_flags": bf16,
    }
    value = (
        f"{name}, {facts['cores']} cores ({usable} threads usable here), "
        f"{memory_bytes / GIB:.1f} GiB, " + (f"bf16 by {', '.join(bf16)}" if bf16 else "no bf16")
    )
    details = () if bf16 else ("bf16 is right here, but no faster than fp32",)
    return Finding("cpu", value, details=details, facts=facts)


def _memory_bytes() -> int:
    """Of the machine, or what this container may use of it."""
    total: int = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path)
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
