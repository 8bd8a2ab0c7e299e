"""Bytes: by ds_lvx's own count against the design's formulas, and by the network interface."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ds_lvx
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cost import bytes_sent
from ds_lvx.plan.walks import label
from tests.attention.cases import Problem, run_problems
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def sent(problem: Problem, method: str, rank: int) -> tuple[float, float]:
    """Bytes that a rank sends in forward, the rule among them, and in backward."""
    shape = AttentionShape(
        problem.batch,
        problem.q_lengths,
        problem.kv_lengths,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        problem.dtype.itemsize,
        visibility=problem.visibility != "none",
    )
    found = bytes_sent(
        shape,
        label("lvx" if method == "recompute" else method, problem.extra.get("schedule", "gather")),
        rank=rank,
        factors=problem.dtype == torch.bfloat16,
    )
    return found.rule + found.forward, found.backward


def design(problem: Problem, rank: int) -> tuple[float, float]:
    """The formulas of the design, to which the exact ones come within 2%."""
    others, rows = problem.ranks - 1, problem.q_lengths[rank] * problem.batch
    item, width = problem.dtype.itemsize, problem.heads * rows * others
    visibility = 0 if problem.visibility == "none" else 8 * rows * others
    return (
        width * (2 * problem.head_dim * item + 4) + visibility,
        width * (3 * problem.head_dim * item + 8),
    )


@pytest.mark.parametrize(
    ("ranks", "device"),
    [
        (2, "cpu"),
        (3, "cpu"),
        pytest.param(4, "cpu", marks=pytest.mark.slow),
        pytest.param(2, "cuda", marks=pytest.mark.gpus(2)),
    ],
)
def test_bytes_are_those_of_the_formula(ranks: int, device: str) -> None:
    """Equal shards: then each rank sends as many rows of others home as it has of its own."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for visibility in ("none", "frames"):
            problem = Problem(
                (16,) * ranks, (90,) * ranks, head_dim=32, dtype=dtype, visibility=visibility
            )
            problem = replace(problem, device=device)
            for schedule in ("ring", "gather"):
                for method in ("lvx", "recompute"):
                    extra = {"schedule": schedule}
                    cases.append((Problem(**{**problem.__dict__, "extra": extra}), method))
            cases += [(problem, "ring"), (problem, "ulysses")]
    answers = run_ranks(run_problems, ranks, cases, device=device)
    for index, (problem, method) in enumerate(cases):
        for rank, answer in enumerate(answers):
            found = answer[index]["forward"].bytes_sent, answer[index]["backward"].bytes_sent
            assert found == sent(problem, method, rank), (method, problem)
            if method in ("lvx", "recompute"):
                assert found == pytest.approx(design(problem, rank), rel=0.02), problem


def test_bytes_of_lvx_do_not_depend_on_the_number_of_keys() -> None:
    cases = [
        (Problem((8, 8), (keys, keys), extra={"schedule": schedule}), "lvx")
        for schedule in ("ring", "gather")
        for keys in (8, 512)
    ]
    for answer in run_ranks(run_problems, 2, cases):
        ring_short, ring_long, gather_short, gather_long = (
            (a["forward"].bytes_sent, a["backward"].bytes_sent) for a in answer
        )
        assert ring_short == ring_long == gather_short == gather_long


@pytest.mark.slow
def test_messages_gather_sends_two_ring_two_a_hop() -> None:
    problem = Problem((8,) * 4, (16,) * 4)
    cases = [
        (Problem(**{**problem.__dict__, "extra": {"schedule": s}}), "lvx")
        for s in ("gather", "ring")
    ]
    for gather, ring in run_ranks(run_problems, 4, cases):
        assert gather["forward"].calls == gather["backward"].calls == 2
        assert set(gather["forward"].per_collective) == {"all_gather", "all_to_all"}
        assert ring["forward"].calls == ring["backward"].calls == 2 * 3


def measure_interface(problem: Problem, *, backward: bool) -> tuple[int, int]:
    """This rank's count, and what the loopback device sent for all ranks, of one pass."""

    shard = problem.shard(torch.distributed.get_rank())

    def forward_pass() -> torch.Tensor:
        return ds_lvx.lv_xattn(
            shard["q"], shard["k"], shard["v"], visibility=shard["visibility"], **problem.extra
        )

    forward_pass().sum().backward()  # connections are made at first use
    out = forward_pass() if backward else None
    torch.distributed.barrier()
    before = _loopback_bytes()
    torch.distributed.barrier()
    with ds_lvx.traffic() as counted:
        if out is None:
            forward_pass()
        else:
            out.sum().backward()
    torch.distributed.barrier()
    return counted.bytes_sent, _loopback_bytes() - before


def _loopback_bytes() -> int:
    """What the loopback device of this process's network namespace has sent (tenth column)."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == "lo":
            return int(columns.split()[8])
    raise RuntimeError("there is no loopback device")


def main() -> None:
    """Run by the test below in a network namespace of its own: nobody else uses its loopback."""
    for schedule in ("ring", "gather"):
        for backward in (False, True):
            problem = Problem(
                (256,) * 3,
                (64,) * 3,
                heads=8,
                head_dim=64,
                visibility="frames",
                extra={"schedule": schedule},
            )
            answers = run_ranks(measure_interface, 3, problem, backward=backward)
            counted = sum(answer[0] for answer in answers)
            wire = max(answer[1] for answer in answers)
            expected = sum(sent(problem, "lvx", rank)[backward] for rank in range(3))
            print(schedule, backward, counted, wire, wire / expected)
            assert abs(counted / expected - 1) < 0.02, (schedule, backward, counted, expected)
            assert abs(wire / expected - 1) < 0.08, (schedule, backward, wire, expected)


@pytest.mark.slow
def test_the_interface_agrees_with_the_count() -> None:
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "--net", "--map-root-user", "--"]
    probe = [*command, "true"]
    if unshare is None or subprocess.run(probe, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs `unshare --net --map-root-user`, a network namespace of its own")
    script = (
        "import fcntl, socket, struct\n"
        "s = socket.socket()\n"
        "fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 0x41))\n"  # SIOCSIFFLAGS: lo is up
        "from tests.attention.test_traffic import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [*command, sys.executable, "-c", script],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
