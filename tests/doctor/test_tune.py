"""Tuning: what is measured, what is kept, what is only said."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx.cli import main
from ds_lvx.compare.operators.tensors import Shape
from ds_lvx.doctor import tune
from ds_lvx.kernels import warn
from ds_lvx.kernels.flash_kernel import FlashKernel
from ds_lvx.kernels.interface import Kernel, Problem
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.table import Table

SHAPE = Shape(6, 40, heads=4, kv_heads=2, head_dim=16, visibility="frames")
CPU = torch.device("cpu")


class Wrong(NativeKernel):
    """A fifth beside the truth."""

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(problem)
        return out * 1.2, lse

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(*args, **kwargs)
        return dq, dk * 1.2, dv


class Broken(NativeKernel):
    error: Exception = RuntimeError("no such kernel\nat line 7")

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        raise self.error


class Full(Broken):
    error = torch.OutOfMemoryError("tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    warn.warn_once.cache_clear()
    yield
    warn.warn_once.cache_clear()


def tuned(
    monkeypatch: pytest.MonkeyPatch, prices: dict[str, float], **kernels: Kernel
) -> dict[str, Any]:
    """Entries by direction of a tuning in which each kernel has its price."""
    found: dict[str, Kernel] = {"native": NativeKernel(), **kernels}
    monkeypatch.setattr(tune, "candidates", lambda q: found)
    of = {id(kernel): prices[name] for name, kernel in found.items()}

    def clock(once: Callable[[], Any]) -> float:
        once()
        return of[id(once.func.__self__)]  # type: ignore[attr-defined]

    table = Table("kernels-test.json")
    rows = dict(tune.tune(SHAPE, table, CPU, clock=clock))
    assert rows == table.entries() == Table("kernels-test.json").entries()
    return {kind.partition(",")[0]: entry for kind, entry in rows.items()}


def test_the_fastest_of_the_right_ones_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuned(monkeypatch, {"native": 3.0, "flash": 1.0}, flash=FlashKernel())
    for direction in ("forward", "backward"):
        assert rows[direction]["chosen"] == "flash"
        assert rows[direction]["seconds"] == {"native": 3.0, "flash": 1.0}
        assert rows[direction]["excluded"] == {}
    (kind, _) = Table("kernels-test.json").entries()
    assert kind.endswith("8 queries, 64 keys, visibility staircase")


def test_a_kernel_that_differs_is_named_and_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tuned(monkeypatch, {"native": 3.0, "wrong": 1.0}, wrong=Wrong())
    for direction in ("forward", "backward"):
        assert rows[direction]["chosen"] == "native"
        assert "differs from float64 by" in rows[direction]["excluded"]["wrong"]
    assert len(caplog.records) == 2
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert all("wrong differs from float64" in record.message for record in caplog.records)
    tuned(monkeypatch, {"native": 3.0, "wrong": 1.0}, wrong=Wrong())
    assert len(caplog.records) == 2, "said once"


def test_an_exception_is_told_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tuned(monkeypatch, {"native": 3.0, "broken": 1.0}, broken=Broken())
    assert rows["forward"] == {"chosen": "native", "seconds": {"native": 3.0}, "excluded": {}}
    assert rows["backward"]["chosen"] == "broken", "its backward is right, and fast"
    (record,) = caplog.records
    assert "broken failed" in record.message
    assert record.message.endswith("RuntimeError: no such kernel")


def test_out_of_memory_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tuned(monkeypatch, {"native": 3.0, "full": 1.0}, full=Full())
    assert list(rows) == ["backward"]
    assert "full ran out of memory" in caplog.text
    monkeypatch.setattr(tune, "exact", lambda *_: (_ for _ in ()).throw(Full.error))
    assert list(tune.tune(SHAPE, Table("kernels-other.json"), CPU)) == []
    assert Table("kernels-other.json").entries() == {}
    assert "cannot be checked" in caplog.text


def test_what_a_kernel_does_not_serve_is_not_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = FlashKernel()
    monkeypatch.setattr(flash, "serves", lambda *_: False)
    rows = tuned(monkeypatch, {"native": 3.0, "flash": 1.0}, flash=flash)
    assert rows["forward"]["seconds"] == {"native": 3.0}


def test_without_cuda_there_is_nothing_to_tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--tune"]) == 0
    assert "nothing to tune" in capsys.readouterr().out
    assert main(["doctor", "--tune", "--model", "Llama-3.2-11B-Vision"]) == 2
    assert "--config: got none beside --model" in capsys.readouterr().err


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(words)


def test_the_shapes_of_options() -> None:
    found = tune.shapes_of(options("--seqlen-q", "192", "--seqlen-kv", "1K", "--dtype", "float16"))
    one = Shape(192, 1024, heads=32, kv_heads=8, head_dim=128, dtype="float16")
    assert found == [one, replace(one, visibility="frames")]


def test_the_shapes_of_a_config(tmp_path: Path) -> None:
    """The calls of lvx in cross-attention and of Ulysses in both, on one of four ranks."""
    rules = [{"match": "*cross*", "method": "lvx"}, {"match": "*", "method": "ulysses"}]
    path = tmp_path / "ds.json"
    section = {"sequence_parallel_size": 4, "layers": rules}
    path.write_text(json.dumps({"bf16": {"enabled": True}, "ds_lvx": section}))
    words = ("--config", str(path), "--model", "Llama-3.2-11B-Vision")
    found = tune.shapes_of(options(*words, "--text", "4K", "--frames", "4"))
    assert {shape.dtype for shape in found} == {"bfloat16"}
    visual = 4 * 6404
    assert [(s.seqlen_q, s.seqlen_kv, s.heads, s.kv_heads, s.visibility) for s in found] == [
        (1024, visual // 4, 32, 8, "all"),
        (1024, visual // 4, 32, 8, "frames"),
        (4096, visual // 4, 32, 8, "all"),
        (4096, visual // 4, 32, 8, "frames"),
        (4096, visual, 8, 2, "all"),
        (4096, visual, 8, 2, "frames"),
        (1024, 1024, 32, 8, "all"),
        (1024, 1024, 32, 8, "causal"),
        (4096, 4096, 8, 2, "all"),
        (4096, 4096, 8, 2, "causal"),
    ]


def test_the_shapes_of_a_hybrid(tmp_path: Path) -> None:
    """Half the heads of half the sequence; where queries travel, with those of all ranks."""
    section = {
        "sequence_parallel_size": 4,
        "layers": [
            {"match": "*cross*", "method": "hybrid", "ulysses": 2, "across": "lvx"},
            {"match": "*", "method": "none"},
        ],
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"ds_lvx": section}))
    words = ("--config", str(path), "--model", "Llama-3.2-11B-Vision")
    found = tune.shapes_of(options(*words, "--text", "4K", "--frames", "4"))
    shapes = {(s.seqlen_q, s.seqlen_kv, s.heads, s.kv_heads) for s in found}
    assert shapes == {(2048, 2 * 6404, 16, 4), (4096, 2 * 6404, 16, 4), (2048, 2048, 16, 4)}


@pytest.mark.gpu
def test_a_gpu_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tune", "--seqlen-q", "256", "--seqlen-kv", "4K"]) == 0
    assert "4 kinds in" in capsys.readouterr().out
