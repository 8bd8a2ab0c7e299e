"""Which FlashAttention PyTorch's operators run: packages that are there, and ones that are not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import attention

from ds_lvx.kernels import flash, flash_version, warn
from ds_lvx.kernels.table import table_of


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What PyTorch says of an H100 that is not there."""
    for name, answer in {
        "is_available": True,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, answer=answer: answer)
    for kept in (warn.warn_once, table_of):
        kept.cache_clear()
    yield
    flash_version.restore()


@pytest.mark.parametrize("name", flash_version.VERSIONS)
def test_one_that_is_missing_is_named_and_training_goes_on(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert not flash_version.activate(name)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for word in (f"got '{name}'", flash_version.VERSIONS[name].module, "install it", "goes on"):
        assert word in record.message
    assert flash.version_in_place() is None


@pytest.mark.parametrize(
    ("where", "answer", "words"),
    [
        ("get_device_capability", (8, 0), "needs compute capability 9.x, and this GPU has 8.0"),
        ("is_available", False, "no CUDA GPU"),
    ],
)
def test_what_the_machine_lacks_is_named(
    where: str, answer: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, where, lambda device=None: answer)
    assert words in (flash_version.obstacle("FA3") or "")


def test_an_older_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("activate_flash_attention_impl", "current_flash_attention_impl"):
        monkeypatch.delattr(attention, name)
    assert "takes no other" in (flash_version.obstacle("FA3") or "")
    assert flash.version_in_place() is None
    assert not flash_version.activate("builtin")


def test_one_that_is_there_takes_the_operators_until_it_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package as PyTorch expects it; the tuned table is another one meanwhile."""
    package = ModuleType("flash_attn.cute.interface")
    package.__dict__.update(_flash_attn_fwd=print, _flash_attn_bwd=print)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    device = torch.device("cuda", 0)
    plain = table_of(device).name
    with flash_version.used("FA4"):
        assert flash.version_in_place() == "FA4"
        assert table_of(device).name != plain
    assert flash.version_in_place() is None
    assert table_of(device).name == plain
    with pytest.raises(RuntimeError, match="FA3: flash_attn_interface cannot be loaded"):
        flash_version.used("FA3").__enter__()
