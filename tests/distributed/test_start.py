"""Locks of extension builds: waited for, told of, and never removed; and which way gloo goes."""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest

from ds_lvx.distributed import interfaces as found_interfaces
from ds_lvx.distributed import start
from ds_lvx.distributed.interfaces import Interface
from ds_lvx.distributed.start import (
    be_alone,
    init_distributed,
    remove_dead_buffers,
    take_device,
    tell_of_old_locks,
    wait_for_build,
)

OPERATOR = "deepspeed_shm_comm"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of DeepSpeed's operator, in a folder of this test's own, three hours old."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return old_lock(tmp_path, OPERATOR)


def old_lock(folder: Path, extension: str) -> Path:
    path = folder / extension / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    then = path.stat().st_mtime - 3 * 3600
    os.utime(path, (then, then))
    return path


def test_a_lock_that_vanishes_is_waited_for(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) > 130:
            lock.unlink()

    wait_for_build(lock, timeout_s=900, sleep=sleep)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "after 5, 65 and 125 seconds"
    for line in lines:
        assert f"waits for the extension build that holds {lock} since 2" in line
        assert line.endswith(f"delete the file: rm {lock}")


def test_who_is_not_to_speak_waits_in_silence(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TimeoutError):
        wait_for_build(lock, timeout_s=100, speaks=False, sleep=lambda seconds: None)
    assert capsys.readouterr().out == ""


def test_the_wait_ends_and_the_lock_stays(lock: Path) -> None:
    slept: list[float] = []
    with pytest.raises(TimeoutError) as caught:
        wait_for_build(lock, timeout_s=20, sleep=slept.append)
    assert sum(slept) == 20
    text = str(caught.value)
    assert text.startswith(f"got {lock}, the lock of an extension build, there since 2")
    assert text.endswith(f"on another that shares the folder, delete the file: rm {lock}")
    assert lock.exists()
    lock.unlink()
    wait_for_build(lock, timeout_s=0)


def started(monkeypatch: pytest.MonkeyPatch, *, compatible: bool) -> list[dict[str, object]]:
    """What DeepSpeed is started with from here on, in its place."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: calls.append(given))
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {OPERATOR: compatible})
    return calls


def test_deepspeed_starts_behind_the_lock(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = started(monkeypatch, compatible=True)
    with pytest.raises(TimeoutError, match=str(lock)):
        init_distributed(build_timeout_s=0, verbose=False)
    assert calls == []
    lock.unlink()
    init_distributed(build_timeout_s=0, verbose=False)
    assert calls == [{"verbose": False}]


def test_a_lock_of_what_is_not_loaded_holds_nobody_up(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named where it is old, once a node."""
    calls = started(monkeypatch, compatible=False)
    init_distributed(build_timeout_s=0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    init_distributed(build_timeout_s=0)
    assert calls == [{}, {}]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"ds_lvx: {lock} is there since 2")
    assert lock.exists()


def test_only_old_locks_are_told_of(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = old_lock(lock.parents[1], "cpu_adam")
    tell_of_old_locks(besides=OPERATOR)
    assert str(other) in capsys.readouterr().out
    tell_of_old_locks(besides=OPERATOR, now=other.stat().st_mtime + 60)
    assert capsys.readouterr().out == ""


def test_buffers_of_dead_jobs_are_removed_and_no_others(tmp_path: Path) -> None:
    own = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500"
    names = [f"{own}_0", f"{own}_1", f"{own}_2", "deepspeed_allreduce_buffer_x_1", "another"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
    now = (tmp_path / names[0]).stat().st_mtime
    remove_dead_buffers(tmp_path, now=now + 60)
    assert len(list(tmp_path.iterdir())) == len(names), "one of them may be starting"
    with (tmp_path / names[0]).open("rb") as held:
        mapped = mmap.mmap(os.open(tmp_path / names[1], os.O_RDWR), 4096)
        remove_dead_buffers(tmp_path, now=now + 3600)
        assert not held.closed
        assert mapped[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {*names} - {names[2]}


@pytest.mark.parametrize(
    ("host_name", "route", "given", "told"),
    [
        ("127.0.1.1", "eth0", {"MASTER_ADDR": "192.0.2.1"}, "eth0"),
        ("203.0.113.5", "eth0", {"MASTER_ADDR": "192.0.2.1"}, "eth0"),  # no address of this host
        ("192.0.2.8", "eth0", {"MASTER_ADDR": "192.0.2.1"}, None),  # eth1's, which gloo finds
        ("127.0.1.1", "lo", {"MASTER_ADDR": "127.0.0.1"}, None),
        ("127.0.1.1", None, {"MASTER_ADDR": "nowhere"}, None),
        ("127.0.1.1", "eth0", {}, None),
        ("127.0.1.1", "eth0", {"MASTER_ADDR": "192.0.2.1", "GLOO_SOCKET_IFNAME": "eth1"}, "eth1"),
    ],
)
def test_gloo_is_told_the_way_to_the_master(
    host_name: str,
    route: str | None,
    given: dict[str, str],
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    addresses = {"lo": "127.0.0.1", "eth0": "192.0.2.7", "eth1": "192.0.2.8"}
    known = {name: Interface(name, (one,), True, 0, 1500) for name, one in addresses.items()}
    entry = (None, None, None, "", (host_name, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [entry])
    monkeypatch.setattr(start, "interfaces", lambda: known)
    monkeypatch.setattr(found_interfaces, "towards", lambda host, known: known.get(route))
    for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    start.name_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == told
    assert ("ds_lvx: gloo takes eth0, which leads" in capsys.readouterr().out) is (told == "eth0")


def test_a_route_is_the_kernels() -> None:
    known = found_interfaces.interfaces()
    found = found_interfaces.towards("127.0.0.1", known)
    assert found is not None
    assert found.is_loopback
    assert found_interfaces.towards("no such host", known) is None


def test_a_rank_beyond_the_visible_accelerators_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Slurm's --gpus-per-task, by which each process sees one."""
    taken: list[int] = []
    gpus = SimpleNamespace(
        device_name=lambda: "cuda", device_count=lambda: 1, set_device=taken.append
    )
    monkeypatch.setattr(start, "get_accelerator", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="got LOCAL_RANK 1 where this process sees 1 of"):
        take_device()
    monkeypatch.setenv("LOCAL_RANK", "0")
    take_device()
    assert taken == [0]


def test_a_process_that_no_launcher_started_is_the_only_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {"MASTER_PORT": "1234", "PMI_SIZE": "1"}
    assert be_alone(environ)
    assert environ.pop("MASTER_ADDR") == "127.0.0.1"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    assert environ == {"MASTER_PORT": "1234", "PMI_SIZE": "1", **ranks}
    assert "it is the only rank" in capsys.readouterr().out
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE"):
        assert not be_alone({name: "2"})
