"""Which packages are installed, against what ds_lvx asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ds_lvx.doctor.findings import Finding, State

PACKAGE = "ds_lvx"
_EXTRAS = ("lora", "video", "plots")
_PEERS = ("flash_attn",)  # measured against where installed, asked for by nothing


def findings() -> list[Finding]:
    """ds_lvx, Python, torch with its libraries, and every package of ds_lvx's metadata."""
    try:
        found = [Finding(PACKAGE, version(PACKAGE)), _python(metadata(PACKAGE)["Requires-Python"])]
        found += _packages([Requirement(text) for text in requires(PACKAGE) or []])
    except PackageNotFoundError:
        advice = "pip install -e . in the repository's root; versions cannot be compared until then"
        found = [Finding(PACKAGE, "not installed as a package", State.WARNING, advice=advice)]
        found += [_python(None), Finding("torch", torch.__version__)]
    found += [Finding(name, v) for name in _PEERS if (v := _installed(name)) is not None]
    return [*found, _libraries()]


def _python(wanted: str | None) -> Finding:
    return _compare("python", platform.python_version(), SpecifierSet(wanted or ""))


def _packages(requirements: list[Requirement]) -> Iterator[Finding]:
    """Those that are needed, then those of each extra."""
    for extra in ("", *_EXTRAS):
        for requirement in requirements:
            marker = requirement.marker
            needed = marker is None or marker.evaluate({"extra": ""})
            if needed != bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
                yield _package(requirement, extra)


def _package(requirement: Requirement, extra: str) -> Finding:
    name, wanted = requirement.name, requirement.specifier
    found = _installed(name)
    if found is not None:
        return _compare(name, found, wanted)
    facts = {"version": None, "needs": str(wanted)}
    if not extra:
        advice = f"pip install '{name}{wanted}'"
        return Finding(name, "missing", State.ERROR, advice=advice, facts=facts)
    value = f"not installed; optional (pip install 'ds_lvx[{extra}]')"
    return Finding(name, value, State.NOTE, facts={**facts, "extra": extra})


def _compare(name: str, found: str, wanted: SpecifierSet) -> Finding:
    facts = {"version": found, "needs": str(wanted)}
    if wanted.contains(found, prereleases=True):
        return Finding(name, f"{found}  (needs {wanted})" if str(wanted) else found, facts=facts)
    value = f"{found}, where ds_lvx needs {wanted}"
    advice = "install a newer Python" if name == "python" else f"pip install '{name}{wanted}'"
    return Finding(name, value, State.ERROR, advice=advice, facts=facts)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _libraries() -> Finding:
    """What torch was built with."""
    facts: dict[str, str | None] = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    cudnn = torch.backends.cudnn.version()
    facts["cudnn"] = None if cudnn is None else str(cudnn)
    nccl = None if torch.version.cuda is None else torch.cuda.nccl.version()
    facts["nccl"] = None if nccl is None else ".".join(map(str, nccl))
    parts = [f"{name} {found}" for name, found in facts.items() if found is not None]
    return Finding("torch's build", ", ".join(parts) or "for CPUs, without CUDA", facts=facts)
