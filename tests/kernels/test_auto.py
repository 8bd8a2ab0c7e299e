"""The ``auto`` kernel: what it measures, takes, keeps on disk, and refuses to take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx import Visibility, cache
from ds_lvx.config.registry import KERNELS
from ds_lvx.kernels import cudnn, interface
from ds_lvx.kernels.auto import AutoKernel, Table, kind_of
from ds_lvx.kernels.choice import candidates, describe, kernel_for, obstacle
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.rule import Rule
from tests.kernels.asking import backward, fold, forward
from tests.kernels.test_kernels import rule, tensors

SHAPE = (1, 5, 300, 4, 2, 16)


class Timed(NativeKernel):
    """The native kernel, at a price that a test sets."""

    def __init__(self, price: float, *, error: float = 0.0) -> None:
        self.price, self.error, self.calls = price, error, 0

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        out, lse = super().forward(*args, **kwargs)
        return out * (1.0 + self.error), lse

    def fold(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        super().fold(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        return super().backward(*args, **kwargs)


class Broken(Timed):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such kernel\nat line 7")


class Full(Timed):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")


def clock_of(kernels: dict[str, Timed]) -> Callable[[Callable[[], Any]], float]:
    """Seconds by price: whose count of calls a run raises."""

    def seconds(run: Callable[[], Any]) -> float:
        before = {name: kernel.calls for name, kernel in kernels.items()}
        run()
        (name,) = [name for name, kernel in kernels.items() if kernel.calls > before[name]]
        return kernels[name].price

    return seconds


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def auto(kernels: dict[str, Timed]) -> AutoKernel:
    return AutoKernel(kernels, Table("kernels-test.json"), clock_of(kernels))


def attend(kernel: interface.Kernel, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    q, k, v = tensors(SHAPE, dtype)
    return forward(kernel, q, k, v, visibility=rule(SHAPE, "frames"), softmax_scale=0.2)


def entries() -> dict[str, Any]:
    return json.loads((cache.folder() / "kernels-test.json").read_text())


def test_the_fastest_is_taken_and_measured_once() -> None:
    kernels = {"native": Timed(3.0), "quick": Timed(1.0), "slow": Timed(5.0)}
    out, lse = attend(auto(kernels))
    expected = attend(NativeKernel())
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    (entry,) = entries().values()
    assert entry["chosen"] == "quick"
    assert entry["seconds"] == {"native": 3.0, "quick": 1.0, "slow": 5.0}
    before = [kernel.calls for kernel in kernels.values()]
    attend(auto(kernels))  # a new one, as each call of an operator makes
    assert [kernel.calls for kernel in kernels.values()] == [
        before[0],
        before[1] + 1,
        before[2],
    ]


def test_directions_are_measured_apart() -> None:
    kernels = {"native": Timed(3.0), "quick": Timed(1.0)}
    kernel = auto(kernels)
    q, k, v = tensors(SHAPE, torch.float32)
    out, lse = forward(kernel, q, k, v, visibility=None, softmax_scale=0.2)
    kernels["quick"].price = 9.0
    delta = (q * out).sum(-1).transpose(1, 2)
    backward(kernel, q, k, v, q, lse, delta, visibility=None, softmax_scale=0.2, has_dlse=False)
    chosen = {kind.partition(",")[0]: entry["chosen"] for kind, entry in entries().items()}
    assert chosen == {"forward": "quick", "backward": "native"}


def test_folding_uses_what_is_fastest_in_forward() -> None:
    kernels = {"native": Timed(3.0), "quick": Timed(1.0)}
    q, k, v = tensors(SHAPE, torch.float32)
    running = forward(NativeKernel(), q, k, v, visibility=None, softmax_scale=0.2)
    expected = [tensor.clone() for tensor in running]
    fold(auto(kernels), q, k, v, running, visibility=None, softmax_scale=0.2)
    fold(NativeKernel(), q, k, v, (expected[0], expected[1]), visibility=None, softmax_scale=0.2)
    assert torch.equal(running[0], expected[0]), "measuring changed the running result"
    assert torch.equal(running[1], expected[1])
    (entry,) = entries().values()
    assert entry["chosen"] == "quick"


def test_wrong_and_broken_candidates_are_excluded() -> None:
    kernels = {"native": Timed(3.0), "wrong": Timed(1.0, error=0.1), "broken": Broken(1.0)}
    attend(auto(kernels))
    (entry,) = entries().values()
    assert entry["chosen"] == "native"
    assert entry["excluded"]["wrong"].startswith("differs from native by 1.0e-01")
    assert entry["excluded"]["broken"] == "RuntimeError: no such kernel"


def test_nothing_is_kept_of_a_call_that_says_nothing() -> None:
    """Out of memory, and numbers that are none: another call decides."""
    attend(auto({"native": Timed(3.0), "full": Full(1.0)}))
    kernels = {"native": Timed(3.0), "quick": Timed(1.0)}
    q, k, v = tensors(SHAPE, torch.float32)
    q[0, 0, 0, 0] = torch.nan
    forward(auto(kernels), q, k, v, visibility=None, softmax_scale=0.2)
    assert not (cache.folder() / "kernels-test.json").exists()


def test_whoever_was_first_holds_for_all() -> None:
    first, second = Table("kernels-test.json"), Table("kernels-test.json")
    first.add("kind", {"chosen": "native"})
    second.add("kind", {"chosen": "triton"})
    second.add("other", {"chosen": "triton"})
    assert second.entries()["kind"] == {"chosen": "native"}
    assert entries() == {"kind": {"chosen": "native"}, "other": {"chosen": "triton"}}


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    table = Table("kernels-test.json")
    table.add("kind", {"chosen": "native"})
    assert table.entries() == {"kind": {"chosen": "native"}}


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    path = cache.folder() / "kernels-test.json"
    path.parent.mkdir()
    path.write_text("{")
    attend(auto({"native": Timed(3.0), "quick": Timed(1.0)}))
    assert [entry["chosen"] for entry in entries().values()] == ["quick"]


def test_kinds() -> None:
    q, k = torch.empty(2, 192, 32, 128), torch.empty(2, 125_000, 8, 128)
    lse = torch.empty(2, 32, 192)

    def kind(q: Tensor, k: Tensor, upstream: Upstream | None = None) -> str:
        return kind_of(Problem(q, k, k, softmax_scale=1.0), upstream)

    one = kind(q, k)
    assert one == (
        "forward, float32, head_dim 128, 4 query heads a kv head, 16 kv heads in all, "
        "256 queries, 131072 keys"
    )
    assert kind(q[:, :150], k[:, :100_000]) == one
    assert kind(q[:, :100], k) != one
    assert kind(q, k, Upstream(q, lse, lse, has_dlse=True)).endswith(", dlse")
    causal = Visibility(*(torch.arange(n, n + 4).int()[None] for n in (0, 1, 0)))
    causal.q_start.zero_()
    seen = Problem(q[:1, :4], k[:1, :4], k[:1, :4], Rule(causal), softmax_scale=1.0)
    assert kind_of(seen, None).endswith(", visibility causal")


def test_off_cuda_there_is_one_candidate() -> None:
    q = torch.empty(1, 1, 1, 16)
    assert list(candidates(q)) == ["native"]
    assert kernel_for("auto", q).name == "native"
    assert describe(q)[0].startswith("native: the only one for torch.float32 on cpu")


def test_cudnn_is_called_as_pytorch_declares_it() -> None:
    """No GPU here: PyTorch's shape inference checks the arguments."""
    q, k, v = (t.to("meta") for t in tensors((2, 8, 64, 4, 2, 64), torch.bfloat16))
    out, lse = cudnn.forward(q, k, v, softmax_scale=0.1)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 8)
    gradients = cudnn.backward(q, k, v, q, lse, lse, softmax_scale=0.1)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
    able = KERNELS["cudnn"]
    assert obstacle(able, q) is None
    assert "torch.float32" in (obstacle(able, q.float()) or "")
    wide = torch.empty(1, 1, 1, 256, dtype=torch.bfloat16)
    assert "head_dim 256, where it does 8 to 128" in (obstacle(able, wide) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("visibility", ["none", "frames"])
def test_every_candidate_of_a_gpu_is_usable(visibility: str) -> None:
    """None of them is excluded, and the choice is kept."""
    shape = (1, 192, 5000, 8, 2, 64)
    q, k, v = (t.cuda() for t in tensors(shape, torch.bfloat16))
    sees = rule(shape, visibility)
    sees = None if sees is None else type(sees)(*(t.cuda() for t in vars(sees).values()))
    found = candidates(q)
    assert list(found) == ["native", "cudnn", "triton"]
    kernel = AutoKernel(found, Table("kernels-test.json"))
    out, lse = forward(kernel, q, k, v, visibility=sees, softmax_scale=0.1)
    delta = (q.float() * out.float()).sum(-1).transpose(1, 2)
    backward(kernel, q, k, v, q, lse, delta, visibility=sees, softmax_scale=0.1, has_dlse=False)
    for entry in entries().values():
        assert entry["excluded"] == {}
        assert entry["chosen"] in found
