"""Attention by plain matrix products: what it keeps between blocks, and who must not see it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx.kernels import dense
from tests.largest import LargestTensor

OPTIONS: dict[str, Any] = {"mask": None, "softmax_scale": 0.3, "dtype": torch.float32}


def inputs(seed: int, *, queries: int = 32, keys: int = 512) -> list[Tensor]:
    """q, k, v, dout, lse and delta; 4 query heads, 2 of K and V, of 16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, queries, 4, 16), *[(2, keys, 2, 16)] * 2, (2, queries, 4, 16)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return tensors + [torch.rand(2, 4, queries, generator=generator) + 6 for _ in range(2)]


def both_passes(tensors: list[Tensor]) -> list[Tensor]:
    return [*dense.forward(*tensors[:3], **OPTIONS), *dense.backward(*tensors, **OPTIONS)]


def exactly(tensors: list[Tensor]) -> list[Tensor]:
    """`both_passes` in float64, written out over all keys."""
    q, k, v, dout, lse, delta = (tensor.double() for tensor in tensors)
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    scores = 0.3 * torch.einsum("bshd,bthd->bhst", q, k)
    out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    weights = (scores - lse[..., None]).exp()
    dscores = weights * (torch.einsum("bshd,bthd->bhst", dout, v) - delta[..., None])
    dq = 0.3 * torch.einsum("bhst,bthd->bshd", dscores, k)
    dk = 0.3 * torch.einsum("bhst,bshd->bthd", dscores, q)
    dv = torch.einsum("bhst,bshd->bthd", weights, dout)
    dk, dv = (t.unflatten(2, (2, 2)).sum(dim=3) for t in (dk, dv))
    return [out, scores.logsumexp(-1), dq, dk, dv]


def assert_right(found: list[Tensor], tensors: list[Tensor]) -> None:
    for one, exact in zip(found, exactly(tensors), strict=True):
        torch.testing.assert_close(one.double(), exact, atol=1e-4, rtol=1e-4)


def test_results_are_the_callers_own() -> None:
    """The next block, of whatever shape, does not write over them."""
    blocks = [inputs(0), inputs(1, queries=64), inputs(2, keys=96), inputs(3)]
    found = [both_passes(tensors) for tensors in blocks]
    for results, tensors in zip(found, blocks, strict=True):
        assert_right(results, tensors)


def test_threads_do_not_write_over_each_other() -> None:
    """Backward may run on autograd's threads while another model's forward runs."""
    results: dict[int, list[list[Tensor]]] = {seed: [] for seed in range(4)}

    def work(seed: int) -> None:
        torch.set_num_threads(1)  # of this thread: pools of four, on two cores, would spin
        for _ in range(20):
            results[seed].append(both_passes(inputs(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, found in results.items():
        assert len(found) == 20
        for one in found:
            assert_right(one, inputs(seed))


def test_a_block_like_the_last_one_makes_no_scores_anew() -> None:
    tensors = inputs(0)
    scores = 2 * 4 * 32 * 512
    both_passes(tensors)
    with LargestTensor() as second:
        both_passes(tensors)
    assert 0 < second.elements < scores


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``reference`` kernel's scores, of all keys at once, go back to the system."""
    monkeypatch.setattr(dense, "_kept", dense._Kept())
    monkeypatch.setattr(dense, "_KEPT_BYTES", 2**16)
    tensors = inputs(0)
    assert_right(both_passes(tensors), tensors)
    assert all(kept.nbytes <= 2**16 for kept in dense._kept._buffers.values())


def test_inference_mode_leaves_nothing_that_training_cannot_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "_kept", dense._Kept())
    tensors = inputs(0)
    with torch.inference_mode():
        both_passes(tensors)
    assert_right(both_passes(tensors), tensors)


def test_autocast_does_not_reach_it() -> None:
    tensors = inputs(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = both_passes(tensors)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert_right(found, tensors)
