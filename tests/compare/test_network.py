"""The emulated network: what it refuses, what it carries, and that nothing of it stays behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_lvx.compare import network
from ds_lvx.compare.command import ending_in_order
from ds_lvx.compare.network import SCRIPT, Lab, Network, NetworkError, read_counters

ROOT = Path(__file__).resolve().parent.parent.parent
HANG_S = 600


def own(name: str) -> str:
    """A lab's name that no other test run on this machine has."""
    return f"{name}{os.getpid()}"


def script(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False, **options
    )


def namespaces(name: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in listed.stdout.splitlines() if line.startswith(f"{name}-")]


def why_not() -> str | None:
    """Why no network can be made here; None where it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    try:
        with Lab(Network(10**9), ranks=1, name=own("whether")):
            return None
    except NetworkError as error:
        return str(error)


@pytest.fixture(scope="module")
def _can() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


needs_network = pytest.mark.usefixtures("_can")


@pytest.mark.parametrize(
    ("text", "network", "short"),
    [
        ("200mbit", Network(200 * 10**6), "200mbit"),
        ("1.5gbit,1ms", Network(1500 * 10**6, 1e-3), "1.5gbit,1ms"),
        ("25MB/s", Network(200 * 10**6), "200mbit"),
        ("800kbit,500us", Network(800_000, 500e-6), "800kbit,0.5ms"),
    ],
)
def test_a_network_is_read_from_words(text: str, network: Network, short: str) -> None:
    assert Network.parse(text) == network
    assert str(network) == short
    assert Network.parse(short) == network


@pytest.mark.parametrize("text", ["200", "fast", "200mbit,1", "0mbit", "200mbit,", ""])
def test_a_rate_or_latency_without_its_unit_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="--network: got "):
        Network.parse(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["up", "4", "200"], "RATE: got '200'; expected a number with its unit"),
        (["up", "4", "0mbit"], "RATE: got '0mbit'; expected more than 0"),
        (["up", "0", "200mbit"], "N: got '0'; expected a number of namespaces from 1 to 250"),
        (["up", "2", "200mbit", "1"], "LATENCY: got '1'; expected a time with its unit"),
        (["up", "2"], "up: got 1 words; expected N RATE [LATENCY]"),
        (["run"], "run: got no command"),
        (["--name", "a-b", "down"], "--name: got 'a-b'; expected a letter"),
        (["--name"], "--name: got ''"),
        (["sideways"], "got 'sideways'; expected up, run or down"),
    ],
)
def test_the_script_refuses_what_it_does_not_understand(words: list[str], message: str) -> None:
    done = script(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"id": "echo 1000"}, "making network namespaces needs root"),
        ({"id": "echo 0"}, "got no command 'ip'; it is part of iproute2"),
        (
            {
                "id": "echo 0",
                "tc": "true",
                "ip": 'case "$*" in *"netns add"*) echo no such right >&2; exit 1;; esac',
            },
            "got 'no such right' from: ip netns add absent-hub netlab: It needs CAP_SYS_ADMIN",
        ),
        (
            {
                "id": "echo 0",
                "ip": "true",
                "tc": 'case "$*" in *netem*) echo no netem >&2; exit 2;; esac',
            },
            "It needs a kernel with the netem qdisc (CONFIG_NET_SCH_NETEM); without it leave",
        ),
    ],
)
def test_the_script_says_what_it_needs(tools: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "awk", "numfmt", "sh", "sed", "grep", "sleep"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    words = ("--name", "absent", "up", "2", "200mbit", "1ms")
    done = script(*words, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_counters_are_those_of_the_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev, snmp, rest = tmp_path / "net" / "dev", tmp_path / "snmp", " 0" * 6
    dev.parent.mkdir()
    head = f"Inter-| Receive | Transmit\n face |bytes packets errs\n    lo: 1 2{rest} 1 2{rest}\n"
    dev.write_text(f"{head}  eth0: 5000 40{rest} 9000 50{rest}\n")
    table = "Icmp: InMsgs OutMsgs\nIcmp: 1 2\nTcp: InSegs OutSegs RetransSegs\nTcp: 5 6 {}\n"
    snmp.write_text(table.format(7))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert read_counters("eth0", snmp) == {
        "sent_bytes": 9000,
        "sent_packets": 50,
        "received_bytes": 5000,
        "received_packets": 40,
        "segments_sent_again": 7,
        "sent_payload_bytes": 9000 - 50 * 66,
    }
    assert read_counters("eth1", snmp) is None
    monkeypatch.setattr(network, "read_counters", partial(read_counters, snmp=snmp))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    for ranks, again in (("1", 2), ("2", None)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        snmp.write_text(table.format(7))
        dev.write_text(f"{head}  eth0: 5000 40{rest} 9000 50{rest}\n")
        carried = network.counting()
        snmp.write_text(table.format(9))
        dev.write_text(f"{head}  eth0: 6000 50{rest} 10000 60{rest}\n")
        found = carried()
        assert (None if found is None else found["segments_sent_again"]) == again
        assert found is None or found["sent_payload_bytes"] == 1000 - 10 * 66
    snmp.unlink()
    assert read_counters("eth0", snmp)["segments_sent_again"] == 0  # type: ignore[index]
    dev.unlink()
    assert read_counters("eth0", snmp) is None


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


# The beginning of what a rank runs.
PLACE = """
import os, socket, sys, threading, time
rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
rank, port = int(rank), int(port)

def reach_rank_0():
    for _ in range(10_000):
        try:
            return socket.create_connection((address, port))
        except OSError:
            time.sleep(0.05)
"""

# Rank 0 sends to rank 1; then ranks 1 and 2 both send to rank 0, as fast as they can.
TRANSFERS = (
    PLACE
    + """
size = int(sys.argv[1])

def carried():
    line = next(l for l in open("/proc/self/net/dev") if "eth0:" in l).split(":")[1].split()
    return {"sent": int(line[8]), "received": int(line[0])}

def receive(connection, count):
    while count:
        count -= len(connection.recv(min(count, 1 << 20)))

def report(direction, begin, before):
    count = carried()[direction] - before[direction]
    print(direction, 8 * count / (time.perf_counter() - begin))

if rank == 0:
    with socket.create_server((address, port)) as server:
        peers = {}
        while len(peers) < 2:
            connection, _ = server.accept()
            peers[connection.recv(1)] = connection
    begin, before = time.perf_counter(), carried()
    peers[b"1"].sendall(bytes(size))
    receive(peers[b"1"], 1)
    report("sent", begin, before)
    begin, before = time.perf_counter(), carried()
    for peer in peers.values():
        peer.sendall(b"g")
    threads = [threading.Thread(target=receive, args=(p, size)) for p in peers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report("received", begin, before)
else:
    connection = reach_rank_0()
    connection.sendall(str(rank).encode())
    if rank == 1:
        receive(connection, size)
        connection.sendall(b"x")
    receive(connection, 1)
    connection.sendall(bytes(size))
    connection.recv(1)
"""
)


@needs_network
def test_a_rank_sends_and_receives_at_no_more_than_the_rate_that_was_asked_for() -> None:
    """What it reaches depends on the machine; that each link has the rate, the kernel says."""
    before = interfaces()
    with Lab(Network(100 * 10**6), ranks=3, name=own("rate")) as lab:
        assert interfaces() == before, "something was made outside of the lab's namespaces"
        assert len(namespaces(own("rate"))) == 4
        links = [(f"{lab.name}-{rank}", "eth0") for rank in range(3)]
        links += [(f"{lab.name}-hub", f"port{rank}") for rank in range(3)]
        for namespace, interface in links:
            shown = ["tc", "-n", namespace, "qdisc", "show", "dev", interface]
            listing = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
            assert re.search(r"qdisc tbf .* rate 100Mbit ", listing), (namespace, listing)
        done = script("--name", lab.name, "run", sys.executable, "-c", TRANSFERS, "2500000")
    assert done.returncode == 0, done.stderr
    rates = {words[0]: float(words[1]) for words in map(str.split, done.stdout.splitlines())}
    assert rates.keys() == {"sent", "received"}
    assert max(rates.values()) < 105e6, rates
    assert not namespaces(own("rate"))


CONGESTION_CONTROL = (
    PLACE
    + """
if rank == 0:
    with socket.create_server((address, port)) as server:
        connection, _ = server.accept()
else:
    connection = reach_rank_0()
name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).strip(b"\\0").decode()
os.write(1, f"{name}\\n".encode())  # in one go: both ranks write there
"""
)


@needs_network
def test_what_the_machine_prefers_does_not_count() -> None:
    with Lab(Network(10**9), ranks=2, name=own("cc")) as lab:
        done = script("--name", lab.name, "run", sys.executable, "-c", CONGESTION_CONTROL)
    assert done.stdout.split() == ["reno", "reno"], done.stderr


@needs_network
def test_labs_stand_side_by_side_and_their_ranks_know_their_places() -> None:
    network = Network(10**9)
    command = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $GLOO_SOCKET_IFNAME $NETLAB"'
    with Lab(network, ranks=2, name=own("one")), Lab(network, ranks=3, name=own("two")):
        with pytest.raises(NetworkError, match=f"'{own('one')}' that is up already"):
            Lab(network, ranks=2, name=own("one")).__enter__()
        assert len(namespaces(own("one"))) == 3, "a second lab took the first one's place"
        done = script("--name", own("two"), "run", "bash", "-c", command)
    assert sorted(done.stdout.splitlines()) == [
        f"{rank} 3 0 10.77.0.1 eth0 1gbit" for rank in range(3)
    ]
    for _ in range(2):
        assert script("--name", own("two"), "down").returncode == 0


@needs_network
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    with Lab(Network(10**9), ranks=2, name=own("fail")) as lab:
        command = f'[ "$RANK" = 1 ] && exit 7; sleep 300; touch {tmp_path}/slept'
        done = script("--name", lab.name, "run", "bash", "-c", command)
        assert done.returncode == 7
        assert not (tmp_path / "slept").exists()
    none = script("--name", lab.name, "run", "true")
    assert none.returncode == 2
    assert f"got no network '{lab.name}' to run in; make one first" in none.stderr


def interrupted(command: list[str], ending: signal.Signals) -> None:
    """Start a command, wait until it says "up", end it, and wait until it has ended."""
    with subprocess.Popen(
        # Whoever runs the tests in the background may ignore Ctrl-C, which a child inherits.
        ["env", "--default-signal=INT", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    ) as process:
        watchdog = threading.Timer(HANG_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            assert namespaces(own("end"))
            process.send_signal(ending)
            assert process.wait(HANG_S) not in (0, -signal.SIGKILL)
        finally:
            watchdog.cancel()


@needs_network
def test_a_comparison_that_is_ended_takes_its_network_down() -> None:
    def end() -> None:
        assert len(namespaces(own("end"))) == 3
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(HANG_S)

    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyboardInterrupt),
        ending_in_order(),
        Lab(Network(10**9), ranks=2, name=own("end")),
    ):
        end()
    assert not namespaces(own("end"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_labs_whose_owner_is_gone_are_taken_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    gone, here = f"lvx{process.pid}", network.name_of_mine()
    for name in (f"{gone}-hub", f"{gone}-0", f"{here}-hub", "lvx-0", "other7-hub", f"a{gone}-1"):
        (tmp_path / name).touch()
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(network, "NAMESPACES", tmp_path)
    monkeypatch.setattr(network, "_script", lambda *words: called.append(words))
    network.take_down_left()
    assert called == [(gone, "down")]


@needs_network
def test_what_a_killed_comparison_left_ends() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    left = Lab(Network(10**9), ranks=1, name=f"lvx{process.pid}")
    left.__enter__()
    command = [*left.inside(0), "bash", "-c", "echo up; exec sleep 6000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"up\n"
        network.take_down_left()
        assert rank.wait(HANG_S) == -signal.SIGTERM
    assert not namespaces(left.name)


@needs_network
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_ranks(ending: signal.Signals, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    command = f'echo $$ > {mark}-"$RANK"; [ "$RANK" = 0 ] && echo up; sleep 6000'
    with Lab(Network(10**9), ranks=2, name=own("end")) as lab:
        interrupted(["bash", str(SCRIPT), "--name", lab.name, "run", "bash", "-c", command], ending)
        pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
        assert pids
        until = time.monotonic() + HANG_S
        while any(Path(f"/proc/{pid}").exists() for pid in pids):  # until all are reaped
            assert time.monotonic() < until
            time.sleep(0.01)
