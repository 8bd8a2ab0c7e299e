"""What the JSON of a measurement begins with: kind, command, versions, hardware."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM
PACKAGES = (
    *("ds_lvx", "torch", "transformers", "deepspeed", "triton"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)


def header(
    *, emulated: bool = False, predicted: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Kind, command and versions; of what was measured also device, hardware and load.

    ``emulated``: the network between the ranks, which are real, was slowed down on purpose.
    ``device`` is ``"cpu"`` where they did not use the accelerator of this machine.
    """
    begin = {
        "kind": "predicted" if predicted else "emulated" if emulated else "measured",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(PACKAGES),
    }
    if predicted:
        return begin
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()
    return {**begin, "device": device, "hardware": hardware(device), "load_average_before": load}


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of Python, CUDA and packages; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: str) -> dict[str, Any]:
    """The accelerator, or the processor."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": 10 * properties.major + properties.minor,
            "l2_bytes": properties.L2_cache_size,
        }
    name, flags = processor()
    memory_bytes = psutil.virtual_memory().total
    return {"device": f"{name}, {cores()} cores", "memory_bytes": memory_bytes, "flags": flags}


def processor() -> tuple[str, list[str]]:
    """Its name, and its instructions for bf16, as Linux has them."""
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    known = (fields.get("flags") or fields.get("Features") or "").split()  # x86, or ARM
    return fields.get("model name") or platform.machine(), [f for f in BF16_FLAGS if f in known]


def cores() -> int:
    """Of this machine that the ranks may use."""
    return len(os.sched_getaffinity(0))
