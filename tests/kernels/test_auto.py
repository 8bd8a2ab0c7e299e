"""The ``auto`` kernel: what it takes by rule and by a tuned table, and what it says."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_lvx import Visibility, cache
from ds_lvx.kernels import interface, native, warn
from ds_lvx.kernels.auto import AutoKernel
from ds_lvx.kernels.choice import candidates, describe, kernel_for
from ds_lvx.kernels.flash_kernel import FlashKernel
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.table import Table, kind_of, table_of
from tests.kernels.batches import BATCHES, text
from tests.kernels.fake_cuda import WithoutCuda, pretend_gpu
from tests.kernels.test_kernels import rule, tensors

SHAPE = (1, 5, 300, 4, 2, 16)


class Counted(NativeKernel):
    """The native kernel, that counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        return super().forward(problem)

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        self.calls.append("fold")
        super().fold(problem, running)

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("backward")
        return super().backward(*args, **kwargs)


class CountedFlash(Counted):
    """It serves what the flash kernel serves."""

    def serves(self, problem: Problem, upstream: Upstream | None = None) -> bool:
        return FlashKernel().serves(problem, upstream)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kept in (table_of, warn.warn_once, native._warn_of):
        kept.cache_clear()
    yield
    for kept in (table_of, warn.warn_once, native._warn_of):
        kept.cache_clear()


def kernels(*without: str) -> dict[str, interface.Kernel]:
    found = {"native": Counted(), "flash": CountedFlash(), "cudnn": CountedFlash()}
    return {n: k for n, k in (found | {"triton": Counted()}).items() if n not in without}


def table() -> Table:
    return Table("kernels-test.json")


def problem_of(sees: Visibility | None, shape: tuple[int, ...] = SHAPE) -> Problem:
    q, k, v = tensors(shape, torch.float32)
    return Problem(q, k, v, None if sees is None else Rule(sees), softmax_scale=0.2)


def upstream_of(problem: Problem, *, has_dlse: bool = False) -> Upstream:
    out, lse = NativeKernel().forward(problem)
    delta = (problem.q * out).sum(-1).transpose(1, 2)
    return Upstream(problem.q, lse, delta, has_dlse)


def test_the_rule() -> None:
    """Flash where slices make it up, else Triton, else native; each where it is there."""
    whole, causal = problem_of(None), problem_of(text(24), (1, 24, 24, 4, 2, 16))
    sliding = problem_of(BATCHES["a window that slides"].sees, (1, 40, 40, 4, 2, 16))
    for without, expected in (
        ((), ["flash", "flash", "triton"]),
        (("flash", "cudnn"), ["triton"] * 3),
        (("triton",), ["flash", "flash", "native"]),
        (("flash", "cudnn", "triton"), ["native"] * 3),
    ):
        auto = AutoKernel(kernels(*without), table())
        assert [auto.choice(each) for each in (whole, causal, sliding)] == expected
    auto = AutoKernel(kernels(), table())
    assert auto.choice(causal, upstream_of(causal)) == "flash"
    assert auto.choice(causal, upstream_of(causal, has_dlse=True)) == "triton"
    known_on_the_device = problem_of(text(24), (1, 24, 24, 4, 2, 16))
    assert known_on_the_device.rule is not None
    known_on_the_device.rule.host = None
    assert auto.choice(known_on_the_device) == "triton"


def test_what_is_chosen_computes() -> None:
    found = kernels()
    auto, problem = AutoKernel(found, table()), problem_of(rule(SHAPE, "none"))
    out, lse = auto.forward(problem)
    assert torch.equal(out, NativeKernel().forward(problem)[0])
    auto.fold(problem, (out, lse))
    auto.backward(problem, upstream_of(problem))
    assert {name: kernel.calls for name, kernel in found.items()} == {  # type: ignore[attr-defined]
        "native": [],
        "flash": ["forward", "fold", "backward"],
        "cudnn": [],
        "triton": [],
    }


def test_nothing_is_measured_and_nothing_is_written() -> None:
    found = kernels()
    auto, problem = AutoKernel(found, table()), problem_of(rule(SHAPE, "frames"))
    for _ in range(3):
        auto.forward(problem)
    assert sum(len(kernel.calls) for kernel in found.values()) == 3  # type: ignore[attr-defined]
    assert not list(cache.folder().glob("kernels-*"))


def test_a_question_is_answered_once() -> None:
    """Layers of a batch ask the same of one rule; another rule, shape or direction is another."""
    found = kernels()
    auto, first = AutoKernel(found, table()), problem_of(rule(SHAPE, "frames"))
    choice = AutoKernel.choice
    with mock.patch.object(AutoKernel, "choice", autospec=True, side_effect=choice) as asked:
        for problem in (first, first.as_part(), replace(first, softmax_scale=0.3)):
            auto.forward(problem)
            auto.fold(problem, NativeKernel().forward(first))
        assert asked.call_count == 1
        for upstream in (upstream_of(first), upstream_of(first, has_dlse=True)):
            for _ in range(2):
                auto.backward(first, upstream)
        assert asked.call_count == 3
        auto.forward(problem_of(rule(SHAPE, "frames")))
        auto.forward(replace(first, rule=None))
        assert asked.call_count == 5


@pytest.mark.slow
def test_answers_are_not_kept_for_ever() -> None:
    """A text that grows by a token asks another question for each, and a batch has its rules."""
    auto = AutoKernel(kernels(), table())
    for keys in range(1, 600):
        q, k, v = tensors((1, 1, keys, 1, 1, 8), torch.float32)
        auto.forward(Problem(q, k, v, softmax_scale=0.2))
    assert sum(map(len, auto._answers.values())) <= 256
    for _ in range(3):
        auto.forward(problem_of(rule(SHAPE, "frames")))
    gc.collect()
    assert len(auto._answers) == 1  # of calls without a rule


def test_the_table_goes_before_the_rule() -> None:
    """By kind and direction; what the table's kernel does not serve, the rule decides."""
    whole = problem_of(None)
    upstream, dlse = upstream_of(whole), upstream_of(whole, has_dlse=True)
    held = table()
    held.add(kind_of(whole, None), {"chosen": "cudnn"})
    held.add(kind_of(whole, upstream), {"chosen": "triton"})
    held.add(kind_of(whole, dlse), {"chosen": "cudnn"})
    auto = AutoKernel(kernels(), table())
    assert auto.choice(whole) == "cudnn"
    assert auto.choice(whole.as_part()) == "cudnn"
    assert auto.choice(whole, upstream) == "triton"
    assert auto.choice(whole, dlse) == "triton"
    assert AutoKernel(kernels("cudnn"), table()).choice(whole) == "flash"
    other = problem_of(None, (1, 5, 700, 4, 2, 16))
    assert auto.choice(other) == "flash"


def entries() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cache.folder() / "kernels-test.json").read_text())
    return found


def test_a_later_tuning_takes_the_place_of_an_earlier_one() -> None:
    first, second = table(), table()
    first.add("kind", {"chosen": "native"})
    first.add("other", {"chosen": "triton"})
    second.add("kind", {"chosen": "triton"})
    assert second.entries()["kind"] == {"chosen": "triton"}
    assert entries() == {"kind": {"chosen": "triton"}, "other": {"chosen": "triton"}}


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    table = Table("kernels-test.json")
    table.add("kind", {"chosen": "native"})
    assert table.entries() == {"kind": {"chosen": "native"}}


def test_a_damaged_file_is_no_table() -> None:
    path = cache.folder() / "kernels-test.json"
    path.parent.mkdir()
    path.write_text("{")
    assert table().entries() == {}


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


@pytest.fixture
def _some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)


def on_cuda(dtype: torch.dtype, head_dim: int = 64) -> Tensor:
    with FakeTensorMode():
        return torch.empty(1, 1, 4, head_dim, dtype=dtype, device="cuda")


@pytest.mark.usefixtures("_some_gpu")
def test_the_candidates_of_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    triton = ["triton", "triton_atomic"]
    assert list(candidates(on_cuda(torch.bfloat16))) == ["native", "flash", "cudnn", *triton]
    assert list(candidates(on_cuda(torch.float32))) == ["native", *triton]
    assert list(candidates(on_cuda(torch.float64))) == ["native"]
    lines = describe(on_cuda(torch.bfloat16))
    assert lines[0] == (
        "cudnn where all see all, or a few large slices make up the rule (shapes that come often), "
        "triton for other rules"
    )
    assert lines[1] == "no kind tuned on this card: ds-lvx doctor --tune"
    assert describe(on_cuda(torch.float32))[0] == "triton"
    assert isinstance(kernel_for("auto", on_cuda(torch.bfloat16)), AutoKernel)
    assert not caplog.records


@pytest.mark.usefixtures("_some_gpu")
def test_a_table_of_another_card_is_ignored_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    Table("kernels-nvidia-a100-0123456789ab.json").add("kind", {"chosen": "native"})
    for _ in range(2):
        auto = kernel_for("auto", on_cuda(torch.bfloat16))
    assert isinstance(auto, AutoKernel)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for word in ("another card", "ignored", "kernels-nvidia-a100-0123456789ab.json", "--tune"):
        assert word in record.message
    assert any("ignored" in line for line in describe(on_cuda(torch.bfloat16)))
    table_of(torch.device("cuda", 0)).add(
        "kind", {"chosen": "flash", "seconds": {}, "excluded": {}}
    )
    lines = describe(on_cuda(torch.bfloat16))
    assert not any("ignored" in line for line in lines)
    assert lines[-1] == "kind: flash ()"


@pytest.mark.usefixtures("_some_gpu")
@pytest.mark.parametrize("direction", ["forward", "fold", "backward"])
def test_products_in_fp32_on_a_gpu_are_said_once(
    direction: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What they are of, and what would serve; of a call that PyTorch's kernels do, nothing."""

    def ask(dtype: torch.dtype, head_dim: int) -> None:
        with FakeTensorMode(), WithoutCuda():
            q, k = (torch.empty(1, n, 2, head_dim, dtype=dtype, device="cuda") for n in (3, 9))
            lse = torch.empty(1, 2, 3, device="cuda")
            problem = Problem(q, k, k, softmax_scale=0.1)
            if direction == "forward":
                NativeKernel().forward(problem)
            elif direction == "fold":
                NativeKernel().fold(problem, (torch.empty_like(q, dtype=torch.float32), lse))
            else:
                NativeKernel().backward(problem, Upstream(q, lse, lse))

    ask(torch.bfloat16, 64)
    assert not caplog.records
    for _ in range(2):
        ask(torch.float64, 33)
    (record,) = caplog.records
    for word in ("torch.float64", "head_dim 33", "'flash' for torch.float64", "'triton' for"):
        assert word in record.message


def test_only_the_first_rank_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Second:
        rank = 1

    monkeypatch.setattr(warn.Channel, "world", lambda: Second)
    warn.warn_once("something")
    assert not caplog.records
