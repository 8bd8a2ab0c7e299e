"""What was measured on this machine before, and is used since."""

from __future__ import annotations

import time
from pathlib import Path

from ds_lvx import cache
from ds_lvx.doctor.findings import Finding, State
from ds_lvx.plan import profile

_DAY_S = 86_400


def findings(device: str) -> list[Finding]:
    """What the planner reckons with on a kind of device, and every file of the cache folder."""
    return [_planner(device), *_files(cache.folder())]


def _planner(device: str) -> Finding:
    name = profile.device_name(device)
    source = profile.current(device, 1).source
    facts = {"device": name, "source": source}
    if source != profile.guess(name, gpus=1, gpus_per_node=1).source:
        return Finding("planner", source, facts=facts)
    calibrate = "ds-lvx plan --calibrate"
    advice = "" if calibrate in source else f"measure this machine: {calibrate}"
    return Finding("planner", source, State.NOTE, advice=advice, facts=facts)


def _files(folder: Path) -> list[Finding]:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        return [Finding("cache", f"{folder}: nothing yet", State.NOTE)]
    return [_file(path) for path in paths]


def _file(path: Path) -> Finding:
    age_s = max(0.0, time.time() - path.stat().st_mtime)
    facts = {"path": str(path), "age_s": age_s}
    return Finding("file", f"{path}, {age_s / _DAY_S:.1f} days old", facts=facts)
