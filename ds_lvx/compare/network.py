"""A slow network on this machine, for runs over real sockets: ``netlab.sh``, as a context manager.

What the script needs (root, iproute2, kernel features) it says itself, and `NetworkError` has it.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ds_lvx.plan.profile import ranks_of_this_node
from ds_lvx.plan.units import bytes_per_s, seconds

SCRIPT = Path(__file__).with_name("netlab.sh")
INTERFACE = "eth0"
MASTER = "10.77.0.1"
HEADER_BYTES = 14 + 20 + 32
"""Of a TCP packet as an interface counts it: Ethernet, IPv4, TCP with timestamps."""


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


class Lab:
    """Network namespaces, one a rank, while the context is open; gone after it, however it ends.

    Their names begin with ``name``, letters and digits; labs of other names may stand beside.

    Raises:
        NetworkError: not root, no iproute2, or a kernel without what it needs; and a lab of this
            name that is there already.
    """

    def __init__(self, network: Network, *, ranks: int, name: str) -> None:
        self.network = network
        self.ranks = ranks
        self.name = name

    def __enter__(self) -> Lab:
        try:
            self._call("up", str(self.ranks), *str(self.network).split(","))
        except KeyboardInterrupt:  # half-way
            self._call("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._call("down")

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank: each namespace is a node of its own."""
        return {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "NETLAB": str(self.network),
            "LOCAL_RANK": "0",
            "LOCAL_SIZE": "1",
        }

    def inside(self, rank: int) -> tuple[str, ...]:
        """The command that runs another where a rank is."""
        return ("ip", "netns", "exec", f"{self.name}-{rank}")

    def _call(self, *words: str) -> None:
        # In a session of its own, Ctrl-C does not reach it, and it can do its work to the end.
        done = subprocess.run(
            ["bash", str(SCRIPT), "--name", self.name, *words],
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        if done.returncode != 0:
            raise NetworkError(done.stderr.strip())


class Counters(NamedTuple):
    """What an interface has carried since it exists."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int
    # By TCP, on every interface of the network namespace; the bytes of those are among
    # ``sent_bytes``.
    segments_sent_again: int = 0

    def since(self, earlier: Counters) -> Counters:
        """The difference."""
        return Counters(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def sent_payload_bytes(self) -> int:
        """What was sent without the headers of Ethernet, IP and TCP."""
        return self.sent_bytes - HEADER_BYTES * self.sent_packets


def own_counters() -> Counters | None:
    """Of the interface that GLOO_SOCKET_IFNAME names; None where other ranks share it."""
    shared = ranks_of_this_node() != 1
    return None if shared else read_counters(os.environ.get("GLOO_SOCKET_IFNAME", ""))


def carried_since(before: Counters | None) -> Counters | None:
    """What has changed since `own_counters`."""
    after = own_counters()
    return None if before is None or after is None else after.since(before)


def read_counters(interface: str, folder: Path = Path("/proc/self/net")) -> Counters | None:
    """The counters of an interface of this process's network namespace; None where it has none.

    ``folder`` has the kernel's tables ``dev`` and ``snmp``; some sandboxes have neither.
    """
    dev, snmp = (
        table.read_text().splitlines() if table.exists() else []
        for table in (folder / "dev", folder / "snmp")
    )
    tcp = [line.split() for line in snmp if line.startswith("Tcp:")]  # names, and values
    again = dict(zip(*tcp, strict=True)).get("RetransSegs", 0) if len(tcp) == 2 else 0
    for line in dev:
        name, colon, values = line.partition(":")
        if colon and name.strip() == interface:
            columns = [int(value) for value in values.split()]
            return Counters(columns[8], columns[9], columns[0], columns[1], int(again))
    return None
