"""A rank that runs out of memory: its error, what the other ranks are told, and how all end."""

from __future__ import annotations

import functools
import re
import socket
from typing import Any
from weakref import ref

import numpy
import pytest
import torch
from torch.distributed import distributed_c10d

from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.failures import RankOutOfMemoryError, named
from ds_lvx.distributed.notes import explain
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.initialize import initialize
from ds_lvx.models.patch import is_patched
from ds_lvx.sharding import mean_loss, shard_batch
from tests.models.mllama_case import (
    ds_config,
    hard_batch,
    make_batch,
    start_engine,
    tiny_model,
)
from tests.ranks import run_ranks

TOO_MUCH = 2**46  # bytes: no machine has them
SIZE = "65,536.00 GiB (70,368,744,177,664 bytes)"


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


# ---- on real ranks


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
    ("call", "failing", "stage", "sp_size", "ranks"),
    [
        ("forward", 0, 1, 2, 2),
        pytest.param("forward", 2, 3, 3, 3, marks=pytest.mark.exhaustive),
        pytest.param("backward", 3, 2, 2, 4, marks=pytest.mark.slow),
        ("step", 0, 0, 2, 2),
    ],
)
def test_all_ranks_name_the_rank_and_the_size(
    call: str, failing: int, stage: int, sp_size: int, ranks: int
) -> None:
    """A rank that went on waiting would be a TimeoutError here, or a RankError of `shutdown`."""
    given = {"failing": failing, "stage": stage, "sp_size": sp_size}
    results = run_ranks(run_out, ranks, call, **given)
    place = f"rank {failing % sp_size} of the {sp_size} that share a sample"
    host = re.escape(socket.gethostname())
    what = (
        rf"rank {failing} \({place}, host {host}\) ran out of memory in {call}: "
        rf"asked for {re.escape(SIZE)} on cpu"
    )
    for rank, (kind, text, cause) in enumerate(results):
        assert re.match(what, text), text
        assert re.search(r"where this process holds \d[\d.]* of \d[\d.]* GiB", text), text
        if rank == failing:
            assert kind == "RankOutOfMemoryError"
            assert "DefaultCPUAllocator" in cause
            advice = "offload_optimizer" if call == "step" else "kv_chunk_tokens"
            assert advice in text
            assert "docs/memory.md" in text
        else:
            assert kind == "PeerError"
            # What gloo says depends on whether the peer left unread bytes behind.
            assert re.search(r"Connection (closed|reset) by peer", cause), cause


def hold_too_much(place: str) -> tuple[str, str]:
    """Rank 1 holds one image of two, which its memory is too small for: at the cut, or later."""
    engine = start(stage=0)
    if Channel.world().rank == 1 and place == "tower":
        engine.module.model.vision_model.register_forward_pre_hook(allocate_too_much)
    batch = make_batch([[0, 2]], length=8, num_tiles=[[1, 2]])
    try:
        with pytest.MonkeyPatch.context() as patch:
            if Channel.world().rank == 1 and place == "cut":
                patch.setattr("ds_lvx.models.shard.move", allocate_too_much)
            shard = shard_batch(batch, model=engine.module)
        assert shard["ds_lvx"].units == 1
        engine(**shard)
        # What rank 0 does next needs the other one.
        mean_loss(torch.zeros(()))
    except RuntimeError as error:
        found = type(error).__name__, str(error)
    shutdown(engine)
    return found


@pytest.mark.parametrize(
    ("place", "call", "whole"), [("cut", "shard_batch", False), ("tower", "forward", True)]
)
def test_an_image_too_large_for_its_rank_is_told_on_all(place: str, call: str, whole: bool) -> None:
    results = run_ranks(hold_too_much, 2, place)
    assert [kind for kind, _ in results] == ["PeerError", "RankOutOfMemoryError"]
    for kind, text in results:
        assert re.match(rf"rank 1 \(.*\) ran out of memory in {call}: asked for", text), text
        assert ("holds one image or frame, which is not split" in text) == whole, text
        advice = "neither more ranks nor fewer frames make it smaller: take fewer pixels"
        assert (advice in text) == (whole and kind == "RankOutOfMemoryError")


def run_out_while_starting() -> str:
    def optimizer(parameters: Any) -> Any:
        if Channel.world().rank == 1:
            numpy.empty(2**50, numpy.uint8)
        return torch.optim.SGD(parameters, lr=0.1)

    model = tiny_model()
    config = ds_config(stage=2, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses")
    text = "no error"
    try:
        engine, *_ = initialize(
            model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config
        )
        train_step(engine)
    except RuntimeError as error:
        text = f"{type(error).__name__}: {error}"
        assert is_patched(model) == (Channel.world().rank == 0), "rank 1's is given back at once"
        groups = [ref(group) for group in distributed_c10d._world.pg_map]
        # Under the exception, whose traceback has the engine.
        shutdown(None)
        if isinstance(error, RankOutOfMemoryError):
            assert not any(group() for group in groups), "its connections are left"
    return text


def test_starting_is_watched_too() -> None:
    other, failing = run_ranks(run_out_while_starting, 2)
    what = (
        r"rank 1 \(.*\) ran out of memory in deepspeed\.initialize: "
        r"asked for 1,048,576\.00 GiB \(about 1,125,899,906,842,624 bytes\) on cpu"
    )
    assert re.match(f"RankOutOfMemoryError: {what}.*offload_param", failing), failing
    assert re.match(f"PeerError: {what}", other), other


def run_out_and_go_on() -> None:
    """Every rank runs out at once, catches it, and trains on with less."""
    engine = start(stage=1)
    layer = engine.module.get_decoder().layers[1]
    hook = layer.register_forward_hook(allocate_too_much)
    try:
        train_step(engine)
    except torch.OutOfMemoryError:
        hook.remove()
    for _ in range(2):
        train_step(engine)
    Channel.world().barrier()
    error = RuntimeError("of another kind")
    assert explain(error) is None, "a note that nobody stands by any more explains nothing"
    engine.ds_lvx.close()
    assert not {"forward", "backward", "step"} & vars(engine).keys(), "still watched"


@pytest.mark.slow
def test_who_catches_it_can_go_on() -> None:
    run_ranks(run_out_and_go_on, 2)


def raise_and_close() -> None:
    engine = start(stage=1)
    error = RuntimeError("size mismatch, got 2, expected 3")

    def refuse(*_: Any) -> None:
        raise error

    handle = engine.module.register_forward_hook(refuse)
    with pytest.raises(RuntimeError) as caught:
        train_step(engine)
    assert caught.value is error, "the error is another"
    assert error.__cause__ is None, "the error has got a cause"
    handle.remove()

    theirs = functools.partial(engine.step)
    engine.step = theirs  # as accelerate does
    engine.ds_lvx.close()
    engine.ds_lvx.close()
    assert engine.step is theirs, "a patch that is not ours is gone"
    assert "forward" not in vars(engine), "still watched"


def test_other_errors_pass_and_other_patches_stay() -> None:
    run_ranks(raise_and_close, 2)


# ---- errors by themselves

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB"


def agreed() -> RuntimeError:
    """What `Channel.agree` raises on the rank whose error it is."""
    error = RuntimeError(f"rank 1: {CUDA}")
    error.__cause__ = torch.OutOfMemoryError(CUDA)
    return error


def errors() -> dict[str, tuple[Exception, str]]:
    return {
        "cuda": (torch.OutOfMemoryError(CUDA), "2.50 GiB (about 2,684,354,560 bytes)"),
        "small": (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes. GPU 0"),
            "0.00 GiB (512 bytes)",
        ),
        "agreed": (agreed(), "2.50 GiB (about 2,684,354,560 bytes)"),
        "python": (MemoryError(), "a size that its error does not give"),
        "numpy": (
            MemoryError("Unable to allocate 16.0 MiB for an array with shape (4096, 4096)"),
            "0.02 GiB (about 16,777,216 bytes)",
        ),
        "C++": (RuntimeError("std::bad_alloc"), "a size that its error does not give"),
        "cublas": (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "a size that its error does not give",
        ),
        "shared": (
            RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
            "0.00 GiB (4,096 bytes)",
        ),
    }


@pytest.mark.parametrize("name", errors())
def test_every_kind_of_it_is_recognised(name: str) -> None:
    error, size = errors()[name]
    with pytest.raises(torch.OutOfMemoryError) as caught, named("forward"):
        raise error
    text = str(caught.value)
    assert text.startswith(f"rank 0 (host {socket.gethostname()}) ran out of memory in forward")
    assert f"asked for {size} on cpu" in text
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(f"rank 1: {CUDA}"),  # agreed on, and another rank's
        NotImplementedError("no offload of memory on a CPU"),
        ValueError("got too little memory"),
        KeyboardInterrupt(),
    ],
    ids=["shapes", "other rank", "not implemented", "value", "interrupt"],
)
def test_no_other_error_is_touched(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, named("forward"):
        raise error
    assert caught.value is error
    assert error.__cause__ is None


def test_an_error_is_named_once() -> None:
    with pytest.raises(RankOutOfMemoryError) as caught, named("outside"), named("inside"):
        raise MemoryError
    assert "in inside" in str(caught.value)
    assert isinstance(caught.value.__cause__, MemoryError)
