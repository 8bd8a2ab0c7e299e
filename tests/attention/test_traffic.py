"""Bytes: by ds_lvx's own count against the design's formulas, and by the network interface."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.config.registry import SHARDED
from ds_lvx.plan.walks import label
from tests.attention.cases import Problem, run_problems
from tests.ranks import FORKED, run_ranks
from tests.sent import bytes_sent

NO_NAMESPACE = 77  # exit code


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
        pytest.param(3, "cpu", marks=pytest.mark.slow),
        pytest.param(4, "cpu", marks=pytest.mark.exhaustive),
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
            for schedule in SHARDED:
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


def measure_interface(problem: Problem, backward: bool) -> tuple[int, int]:
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


SCHEDULES = ("ring", "gather")
PASSES = [(schedule, backward) for schedule in SCHEDULES for backward in (False, True)]
RANKS = 3


def problem_of(schedule: str) -> Problem:
    sizes = {"heads": 8, "head_dim": 64, "visibility": "frames"}
    return Problem((256,) * RANKS, (64,) * RANKS, **sizes, extra={"schedule": schedule})


def rank_in_a_namespace(rank: int, answers: Any) -> None:
    place = {"rank": rank, "world_size": RANKS, "init_method": "tcp://127.0.0.1:29500"}
    torch.distributed.init_process_group("gloo", **place)  # nobody else has ports there
    for schedule, backward in PASSES:
        answers.put(((schedule, backward), measure_interface(problem_of(schedule), backward)))
    ds_lvx.shutdown()


def start_in_a_namespace(answers: Any) -> None:
    """In a process: ranks in a network namespace of its own, whose loopback nobody else uses."""
    new_user, new_net, interface_flags, up_and_running = 0x10000000, 0x40000000, 0x8914, 0x41
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_user | new_net) != 0:
        sys.exit(NO_NAMESPACE)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, interface_flags, struct.pack("16sh", b"lo", up_and_running))
    forks = get_context("fork")
    ranks = [forks.Process(target=rank_in_a_namespace, args=(r, answers)) for r in range(RANKS)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    sys.exit(any(each.exitcode for each in ranks))


@pytest.mark.slow
def test_the_interface_agrees_with_the_count() -> None:
    answers = FORKED.SimpleQueue()
    process = FORKED.Process(target=start_in_a_namespace, args=(answers,))
    process.start()
    process.join()
    if process.exitcode == NO_NAMESPACE:
        pytest.skip("needs a network namespace of its own, and may not make one")
    assert process.exitcode == 0
    found = [answers.get() for _ in range(RANKS * len(PASSES))]
    for schedule, backward in PASSES:
        of_ranks = [answer for key, answer in found if key == (schedule, backward)]
        counted, wire = sum(each[0] for each in of_ranks), max(each[1] for each in of_ranks)
        problem = problem_of(schedule)
        expected = sum(sent(problem, "lvx", rank)[backward] for rank in range(RANKS))
        assert abs(counted / expected - 1) < 0.02, (schedule, backward, counted, expected)
        assert abs(wire / expected - 1) < 0.08, (schedule, backward, wire, expected)
