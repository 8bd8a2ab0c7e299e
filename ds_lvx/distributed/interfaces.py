"""The network interfaces of this machine: which one gloo takes, and which one leads to a host."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

GLOO = "GLOO_SOCKET_IFNAME"
_ANY_PORT = 9  # nothing is sent


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine.

    Attributes:
        name: the kernel's.
        addresses: IPv4 and IPv6.
        is_up: its state.
        speed_mbit_per_s: of the link; 0 where the driver does not say (virtual ones).
        mtu: longest packet, bytes.
    """

    name: str
    addresses: tuple[str, ...]
    is_up: bool
    speed_mbit_per_s: int
    mtu: int

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this machine alone."""
        return any(address.startswith("127.") or address == "::1" for address in self.addresses)

    def usable(self) -> bool:
        """Whether a rank could listen on it."""
        return self.is_up and bool(self.addresses)


def interfaces() -> dict[str, Interface]:
    """Every interface of this machine, by name."""
    addresses, known = psutil.net_if_addrs(), {}
    for name, stats in psutil.net_if_stats().items():
        own = tuple(
            entry.address.partition("%")[0]
            for entry in addresses.get(name, ())
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        )
        known[name] = Interface(name, own, stats.isup, stats.speed, stats.mtu)
    return known


def by_host_name(known: Mapping[str, Interface]) -> Interface | None:
    """The interface that gloo takes by itself: the one that this host's name resolves to."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)]
    except OSError:
        found = []
    names = [one.name for address in found for one in known.values() if address in one.addresses]
    # 127.0.1.1, Debian's address for a host name, is not listed but is the loopback's.
    names += [one.name for one in known.values() if one.is_loopback]
    return known[names[0]] if names else None


def towards(host: str, known: Mapping[str, Interface]) -> Interface | None:
    """The interface by which packets to a host leave; None where no route is known.

    Nothing is sent: the kernel names the address that it would send from.
    """
    try:
        found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, _, _, address in found:
        with suppress(OSError), socket.socket(family, kind) as probe:  # no route, or no IPv6
            probe.connect(address)
            own = str(probe.getsockname()[0]).partition("%")[0]
            return next((one for one in known.values() if own in one.addresses), None)
    return None


def leading_to_master(
    known: Mapping[str, Interface], environment: Mapping[str, str]
) -> Interface | None:
    """The interface that gloo has to be told of.

    None where the user has named one, where the host's own name leads to one that others can reach,
    and where the job's MASTER_ADDR is this machine's alone.
    """
    master = environment.get("MASTER_ADDR")
    own = by_host_name(known)
    if environment.get(GLOO) or not master or (own is not None and not own.is_loopback):
        return None
    found = towards(master, known)
    return None if found is None or found.is_loopback else found
