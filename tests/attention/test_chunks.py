"""K and V projected and attended chunk by chunk: exact, and never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import ds_lvx
from ds_lvx import Visibility
from ds_lvx.attention.features import Chunks, chunk_lengths
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.kernels.interface import Problem
from ds_lvx.kernels.native import NativeKernel
from tests.attention.test_recompute import (
    BATCH,
    KV_LENGTHS,
    Q_LENGTHS,
    Projection,
    assert_gradients,
    cut,
    inputs,
)
from tests.ranks import run_ranks


def whole_visibility() -> Visibility:
    """Runs of keys, keys that nobody sees, a query that sees none."""
    queries, keys = torch.arange(sum(Q_LENGTHS)), torch.arange(sum(KV_LENGTHS))
    start, end, position = queries - 1, queries + 2, keys // 5
    end[2] = start[2]
    position[::7] = -5
    rows = [part.to(torch.int32).repeat(BATCH, 1) for part in (start, end, position)]
    return Visibility(*rows)


def shard_of(visibility: Visibility, rank: int) -> Visibility:
    return Visibility(
        cut(visibility.q_start, Q_LENGTHS, rank),
        cut(visibility.q_end, Q_LENGTHS, rank),
        cut(visibility.kv_pos, KV_LENGTHS, rank),
    )


def run_chunked(chunk: int, sees: bool) -> dict[str, Any]:
    """Two layers over the same features, and how often hooks of their weights fire."""
    rank = torch.distributed.get_rank()
    given = inputs()
    q = cut(given["q"], Q_LENGTHS, rank).requires_grad_()
    features = cut(given["features"], KV_LENGTHS, rank).requires_grad_()
    visibility = shard_of(whole_visibility(), rank) if sees else None
    projections = [Projection() for _ in range(2)]
    fired = [0, 0]
    for index, projection in enumerate(projections):

        def count(_: Tensor, index: int = index) -> None:
            fired[index] += 1

        projection.weight.register_post_accumulate_grad_hook(count)
    x = q
    for projection in projections:
        x = x + ds_lvx.lv_xattn_recompute(
            x, features, projection, visibility=visibility, kv_chunk_tokens=chunk
        )
    (x * cut(given["dout"], Q_LENGTHS, rank)).sum().backward()
    return {
        "out": x.detach(),
        "dq": q.grad,
        "dfeatures": features.grad,
        "dweights": [projection.weight.grad for projection in projections],
        "calls": [projection.calls for projection in projections],
        "fired": fired,
    }


@pytest.mark.parametrize(
    ("chunk", "sees"),
    [pytest.param(1, True, marks=pytest.mark.exhaustive), (4, False), (4, True), (1000, False)],
)
def test_chunks_give_the_gradients_of_the_whole(chunk: int, sees: bool) -> None:
    answers = run_ranks(run_chunked, 3, chunk, sees)
    exact = {name: value.double().requires_grad_() for name, value in inputs().items()}
    projections = [Projection().double() for _ in range(2)]
    visibility = whole_visibility() if sees else None
    x = exact["q"]
    for projection in projections:
        x = x + attention_oracle(x, *projection(exact["features"]), visibility=visibility)[0]
    (x * exact["dout"]).sum().backward()
    assert_gradients(answers, x, exact, projections)
    chunks = -(-max(KV_LENGTHS) // chunk)
    for answer in answers:
        assert answer["calls"] == [2 * chunks] * 2  # as often on every rank: ZeRO-3 needs that
        assert answer["fired"] == [1, 1]


def run_dropout(chunk: int) -> list[Tensor]:
    """Gradients of chunks with dropout in the projection, and of the same numbers kept."""
    results = []
    lengths = chunk_lengths((20,), 0, chunk)
    for recompute in (True, False):
        torch.manual_seed(3)
        q = torch.randn(1, 6, 4, 16, requires_grad=True)
        features = torch.randn(1, 20, 24, requires_grad=True)
        projection = Projection(dropout=0.4)
        if recompute:
            out = ds_lvx.lv_xattn_recompute(q, features, projection, kv_chunk_tokens=chunk)
        else:
            parts = [projection(part) for part in features.split(lengths, dim=1)]
            k, v = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
            out = ds_lvx.lv_xattn(q, k, v)
        torch.rand(5)  # moves the generator on: backward must not depend on it
        out.square().sum().backward()
        results.append([out, q.grad, features.grad, projection.weight.grad, torch.rand(3)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    return results[0]


@pytest.mark.parametrize("chunk", [3, 20])
def test_dropout_falls_alike_in_both_runs_of_a_chunk(chunk: int) -> None:
    run_dropout(chunk)


def test_k_and_v_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spying(function: Callable[..., Any]) -> Callable[..., Any]:
        def spied(self: Any, problem: Problem, *args: Any, **kwargs: Any) -> Any:
            seen.append(problem.k.shape[1])
            return function(self, problem, *args, **kwargs)

        return spied

    for name in ("forward", "fold", "backward"):
        monkeypatch.setattr(NativeKernel, name, spying(getattr(NativeKernel, name)))
    q, features = torch.randn(1, 4, 4, 16, requires_grad=True), torch.randn(1, 50, 24)
    projection = Projection()
    ds_lvx.lv_xattn_recompute(q, features, projection, kv_chunk_tokens=8).sum().backward()
    assert sum(seen) == 2 * 50
    assert max(seen) <= 8


class Branching(Projection):
    """A projection that uses one of its parameters for chunks of more than one token only."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((24,), 1.5))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(features * self.gain if features.shape[1] > 1 else features)


def test_a_parameter_that_the_last_chunk_does_not_use_keeps_its_gradient() -> None:
    torch.manual_seed(2)
    q, features = torch.randn(1, 4, 4, 16), torch.randn(1, 5, 24)
    projection = Branching()
    fired: list[Tensor] = []
    projection.gain.register_post_accumulate_grad_hook(fired.append)
    ds_lvx.lv_xattn_recompute(q, features, projection, kv_chunk_tokens=2).square().sum().backward()
    chunked = Branching()
    parts = [chunked(part) for part in features.split([2, 2, 1], dim=1)]
    k, v = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    ds_lvx.lv_xattn(q, k, v).square().sum().backward()
    assert len(fired) == 1
    for name, parameter in chunked.named_parameters():
        found = dict(projection.named_parameters())[name].grad
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-5)


def run_16_bits(chunk: int | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, 32, 4, 16).bfloat16().requires_grad_()
    features = torch.randn(1, 400, 24).bfloat16().requires_grad_()
    projection = Projection().bfloat16()
    out = ds_lvx.lv_xattn_recompute(q, features, projection, kv_chunk_tokens=chunk)
    out.backward(torch.randn(out.shape).bfloat16())
    found = {"out": out, "dq": q.grad, "df": features.grad, "dw": projection.weight.grad}
    return {name: tensor.double() for name, tensor in found.items() if tensor is not None}


def test_16_bits_lose_nothing_by_chunks() -> None:
    whole, chunked = run_16_bits(None), run_16_bits(16)
    torch.manual_seed(0)
    q = torch.randn(1, 32, 4, 16).bfloat16().double().requires_grad_()
    features = torch.randn(1, 400, 24).bfloat16().double().requires_grad_()
    projection = Projection().bfloat16().double()
    out = attention_oracle(q, *projection(features))[0]
    out.backward(torch.randn(out.shape).bfloat16().double())
    exact = {"out": out, "dq": q.grad, "df": features.grad, "dw": projection.weight.grad}
    for name, expected in exact.items():
        assert expected is not None
        errors = [(got[name] - expected).abs().max() for got in (chunked, whole)]
        assert errors[0] <= 1.5 * errors[1], name


def test_frozen_parts_stay_without_gradients() -> None:
    q, features = torch.randn(1, 4, 4, 16, requires_grad=True), torch.randn(1, 9, 24)
    projection = Projection().requires_grad_(False)
    ds_lvx.lv_xattn_recompute(q, features, projection, kv_chunk_tokens=2).sum().backward()
    assert projection.weight.grad is None
    features.requires_grad_()
    ds_lvx.lv_xattn_recompute(q, features, projection, kv_chunk_tokens=2).sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "8"])
def test_a_bad_chunk_is_an_error(chunk: Any) -> None:
    q, features = torch.randn(1, 4, 4, 16), torch.randn(1, 9, 24)
    with pytest.raises(ValueError, match=r"kv_chunk_tokens: got .*; expected 1 or more tokens"):
        ds_lvx.lv_xattn_recompute(q, features, Projection(), kv_chunk_tokens=chunk)


def test_a_ring_of_chunks_is_an_error() -> None:
    q, features = torch.randn(1, 4, 4, 16), torch.randn(1, 9, 24)
    with pytest.raises(NotImplementedError, match=r"use schedule 'gather'"):
        ds_lvx.lv_xattn_recompute(q, features, Projection(), kv_chunk_tokens=2, schedule="ring")


@pytest.mark.parametrize("lengths", [(10, 0, 3), (7,), (0, 0), (1, 100)])
@pytest.mark.parametrize("chunk", [1, 4, 64, None])
def test_every_rank_has_as_many_chunks(lengths: tuple[int, ...], chunk: int | None) -> None:
    cuts = [chunk_lengths(lengths, rank, chunk) for rank in range(len(lengths))]
    assert [sum(parts) for parts in cuts] == list(lengths)
    assert len({len(parts) for parts in cuts}) == 1
    assert len(cuts[0]) == (1 if chunk is None else max(-(-max(lengths) // chunk), 1))
    assert all(part <= (chunk or max(lengths)) for parts in cuts for part in parts)


class FakeStream:
    """A stream on a machine without one: everything happens at once, and who waits is noted."""

    waits: ClassVar[list[str]] = []

    def __init__(self, device: torch.device, name: str = "copies") -> None:
        self.name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, *exc: object) -> None:
        return

    def wait_stream(self, other: Any) -> None:
        self.waits.append(f"{self.name} for {other.name}")


def test_a_stream_of_features_is_one_chunk_ahead_in_two_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = FakeStream(torch.device("cpu"), "current")
    monkeypatch.setattr(FakeStream, "waits", [])
    monkeypatch.setattr(torch, "Stream", FakeStream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    monkeypatch.setattr(Chunks, "on_host", True)
    copy = Chunks._copy

    def noted(self: Chunks, tokens: slice, buffer: Tensor) -> Tensor:
        FakeStream.waits.append(f"copy to {tokens.stop}")
        return copy(self, tokens, buffer)

    monkeypatch.setattr(Chunks, "_copy", noted)
    features = torch.randn(2, 17, 3)
    places = []
    for tokens, part in Chunks(features, [4, 0, 6, 5, 2], torch.device("cpu")):
        FakeStream.waits.append(f"use to {tokens.stop}")
        assert torch.equal(part, features[:, tokens])
        assert part.is_contiguous()
        places.append(part.untyped_storage().data_ptr())
    assert len(set(places)) == 2
    assert places[0] == places[2] == places[4]
    # The copy into a buffer waits for all that came before the use of the other one was asked for.
    assert FakeStream.waits[:8] == [
        *("copies for current", "copy to 4"),
        *("current for copies", "copies for current", "copy to 4", "use to 4"),
        *("current for copies", "copies for current"),
    ]
    assert FakeStream.waits[-2:] == ["use to 17", "current for copies"]
    assert FakeStream.waits.count("copies for current") == 5


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
def test_features_from_the_host_are_those_of_the_device(trains: bool) -> None:
    results = []
    for offloads in (False, True):
        torch.manual_seed(0)
        q = torch.randn(2, 40, 4, 16, device="cuda", requires_grad=True)
        features = torch.randn(2, 900, 24, device="cuda", requires_grad=trains)
        shared = ds_lvx.attention.features.offload(features) if offloads else features
        assert (shared.device.type == "cpu") == offloads
        projections = [Projection().cuda() for _ in range(3)]
        x = q
        for projection in projections:
            x = x + ds_lvx.lv_xattn_recompute(x, shared, projection, kv_chunk_tokens=128)
        x.square().sum().backward()
        found = [x, q.grad, *(projection.weight.grad for projection in projections)]
        results.append([*found, features.grad] if trains else found)
    for kept, streamed in zip(*results, strict=True):
        assert torch.equal(kept, streamed)


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
def test_the_device_holds_two_chunks_however_many_there_are(trains: bool) -> None:
    """By the allocator. The host launches all layers without a wait, and so is far ahead."""
    q = torch.randn(1, 32, 4, 16, device="cuda", requires_grad=True)
    projections = [Projection().cuda() for _ in range(4)]
    peaks = []
    for chunks in (4, 4, 64):  # the first compiles
        features = torch.randn(1, chunks * 8192, 24, pin_memory=True).requires_grad_(trains)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, x = torch.cuda.memory_allocated(), q
        for projection in projections:
            x = x + ds_lvx.lv_xattn_recompute(x, features, projection, kv_chunk_tokens=8192)
        x.square().sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 0 < peaks[2] <= 1.05 * peaks[1]
