"""What ``srun`` says of a task, in the words of other launchers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, MutableMapping

_NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that Linux hands out
_STEPS = 997  # steps of a job that run at once lie apart, and away from the jobs that follow
_TIMEOUT_S = 20.0
_NODES = re.compile(r"(?:[^\[,]|\[[^]]*\])*")  # of `r[1-2]n[08,10],x` all in front of `,x`
_NUMBERS = re.compile(r"\[(\d+)[^]]*\]")


def read_slurm(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT for a task of srun.

    Nothing is set where a launcher has said RANK and WORLD_SIZE, outside of Slurm, for a single
    task, or in a batch script itself. MASTER_ADDR and MASTER_PORT of the user stay; else they are
    the first node of the step, and a port that follows from the numbers of the job and the step.

    Args:
        environ: variables, which are changed.

    Returns:
        Whether they were set.

    Raises:
        ValueError: Slurm's variables are no numbers, or name no node.
    """
    if any(name not in environ for name in _NEEDED):
        return False
    # In an image with PYTORCH_VERSION pyxis says RANK and LOCAL_RANK, and nothing else.
    if "RANK" in environ and ("WORLD_SIZE" in environ or environ["RANK"] != environ[_NEEDED[0]]):
        return False
    in_batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    rank, local_rank, size = (_number(environ, name) for name in _NEEDED)
    if in_batch_script or size == 1:
        return False
    environ["RANK"], environ["LOCAL_RANK"] = str(rank), str(local_rank)
    environ["WORLD_SIZE"], environ["LOCAL_SIZE"] = str(size), str(_tasks_here(environ, size))
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _first_node(environ)
    job, step = (
        _number(environ, name) if name in environ else 0
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    environ.setdefault("MASTER_PORT", str(_FIRST_PORT + (job + _STEPS * step) % _PORTS))
    return True


def _number(environ: MutableMapping[str, str], name: str) -> int:
    value = environ[name]
    if not value.isdecimal():
        raise ValueError(
            f"{name}: got {value!r}; expected a number, as srun sets it; start by srun, or unset it"
        )
    return int(value)


def _tasks_here(environ: MutableMapping[str, str], size: int) -> int:
    """Tasks on this node: of ``4(x2),3`` the one at SLURM_NODEID."""
    given = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    counts = list(_expanded(given))
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    return counts[node] if node < len(counts) else size


def _expanded(text: str) -> Iterator[int]:
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        yield from [int(count)] * int(times or 1)


def _first_node(environ: MutableMapping[str, str]) -> str:
    # A step may leave out the job's first nodes.
    name = "SLURM_STEP_NODELIST" if environ.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    nodes = environ.get(name, "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
        found = done.stdout.split()
    except (OSError, subprocess.SubprocessError):  # in a container there is no scontrol
        found = []
    named = _NODES.match(nodes)
    assert named is not None  # it matches what is empty
    first = found[0] if found else _NUMBERS.sub(r"\1", named[0])
    if not first:
        raise ValueError(
            f"{name}: got {nodes!r}; expected the nodes of the job; or set MASTER_ADDR "
            "to an address of the first node"
        )
    return first
