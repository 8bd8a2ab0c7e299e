"""Which network the ranks would talk over."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from ds_lvx.distributed.interfaces import (
    GLOO,
    Interface,
    by_host_name,
    interfaces,
    leading_to_master,
)
from ds_lvx.doctor.findings import Finding, State

NCCL = "NCCL_SOCKET_IFNAME"
INFINIBAND = Path("/sys/class/infiniband")


def device_kind() -> str:
    """Where ds_lvx runs here: on what DeepSpeed takes for its accelerator, if torch has it."""
    accelerated = get_accelerator().device_name() != "cpu"
    return "cuda" if accelerated and torch.cuda.is_available() else "cpu"


def findings(device: str) -> list[Finding]:
    """The backend, the interface that it takes, and all interfaces."""
    known = interfaces()
    selected = [_backend(device), gloo(known, os.environ), nccl(known, os.environ, device)]
    return selected + _infiniband(INFINIBAND) + [_describe(one) for one in known.values()]


def _backend(device: str) -> Finding:
    accelerator = get_accelerator()
    name, kind = accelerator.communication_backend_name(), accelerator.device_name()
    facts = {"backend": name, "accelerator": kind}
    if kind != device:
        value = f"{name}: DeepSpeed takes {kind} for its accelerator, and torch has {device} only"
        advice = f"unset DS_ACCELERATOR, or set it to {device}"
        return Finding("backend", value, State.ERROR, advice=advice, facts=facts)
    if device == "cuda":
        value = f"{name} for tensors, gloo for lengths and signatures"
        return Finding("backend", value, facts=facts)
    if not torch.cuda.is_available():
        return Finding("backend", name, facts=facts)
    value = f"{name}: DeepSpeed takes the CPU for its accelerator, and leaves the GPUs unused"
    advice = "unset DS_ACCELERATOR to run on them"
    return Finding("backend", value, State.NOTE, advice=advice, facts=facts)


def gloo(known: Mapping[str, Interface], environment: Mapping[str, str]) -> Finding:
    """The interface that gloo takes: by GLOO_SOCKET_IFNAME, by MASTER_ADDR or the host's name."""
    setting = environment.get(GLOO)
    if not setting:
        return _gloo_by_itself(known, environment)
    names = setting.split(",")
    bad = [name for name in names if name not in known or not known[name].usable()]
    if bad:
        value = f"nothing: {GLOO} is {setting!r}, and " + "; ".join(_fault(n, known) for n in bad)
        advice = f"unset {GLOO}, or set it to one of {_usable(known)}"
        return Finding("gloo takes", value, State.ERROR, advice=advice)
    return Finding("gloo takes", f"{setting}, by {GLOO}", facts={"interfaces": names})


def _gloo_by_itself(known: Mapping[str, Interface], environment: Mapping[str, str]) -> Finding:
    host, far = socket.gethostname(), leading_to_master(known, environment)
    if far is not None:
        value = f"{far.name}, which leads to MASTER_ADDR {environment['MASTER_ADDR']}"
        facts = {"interfaces": [far.name], "host": host}
        return Finding("gloo takes", value, facts=facts)
    chosen = by_host_name(known)
    if chosen is None:
        advice = f"set {GLOO} to one of {_usable(known)}"
        return Finding("gloo takes", "no interface that is up", State.ERROR, advice=advice)
    facts = {"interfaces": [chosen.name], "host": host}
    if not chosen.is_loopback:
        return Finding("gloo takes", f"{chosen.name}: {host} resolves to it", facts=facts)
    value = f"{chosen.name}, which serves this machine alone ({host} resolves to nothing else)"
    others = {name: one for name, one in known.items() if not one.is_loopback}
    given = environment.get("MASTER_ADDR")
    wanted = "MASTER_ADDR" if not given else f"MASTER_ADDR ({given} leads nowhere from here)"
    advice = f"for several machines set {wanted}, or {GLOO} to one of {_usable(others)}"
    return Finding("gloo takes", value, State.NOTE, advice=advice, facts=facts)


def nccl(known: Mapping[str, Interface], environment: Mapping[str, str], device: str) -> Finding:
    """The interfaces that NCCL may take, by its own rules for NCCL_SOCKET_IFNAME."""
    setting = environment.get(NCCL, "")
    names = nccl_selection(setting, known)
    facts = {"interfaces": names}
    if names and setting:
        return Finding("NCCL takes", f"{', '.join(names)}, by {NCCL}={setting}", facts=facts)
    if names:
        value = f"InfiniBand where there is one, then {', '.join(names)}"
        if device == "cuda":
            return Finding("NCCL takes", value, facts=facts)
        return Finding("NCCL takes", f"not used on CPUs ({value})", State.NOTE, facts=facts)
    value = f"nothing: {NCCL} is {setting!r}, which selects no interface that is up"
    advice = f"unset {NCCL}, or set it to one of {_usable(known)}"
    state = State.ERROR if device == "cuda" else State.WARNING
    return Finding("NCCL takes", value, state, advice=advice, facts=facts)


def nccl_selection(setting: str, known: Mapping[str, Interface]) -> list[str]:
    """Names that NCCL_SOCKET_IFNAME selects: prefixes, ``=`` for whole names, ``^`` for all but.

    Unset, NCCL leaves the loopback and docker's bridges for the last.
    """
    usable = [one.name for one in known.values() if one.usable()]
    if not setting:
        far = [n for n in usable if not known[n].is_loopback and not n.startswith("docker")]
        return far or usable
    excluding = setting.startswith("^")
    rest = setting.removeprefix("^")
    exact = rest.startswith("=")
    words = rest.removeprefix("=").split(",")

    def matches(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    return [name for name in usable if matches(name) != excluding]


def _fault(name: str, known: Mapping[str, Interface]) -> str:
    if name not in known:
        return f"there is no interface {name!r}"
    return f"{name!r} {'has no address' if known[name].is_up else 'is down'}"


def _usable(known: Mapping[str, Interface]) -> str:
    return ", ".join(one.name for one in known.values() if one.usable()) or "(none is up)"


def _infiniband(root: Path) -> list[Finding]:
    found = []
    for port in sorted(root.glob("*/ports/*")):
        rate, state = (_read(port / name) for name in ("rate", "state"))
        up = "ACTIVE" in state
        found.append(
            Finding(
                f"{port.parent.parent.name} port {port.name}",
                f"{rate}, {state}",
                State.OK if up else State.NOTE,
                facts={"rate": rate, "state": state},
            )
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def _describe(one: Interface) -> Finding:
    speed = f"{one.speed_mbit_per_s:,} Mbit/s" if one.speed_mbit_per_s > 0 else "speed not told"
    address = ", ".join(one.addresses) or "no address"
    value = f"{address}; {'up' if one.is_up else 'down'}, {speed}, MTU {one.mtu}"
    return Finding(one.name, value, State.OK if one.usable() else State.NOTE, facts=asdict(one))
