"""``ds-lvx doctor``: looks at this machine and checks that attention is exact on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from ds_lvx.config import LVXConfig
from ds_lvx.config.words import in_ranks
from ds_lvx.doctor import check, devices, kernels, measurements, network, system, tune, versions
from ds_lvx.doctor.findings import Finding, Section, State, count

_TIMEOUT_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds-lvx doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--no-check", action="store_true", help="leave the self-check out")
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help="for the self-check on 1 rank, and again on 2 (default: %(default).0f)",
    )
    tune.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the report, or tune; 1 when the report has an error, else 0.

    Raises:
        ValueError: a time-out that is no positive number, or shapes that are none.
    """
    if not options.timeout > 0:
        raise ValueError(f"--timeout: got {options.timeout}; expected seconds above 0")

    if options.tune:
        return tune.run(options)

    def show(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    sections = []
    looked_at = examine(checks=not options.no_check, timeout_s=options.timeout, tell=show)
    if options.config is not None:
        looked_at = chain([Section("Config", [config_finding(options.config)])], looked_at)
    for section in looked_at:
        sections.append(section)
        show(section.text() + "\n")
    errors, warnings = (count(sections, state) for state in (State.ERROR, State.WARNING))
    if options.json:
        print(json.dumps(_record(sections, errors, warnings), indent=1))
    else:
        print(_summary(errors, warnings, checked=not options.no_check))
    return 1 if errors else 0


def examine(
    *, checks: bool, timeout_s: float, tell: Callable[[str], None] = lambda line: None
) -> Iterator[Section]:
    """The report, section by section.

    Args:
        checks: run the self-check as well.
        timeout_s: for each of its two parts.
        tell: gets a line before something that takes long.
    """
    device = network.device_kind()
    yield _section("Versions", versions.findings)
    yield _section("Devices", devices.findings)
    talk = _section("Communication", lambda: network.findings(device))
    yield talk
    yield _section(f"Kernels on {device}", lambda: kernels.findings(device))
    yield _section("System", lambda: system.findings(device))
    yield _section("Measured on this machine", lambda: measurements.findings(device))
    if checks:
        faults = [one.value for one in talk.findings if one.state is State.ERROR]
        blocked = f"communication cannot work here ({faults[0]})" if faults else ""
        yield from check.sections(device, timeout_s=timeout_s, blocked=blocked, tell=tell)


def config_finding(path: str) -> Finding:
    """Whether a ds_config's section is right, and who acts on it."""
    try:
        size = LVXConfig.from_ds_config(path).sequence_parallel_size
    except (ValueError, NotImplementedError) as error:
        return Finding(path, str(error), State.ERROR, advice="docs/configuration.md has every key")
    return Finding(
        path,
        f"a section ds_lvx for {in_ranks(size)} a sample",
        State.NOTE,
        advice="only ds_lvx.initialize, ds_lvx.trainer and ds_lvx.accelerate act on it: Trainer of "
        "transformers, Accelerator of accelerate and deepspeed.initialize train without it",
    )


def _section(title: str, look: Callable[[], list[Finding]]) -> Section:
    try:
        return Section(title, look())
    # A part that cannot be looked at must not hide the others.
    except Exception as error:  # noqa: BLE001
        value = f"could not be looked at: {type(error).__name__}: {error}"
        return Section(title, [Finding(title, value, State.ERROR, advice="report this line")])


def _record(sections: list[Section], errors: int, warnings: int) -> dict[str, Any]:
    return {
        "errors": errors,
        "warnings": warnings,
        "sections": [
            {"title": section.title, "findings": [one.record() for one in section.findings]}
            for section in sections
        ],
    }


def _summary(errors: int, warnings: int, *, checked: bool) -> str:
    if errors or warnings:
        found = ((errors, "error", "FAIL"), (warnings, "warning", "warn"))
        parts = [f"{n} {w}{'s' * (n > 1)} (look for {mark})" for n, w, mark in found if n]
        return " and ".join(parts)
    if not checked:
        return "nothing amiss; exactness was not checked"
    return "nothing amiss; attention is exact on 1 and on 2 ranks"
