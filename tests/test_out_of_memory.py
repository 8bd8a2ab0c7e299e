"""A rank that runs out of memory: its error, what the other ranks are told, and how all end."""

from __future__ import annotations

import re
import socket
from typing import Any

import numpy
import pytest
import torch

from ds_lvx.comm import Channel
from ds_lvx.notes import Mailbox, PeerError, explained
from ds_lvx.out_of_memory import RankOutOfMemoryError, named
from ds_lvx.sharding import mean_loss, shard_batch
from ds_lvx.shutdown import shutdown
from tests.models.mllama_case import ds_config, hard_batch, start_engine
from tests.ranks import RankError, run_ranks

TOO_MUCH = 2**46  # bytes: no machine has them
SIZE = "65,536.00 GiB (70,368,744,177,664 bytes)"
CALLS = ("forward", "backward", "step")


def allocate_too_much(*_: Any) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


class Boundary(torch.autograd.Function):
    """The identity, whose backward runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        allocate_too_much()


def fail_in(call: str, engine: Any) -> None:
    """Let this rank run out of memory in a call of the engine."""
    layer = engine.module.get_decoder().layers[1]
    if call == "forward":
        layer.register_forward_hook(allocate_too_much)
    elif call == "backward":
        layer.register_forward_hook(lambda module, args, out: Boundary.apply(out))
    else:
        # What torch.optim allocates its states in.
        engine.optimizer.step = allocate_too_much


def start(*, stage: int, sp_size: int = 2, cross: str = "lvx") -> Any:
    rule = {"method": cross, "recompute_kv": cross == "lvx"}
    return start_engine(ds_config(stage=stage, sp_size=sp_size, cross=rule, self_attn="ulysses"))


def train_step(engine: Any) -> None:
    out = engine(**shard_batch(hard_batch(), model=engine.module))
    engine.backward(out.loss)
    engine.step()


def run_out(call: str, *, failing: int, stage: int, sp_size: int) -> tuple[str, str, str]:
    """Train; one rank runs out in the second step. The error's kind, text and cause."""
    engine = start(stage=stage, sp_size=sp_size)
    train_step(engine)
    if Channel.world().rank == failing:
        fail_in(call, engine)
    try:
        while True:
            train_step(engine)
            mean_loss(torch.zeros(()))
    except RuntimeError as error:
        found = type(error).__name__, str(error), str(error.__cause__)
    # Outside of the exception: closing waits for nobody all the same.
    shutdown(engine)
    return found


@pytest.mark.parametrize(
    ("call", "failing", "stage", "sp_size"),
    [
        ("forward", 0, 1, 2),
        ("forward", 2, 3, 3),
        ("backward", 1, 2, 2),
        ("backward", 0, 3, 3),
        ("step", 0, 0, 2),
        ("step", 1, 3, 2),
    ],
)
def test_all_ranks_name_the_rank_and_the_size(
    call: str, failing: int, stage: int, sp_size: int
) -> None:
    results = run_ranks(
        run_out, sp_size, call, failing=failing, stage=stage, sp_size=sp_size, timeout_s=60
    )
    where = rf"rank {failing} \(rank {failing} of the {sp_size} that share a sample, host "
    host = re.escape(socket.gethostname())
    what = rf"{host}\) ran out of memory in {call}: asked for {re.escape(SIZE)} on cpu"
    for rank, (kind, text, cause) in enumerate(results):
        assert re.match(where + what, text), text
        assert re.search(r"where this process holds \d[\d.]* of \d[\d.]* GiB", text), text
        if rank == failing:
            assert kind == "RankOutOfMemoryError"
            assert "DefaultCPUAllocator" in cause
            advice = "offload_optimizer" if call == "step" else "kv_chunk_tokens"
            assert advice in text
            assert "docs/memory.md" in text
        else:
            assert kind == "PeerError"
            assert "Connection closed by peer" in cause
