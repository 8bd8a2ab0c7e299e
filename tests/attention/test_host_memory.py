"""Pinned memory without a device: who is registered, used again, and given back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_lvx.attention.host_memory import HostMemory

MIB = 2**20


class Driver:
    """CUDA's, which pins nothing, and a stream that says who waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, error: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self.waits: list[str] = []
        self.stream = self.named("main")
        self._error = error
        calls = {"cudaHostRegister": self._register, "cudaHostUnregister": self.registered.pop}
        monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(**calls))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: self.waits.append("host"))
        empty = torch.empty

        def pins_nothing(shape: torch.Size | int, *, dtype: torch.dtype, **_: bool) -> torch.Tensor:
            return empty(shape, dtype=dtype)

        monkeypatch.setattr(torch, "empty", pins_nothing)

    def named(self, name: str) -> SimpleNamespace:
        wait = lambda other: self.waits.append(f"{name} for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=wait)

    def _register(self, place: int, nbytes: int, flags: int) -> int:
        if not self._error:
            self.registered[place] = nbytes
        return self._error


def test_a_block_is_as_long_as_it_must_be_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, memory = Driver(monkeypatch), HostMemory()
    shape = torch.Size((3, 5 * MIB // 8))
    first = memory.empty(shape, torch.bfloat16)
    assert (first.shape, first.dtype) == (shape, torch.bfloat16)
    (nbytes,) = driver.registered.values()
    assert first.nbytes <= nbytes < 1.1 * first.nbytes
    second = memory.empty(shape, torch.bfloat16)  # the first is in use
    assert len(driver.registered) == 2
    first.fill_(1.0)
    second.fill_(2.0)
    assert first.unique().tolist() == [1.0]
    place, view = first.data_ptr(), first[1:]
    del first
    third = memory.empty(shape, torch.bfloat16)
    assert third.data_ptr() not in (place, second.data_ptr())
    del view
    driver.stream = driver.named("other")
    assert memory.empty(torch.Size((2 * MIB,)), torch.uint8).data_ptr() == place
    assert driver.waits == ["other for main"]


def test_what_is_too_short_goes_back_before_more_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, memory = Driver(monkeypatch), HostMemory()
    memory.empty(torch.Size((2 * MIB,)), torch.uint8)
    assert driver.waits == []
    kept = memory.empty(torch.Size((3 * MIB,)), torch.uint8)
    assert driver.waits == ["host"]
    assert list(driver.registered) == [kept.data_ptr()]


def test_small_and_unregistered_memory_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, memory = Driver(monkeypatch, error=2), HostMemory()
    for nbytes in (0, 100, 2 * MIB, 3 * MIB):
        assert memory.empty(torch.Size((nbytes,)), torch.uint8).shape == (nbytes,)
    assert driver.registered == {}
