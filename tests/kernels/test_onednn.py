"""oneDNN's fp32 products: in fp32, and the process's setting as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from ds_lvx.kernels import onednn

SHAPES = [(16, 64, 256), (64, 64, 1024), (256, 80, 1024), (1024, 128, 250)]


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    onednn.serves.cache_clear()
    yield
    onednn.serves.cache_clear()


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_products_are_in_fp32(rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, rows, inner), torch.randn(2, columns, inner)
    with onednn.products():
        scores = torch.bmm(left, right.transpose(1, 2))
        back = torch.bmm(scores.transpose(1, 2), left)
    exact = torch.bmm(left.double(), right.double().transpose(1, 2))
    # Rounded to bf16, a product misses by 2^-9 of its terms.
    torch.testing.assert_close(scores.double(), exact, atol=2e-5, rtol=1e-6)
    exact = torch.bmm(scores.double().transpose(1, 2), left.double())
    torch.testing.assert_close(back.double(), exact, atol=2e-3, rtol=1e-6)


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_the_setting_is_as_before(before: str) -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    at_first, matmul.fp32_precision = matmul.fp32_precision, before

    def interrupted() -> None:
        with onednn.products():
            assert not onednn.serves() or matmul.fp32_precision == "bf16"
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = at_first


def test_the_trial_is_in_fp32_whoever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that does not round, under a default or an autocast that does."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(onednn, "_setting", lambda precision: nullcontext())
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.serves()
    onednn.serves.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert onednn.serves()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_processor_that_rounds_is_found_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def rounding(precision: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            product = torch.bmm
            rounded = lambda a, b: product(a.bfloat16().float(), b.bfloat16().float())  # noqa: E731
            patch.setattr(torch, "bmm", rounded)
            yield

    monkeypatch.setattr(onednn, "_setting", rounding)
    assert not onednn.serves()
