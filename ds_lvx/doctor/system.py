"""Limits of the operating system and the tools that DeepSpeed compiles with."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

from ds_lvx.doctor.findings import Finding, State

MIB, GIB = 2**20, 2**30
SHARED_MEMORY = Path("/dev/shm")
# NCCL's documentation asks containers for --shm-size=1g --ulimit memlock=-1; DeepSpeed's operator
# for CPUs takes 66 MiB a rank.
_ENOUGH_SHARED_BYTES = GIB
_ENOUGH_FILES = 1024
_OPERATOR = "deepspeed_shm_comm"


def findings(device: str) -> list[Finding]:
    """Shared memory, limits, compiler and ninja, for runs on a kind of device (cpu, cuda)."""
    built = _built_operators()
    needed = device == "cpu" and not built
    return [
        _shared_memory(SHARED_MEMORY),
        _files(resource.getrlimit(resource.RLIMIT_NOFILE)),
        _locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        _compiler(needed=needed),
        _ninja(needed=device == "cpu"),
        _operator(built, device),
    ]


def _shared_memory(path: Path) -> Finding:
    name = str(path)
    if not path.exists():
        advice = "mount a tmpfs there; ranks of one machine talk through it"
        return Finding(name, "does not exist", State.ERROR, advice=advice)
    usage = shutil.disk_usage(path)
    value = f"{usage.free / GIB:.2f} GiB free of {usage.total / GIB:.2f} GiB"
    facts = {"total_bytes": usage.total, "free_bytes": usage.free}
    if usage.free >= _ENOUGH_SHARED_BYTES:
        return Finding(name, value, facts=facts)
    advice = (
        "NCCL and DeepSpeed's operator for CPUs (66 MiB a rank) keep buffers there: at least 1 GiB "
        "free is wise (docker run --shm-size=1g); old deepspeed_* files there can go"
    )
    return Finding(name, value, State.WARNING, advice=advice, facts=facts)


def _files(limits: tuple[int, int]) -> Finding:
    soft, hard = limits
    facts = {"soft": soft, "hard": hard}
    value = _limit(soft)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        return Finding("open files", value, facts=facts)
    advice = f"every connection of NCCL and gloo is one: ulimit -n {_limit(hard)}"
    return Finding("open files", value, State.WARNING, advice=advice, facts=facts)


def _locked(soft: int) -> Finding:
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / MIB:.1f} MiB"
    facts = {"soft_bytes": soft}
    if soft == resource.RLIM_INFINITY or not any(Path("/sys/class").glob("infiniband/*")):
        return Finding("locked memory", value, facts=facts)
    advice = "NCCL locks the buffers that InfiniBand sends: ulimit -l unlimited"
    return Finding("locked memory", value, State.WARNING, advice=advice, facts=facts)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _compiler(*, needed: bool) -> Finding:
    command = get_cxx_compiler()
    path = shutil.which(command)
    if path is None:
        advice = f"install a C++ compiler ({command} is not in PATH; apt install g++), or set CXX"
        state = State.ERROR if needed else State.WARNING
        return Finding(
            "C++ compiler", "missing; DeepSpeed compiles operators", state, advice=advice
        )
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    first = (run.stdout or run.stderr).partition("\n")[0]
    return Finding("C++ compiler", f"{path}: {first}", facts={"path": path, "version": first})


def _ninja(*, needed: bool) -> Finding:
    path = shutil.which("ninja")
    if path is not None:
        return Finding("ninja", path, facts={"path": path})
    beside = Path(sys.executable).with_name("ninja")
    advice = (
        f"put it in PATH: source {beside.with_name('activate')}"
        if beside.exists()
        else "pip install ninja"
    )
    state = State.ERROR if needed else State.WARNING
    return Finding("ninja", "not in PATH; PyTorch loads operators with it", state, advice=advice)


def _built_operators() -> list[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    name = f"{_OPERATOR}.so"
    return sorted(path for depth in ("*", "*/*") for path in root.glob(f"{depth}/{name}"))


def _operator(built: list[Path], device: str) -> Finding:
    name = "DeepSpeed's operator"
    if device != "cpu":
        return Finding(name, "not needed with GPUs: its CPU communication", State.NOTE)
    if built:
        return Finding(name, f"built, {built[0]}", facts={"paths": [str(path) for path in built]})
    value = "its CPU communication is compiled at the first start (some 15 s)"
    return Finding(name, value, State.NOTE)
