"""Operations and bytes of attention, counted by hand, and the floor that they make."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.roofline import Work, floor, work
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.compare.operators.tensors import Shape
from ds_lvx.plan.cards import card

ONE_QUERY = Shape(1, 128_080, heads=32, kv_heads=8, head_dim=128)
MANY = Shape(4096, 128_080, heads=32, kv_heads=8, head_dim=128)


def test_operations_are_those_that_pytorch_counts() -> None:
    shape = Shape(12, 40, heads=4, kv_heads=4, head_dim=8, batch=2)
    q = torch.randn(2, 12, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 40, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        out, _ = attention_oracle(q, k, v, visibility=None, softmax_scale=1.0)
    assert counter.get_total_flops() == work(shape, "forward").flops
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Autograd keeps P; a fused backward makes q kT once more.
    again = 2 * 2 * 12 * 40 * 4 * 8
    assert counter.get_total_flops() + again == work(shape, "backward").flops


def test_every_tensor_counts_once() -> None:
    shape = Shape(3, 5, heads=4, kv_heads=2, head_dim=8, batch=2)
    q, k, lse = 2 * 3 * 4 * 8 * 2, 2 * 5 * 2 * 8 * 2, 2 * 3 * 4 * 4
    assert work(shape, "forward").memory_bytes == q + 2 * k + q + lse
    assert work(shape, "backward").memory_bytes == 2 * q + 2 * k + 2 * lse + q + 2 * k


def test_what_is_not_visible_is_not_computed_and_what_nobody_sees_is_not_read() -> None:
    plain = Shape(4, 16, heads=1, kv_heads=1, head_dim=8)
    for direction in ("forward", "backward"):
        whole = work(plain, direction)
        quarter = work(plain, direction, visible=0.25, seen=0.5)
        assert quarter.flops == 0.25 * whole.flops
        # Half of K and V is not read; dk and dv are written for every key.
        assert whole.memory_bytes - quarter.memory_bytes == 2 * 8 * 8 * 2


@pytest.mark.parametrize("name", ["A100-80", "H200"])
def test_few_queries_wait_for_memory_and_many_for_products(name: str) -> None:
    device = card(name)
    rates = device.matrix_flops, device.memory_bytes_per_s
    few, many = (floor(work(shape, "forward"), *rates) for shape in (ONE_QUERY, MANY))
    assert few.bound == "memory"
    assert few.seconds == work(ONE_QUERY, "forward").memory_bytes / device.memory_bytes_per_s
    assert many.bound == "matrix"
    assert many.seconds == work(MANY, "forward").flops / device.matrix_flops


def test_both_at_once_take_as_long_as_the_longer() -> None:
    device = card("H100")
    done = Work(flops=device.matrix_flops, memory_bytes=2 * device.memory_bytes_per_s)
    found = floor(done, device.matrix_flops, device.memory_bytes_per_s)
    assert found.seconds == pytest.approx(2.0)
    assert found.bound == "memory"
