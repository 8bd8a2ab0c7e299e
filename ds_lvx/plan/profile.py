"""Where the planner's numbers come from: a measured profile, a data sheet, or a default.

A profile is a JSON file that ``ds-lvx plan --calibrate`` writes into the user's cache folder:
device, number of ranks, versions, host, every sample, and the `Cluster` that follows from them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_lvx import cache
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import ACROSS_LATENCY_S, Cluster, Device, KernelTime, Link, from_card
from ds_lvx.plan.units import bytes_per_s, seconds

FORMAT = 4
"""Of the profiles; one of another format is not used."""


def current(device: Any, world: int) -> Cluster:
    """The cluster of ``world`` ranks that this process runs on, as well as it is known.

    The profile of the tensors' device with the nearest number of ranks, if one has been measured;
    else the card's data sheet; else, on a CPU, a cautious guess, and on an unknown accelerator the
    data sheet of an A100. `Cluster.source` says which it is. Ranks of a node are those that the
    launcher names in LOCAL_WORLD_SIZE or LOCAL_SIZE. On an emulated network (NETLAB), the profile
    is one that was measured over it; else its rate stands for the link.

    Hosts may have different profiles: let one rank ask, and give the others its answer.
    """
    name, network = device_name(device), os.environ.get("NETLAB") or None
    per_node = ranks_of_this_node() or world
    known = _nearest(name, world, network)
    if known is None and network is not None:
        known = _nearest(name, world, None) or guess(name, gpus=world, gpus_per_node=per_node)
        rate, _, latency = network.partition(",")
        latency_s = ACROSS_LATENCY_S + (seconds(latency) if latency else 0.0)
        emulated = Link.of(bytes_per_s(rate), latency_s)
        known = replace(known, across=emulated, source=f"{known.source}; network {network}")
    if known is None:
        return guess(name, gpus=world, gpus_per_node=per_node)
    return known.with_gpus(world, per_node)


def ranks_of_this_node() -> int | None:
    """As the launcher says it; None where nobody does."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(local) if local else None


def guess(name: str, *, gpus: int, gpus_per_node: int) -> Cluster:
    """A cluster by the name that a driver has for its devices, without any measurement."""
    if name.partition(" ")[0] == "cpu":
        return _some_cpu(gpus, gpus_per_node)
    words = re.split(r"\W+", name.upper())
    wanted = "A100-80" if "A100" in words and "80" in name.replace("A100", "") else "A100-40"
    card = next((CARDS[word] for word in words if word in CARDS), CARDS[wanted])
    cluster = from_card(card, gpus=gpus, gpus_per_node=gpus_per_node)
    if card.name.partition("-")[0] in words:
        return cluster
    return replace(cluster, source=f"{name} is unknown: {cluster.source}")


def device_name(device: Any) -> str:
    """What a profile calls a device: the card's name, or ``cpu`` and the processor's."""
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        from ds_lvx.compare.machine import processor

        return f"cpu {processor()[0]}"
    import torch

    if kind == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    return kind


def path_of(name: str, ranks: int, network: str | None = None) -> Path:
    """The file of a device's profile with so many ranks, over an emulated network or without."""
    over = "" if network is None else f"--{_slug(network)}"
    return cache.folder() / f"profile-{_slug(name)}--{ranks}{over}.json"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read(path: Path) -> Cluster:
    """The cluster of a profile.

    Raises:
        ValueError: no such file, or not a profile of this version.
    """
    advice = "write one with ds-lvx plan --calibrate"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise ValueError(f"profile: got {path}, which {what} ({error}); {advice}") from error
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise ValueError(
            f"profile: got {path}, which is not a profile of format {FORMAT}; {advice}"
        )
    return Cluster.of(record["cluster"])


def _nearest(name: str, world: int, network: str | None) -> Cluster | None:
    paths = cache.folder().glob(f"profile-{_slug(name)}--*.json")
    counts = {
        int(ranks) for ranks in (path.stem.split("--")[1] for path in paths) if ranks.isdigit()
    }
    for count in sorted(counts, key=lambda count: (abs(count - world), count)):
        try:
            return read(path_of(name, count, network))
        except ValueError:
            continue  # of another network or version: the next one, or the data sheet
    return None


def _some_cpu(gpus: int, gpus_per_node: int) -> Cluster:
    """One core a rank, on the low side of what servers have; gloo over loopback."""
    flops, memory = 40e9, 4e9
    kernel = KernelTime(call_s=1e-4, pair_s=4 / flops, key_s=4 / memory, row_s=4 / memory)
    device = Device(
        name="cpu",
        memory_bytes=16 * 2**30,
        whole=kernel,
        partial=kernel,
        backward=KernelTime(3e-4, pair_s=10 / flops, key_s=8 / memory, row_s=10 / memory),
        matmul_flops=flops,
        stream_bytes_per_s=memory,
        operation_s=5e-6,
        call_s=3e-4,
    )
    link = Link.of(1e9, 1e-4)
    source = "a guess for one core of a CPU; measure with ds-lvx plan --calibrate"
    return Cluster(device, gpus, min(gpus_per_node, gpus), link, link, source)
