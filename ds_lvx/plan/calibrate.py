"""``ds-lvx plan --calibrate``: measure this machine and its network, and keep the result.

Takes less than a minute or two. What it writes is what `ds_lvx.plan.profile.current` reads.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from ds_lvx.compare.document import save
from ds_lvx.compare.harness import Ranks, on_ranks
from ds_lvx.compare.machine import header
from ds_lvx.plan import fit, measure, profile

_KEYS = (1024, 4096, 16_384, 32_768)
_CPU = measure.Samples(
    lengths=(
        *((1, keys) for keys in (16, 4096, 32_768)),
        *product((16, 64), _KEYS),
        *product((256,), _KEYS[:3]),
        *product((1024,), _KEYS[:2]),
    ),
    message_bytes=(2**10, 2**14, 2**17, 2**19, 2**21, 2**23),
)
_GPU = measure.Samples(
    heads=32,
    kv_heads=8,
    head_dim=128,
    lengths=(
        *product((1,), (16, 16_384)),
        *product((64, 384), (16_384, 131_072)),
        *product((2048,), (16_384, 65_536)),
        (8192, 8192),
    ),
    message_bytes=(2**10, 2**14, 2**18, 2**22, 2**26, 2**29),
    hidden=(2**18, 384, 16_384),
    elements=2**26,
    repeats=10,
)
_QUICK = measure.Samples(
    heads=2,
    kv_heads=2,
    head_dim=16,
    lengths=((1, 16), *product((8, 64), (64, 256))),
    message_bytes=(2**10, 2**16, 2**21),
    hidden=(2**10, 8, 64),
    elements=2**12,
    repeats=2,
)


def calibrate(where: Ranks, *, quick: bool = False) -> dict[str, Any]:
    """Measure in fresh processes of this machine; on a CPU they share its cores.

    The profile has what it was measured with, every sample, and the ``cluster`` that follows. A
    ``quick`` one, of tiny shapes, is of no use.

    Raises:
        RuntimeError: a rank failed, or the network cannot be made.
    """
    request = _QUICK if quick else _CPU if where.device == "cpu" else _GPU
    return profile_of(on_ranks(measure.measure, request, where, joins=True), request, where)


def profile_of(
    answers: list[dict[str, Any]], request: measure.Samples, where: Ranks
) -> dict[str, Any]:
    """The profile of what ranks have answered to a request of `measure.measure`."""
    ranks, network, cuda = where.count, where.network, where.device == "cuda"
    begin = header(emulated=network is not None, device=where.device)
    # One rank shows no link: what is guessed of the device stands there.
    cluster = profile.guess(
        answers[0]["device"], gpus=ranks, gpus_per_node=ranks if network is None else 1
    ).record()
    cluster["device"]["memory_bytes"] = begin["hardware"]["memory_bytes"] // (1 if cuda else ranks)
    over = "" if network is None else f" over an emulated network of {network}"
    cluster["source"] = f"measured on {platform.node()} with {ranks} ranks{over}"
    about = {
        "host": platform.node(),
        "ranks": ranks,
        "threads_per_rank": where.threads,
        "network": None if network is None else str(network),
        "request": asdict(request),
    }
    return refit({**begin, **about, "cluster": cluster, "answers": answers})


def refit(record: Mapping[str, Any]) -> dict[str, Any]:
    """A profile with what its samples come to by the formulas as they are now."""
    old, answers, request = record["cluster"], record["answers"], record["request"]
    found = fit.device(answers, request, memory_bytes=old["device"]["memory_bytes"])
    cluster = {**old, "device": asdict(found)}
    if len(answers) > 1:  # one machine shows one kind of link: it stands for both
        cluster |= dict.fromkeys(("within", "across"), asdict(fit.link(answers)))
    return {**record, "format": profile.FORMAT, "cluster": cluster}


def write(record: Mapping[str, Any], path: Path | None = None) -> Path:
    """Keep a profile, by default where `profile.current` finds it; where it is."""
    if path is None:
        name = record["cluster"]["device"]["name"]
        path = profile.path_of(name, record["ranks"], record["network"])
    return save(record, path)
