"""A slow network on this machine, for runs over real sockets: ``netlab.sh``, as a context manager.

What the script needs (root, iproute2, kernel features) it says itself, and `NetworkError` has it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ds_lvx.plan.profile import ranks_of_this_node
from ds_lvx.plan.units import bytes_per_s, seconds

SCRIPT = Path(__file__).with_name("netlab.sh")
INTERFACE = "eth0"
MASTER = "10.77.0.1"
HEADER_BYTES = 14 + 20 + 32
"""Of a TCP packet as an interface counts it: Ethernet, IPv4, TCP with timestamps."""
NAMESPACES = Path("/run/netns")
"""Where iproute2 has a file for each."""
SNMP = Path("/proc/self/net/snmp")
"""The kernel's table of TCP, of this process's network namespace."""


class NetworkError(RuntimeError):
    """The network cannot be made here; the message says what is missing."""


@dataclass(frozen=True)
class Network:
    """What a rank's link carries."""

    bits_per_s: int  # in each direction, packet headers included
    latency_s: float = 0.0  # one way, on top of the machine's own

    @classmethod
    def parse(cls, text: str) -> Network:
        """From ``RATE`` or ``RATE,LATENCY``, such as ``200mbit,1ms``.

        Raises:
            ValueError: not that, or a rate or latency without its unit.
        """
        rate, comma, latency = text.partition(",")
        bits_per_s = round(8 * bytes_per_s(rate, what="--network"))
        if not bits_per_s:
            raise ValueError(f"--network: got {rate!r}; expected at least 1 bit a second")
        return cls(bits_per_s, seconds(latency, what="--network") if comma else 0.0)

    def __str__(self) -> str:
        units = ((10**9, "gbit"), (10**6, "mbit"), (10**3, "kbit"))
        factor, unit = next((u for u in units if self.bits_per_s >= u[0]), units[-1])
        rate = f"{self.bits_per_s / factor:.9g}{unit}"
        return f"{rate},{self.latency_s * 1e3:.9g}ms" if self.latency_s else rate

    def record(self, ranks_of_a_node: int = 1) -> dict[str, Any]:
        """For the JSON."""
        ranks = "a rank" if ranks_of_a_node == 1 else f"for {ranks_of_a_node} ranks"
        how = (
            f"one network namespace {ranks}, each behind a token bucket in both directions "
            "(launch/netlab.sh); real processes and sockets on one machine"
        )
        return {"name": str(self), **asdict(self), "how": how}


@dataclass(frozen=True)
class Lab:
    """Network namespaces, one a rank, while the context is open; gone after it, however it ends.

    Their names begin with ``name``, letters and digits; labs of other names may stand beside.

    Raises:
        NetworkError: not root, no iproute2, or a kernel without what it needs; and a lab of this
            name that is there already.
    """

    network: Network
    _: KW_ONLY
    ranks: int
    name: str

    def __enter__(self) -> Lab:
        try:
            _script(self.name, "up", str(self.ranks), *str(self.network).split(","))
        except KeyboardInterrupt:  # half-way
            _script(self.name, "down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _script(self.name, "down")

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank: each namespace is a node of its own."""
        return {
            "MASTER_ADDR": MASTER,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "NETLAB": str(self.network),
            "LOCAL_RANK": "0",
            "LOCAL_SIZE": "1",
        }

    def inside(self, rank: int) -> tuple[str, ...]:
        """The command that runs another where a rank is."""
        return ("ip", "netns", "exec", f"{self.name}-{rank}")


def name_of_mine() -> str:
    """Of a lab that belongs to this process: whoever finds it knows whether its owner is gone."""
    return f"lvx{os.getpid()}"


def take_down_left() -> None:
    """Take down the labs that are named after a process which is gone: it was killed outright.

    What still runs in them ends. Others stay, and one that cannot be taken down as well.
    """
    names = (re.fullmatch(r"(lvx(\d+))-(\d+|hub)", path.name) for path in NAMESPACES.glob("lvx*"))
    owners = {found[1]: int(found[2]) for found in names if found is not None}
    for name, owner in owners.items():
        if not psutil.pid_exists(owner):
            with suppress(NetworkError):  # another comparison may be at it
                _script(name, "down")


def _script(name: str, *words: str) -> None:
    # In a session of its own, Ctrl-C does not reach it, and it can do its work to the end.
    done = subprocess.run(
        ["bash", str(SCRIPT), "--name", name, *words],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if done.returncode != 0:
        raise NetworkError(done.stderr.strip())


def counting() -> Callable[[], dict[str, int] | None]:
    """What the interface that GLOO_SOCKET_IFNAME names will have carried since now.

    The function that is returned says so; None where other ranks share the interface.
    """

    def read() -> dict[str, int] | None:
        shared = ranks_of_this_node() != 1
        return None if shared else read_counters(os.environ.get("GLOO_SOCKET_IFNAME", ""))

    def carried() -> dict[str, int] | None:
        after = read()
        if before is None or after is None:
            return None
        return {name: after[name] - before[name] for name in before}

    before = read()
    return carried


def read_counters(interface: str, snmp: Path = SNMP) -> dict[str, int] | None:
    """What an interface of this process's network namespace has carried since it exists.

    ``sent_payload_bytes`` are without the headers of Ethernet, IP and TCP; ``segments_sent_again``
    are TCP's on every interface, whose bytes are among the others. None where there is no such
    interface, or no table of them, as in some sandboxes.
    """
    try:
        found = psutil.net_io_counters(pernic=True, nowrap=False)[interface]
    except (OSError, KeyError):
        return None
    lines = snmp.read_text().splitlines() if snmp.exists() else []
    tcp = [line.split() for line in lines if line.startswith("Tcp:")]  # names, and values
    return {
        "sent_bytes": found.bytes_sent,
        "sent_packets": found.packets_sent,
        "received_bytes": found.bytes_recv,
        "received_packets": found.packets_recv,
        "segments_sent_again": int(dict(zip(*tcp, strict=True))["RetransSegs"]) if tcp else 0,
        "sent_payload_bytes": found.bytes_sent - HEADER_BYTES * found.packets_sent,
    }
