"""Of which arguments Triton compiles another kernel: not of a text's length, nor of where it lies.

Triton's own binder makes the key under which a compiled kernel is kept; no GPU is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from ds_lvx import Visibility
from ds_lvx.kernels import triton_kernel, triton_parts
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.triton_kernel import TritonKernel

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the kernels are compiled: a GPU is there"
)
HEADS, KV_HEADS, HEAD_DIM, RANKS = 4, 2, 16, 3


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By kernel, the keys that its launches ask for; none is run."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: dict[str, set[str]] = {}

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = JITFunction(kernel.fn, **kernel.kwargs)
        bind = create_function_from_signature(compiled.signature, compiled.params, backend)
        _, specialization, options = bind(*args, **kwargs)
        key = compute_cache_key({}, specialization, options)
        found.setdefault(kernel.fn.__name__, set()).add(key)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    monkeypatch.setattr(triton_kernel, "processors", lambda tensor: 132)
    return found


def attend(queries: int, keys: int, *, first: int = 0, batch: int = 1) -> None:
    """Forward and backward of a part of a rule, the keys from ``first`` on."""
    sizes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    q, k, v = (torch.zeros(batch, n, h, HEAD_DIM, dtype=torch.bfloat16) for n, h in sizes)
    place = torch.arange(queries + keys + first, dtype=torch.int32).expand(batch, -1)
    whole = Visibility(place[:, : queries + first], place[:, : queries + first] + 9, place)
    gaps = replace(whole, gap_start=whole.q_start, gap_end=whole.q_end)
    part = slice(first, first + queries), slice(first, first + keys)
    for sees in (Rule(whole).part(*part), Rule(gaps).part(*part), None):
        problem = Problem(q, k, v, sees, softmax_scale=0.1 * queries, partial=True)
        out, lse = TritonKernel().forward(problem)
        TritonKernel().fold(problem, (out, lse))
        TritonKernel().backward(problem, Upstream(q, lse, lse))


def send(rows: int, batch: int = 1) -> None:
    """A part encoded into the rows of a message, and parts of all ranks joined."""
    numbers = batch * HEADS * HEAD_DIM
    part = torch.zeros(batch, rows, HEADS, HEAD_DIM)
    message = torch.zeros(RANKS, rows, 2 * numbers + 16 * batch, dtype=torch.uint8)

    def of(rank: slice | int) -> tuple[Tensor, Tensor]:
        row = message[rank]
        half = row[..., : 2 * numbers].view(torch.float16).unflatten(-1, (batch, HEADS, HEAD_DIM))
        factor = row[..., 2 * numbers :].view(torch.float32)[..., :batch]
        return half.movedim(-4, -3), factor.movedim(-2, -1)

    half, factor = of(1)
    triton_parts.encode(part, half, factor)
    lse = torch.zeros(RANKS, batch, HEADS, rows)
    for mine in range(RANKS):
        triton_parts.join(*of(slice(None)), lse, part, mine)


LENGTHS = (1000, 1001, 1008, 1024, 1331)


def attend_to_each(length: int) -> None:
    attend(length, 4 * length)
    attend(1000, 4 * length)
    attend(1000, 4001, first=length)
    attend(1000, 4001, first=length, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize("ask", [attend_to_each, send], ids=["attention", "parts"])
def test_another_length_is_the_same_kernel(
    ask: Callable[[int], None], keys: dict[str, set[str]]
) -> None:
    for length in LENGTHS:
        ask(length)
    of_rules = dict.fromkeys(("forward_kernel", "queries_kernel", "keys_kernel"), 3)
    expected = {**of_rules, "merge_kernel": 2}  # without a rule, with one, with gaps; and folding
    if ask is send:
        expected = {"encode_kernel": 1, "join_kernel": 1}
    assert {name: len(found) for name, found in keys.items()} == expected
