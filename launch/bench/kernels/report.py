"""The kernel benchmark's results as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from bench.kernels.candidates import OURS
from bench.kernels.cases import DIRECTIONS, KernelCase
from bench.kernels.roofline import floor
from ds_lvx.compare.document import Cells, cell, columns, markdown, percentiles, times
from ds_lvx.plan.cards import CARDS

PAPER_HEAD_DIMS = (64, 128)
CARD_NAMES = ("A100-80", "H100", "H200", "B200")

Record = Mapping[str, Any]
Place = tuple[str, str]
"""A case and a direction."""
Seconds = Mapping[Place, Mapping[str, float]]
"""Medians, by candidate."""


def floors(cases: Iterable[KernelCase]) -> list[dict[str, Any]]:
    """Operations, bytes and the least time by card, by its data sheet, of each case's directions.

    ``seconds`` and ``bound`` are by card; see `bench.kernels.roofline`.
    """
    found, cards = [], [CARDS[name] for name in CARD_NAMES]
    for case, direction in product(cases, DIRECTIONS):
        work = case.work(direction)
        least = {c.name: floor(work, c.matrix_flops, c.memory_bytes_per_s) for c in cards}
        about = {"case": case.name, "direction": direction, "shape": vars(case.shape)}
        seconds = {name: each.seconds for name, each in least.items()}
        bound = {name: each.bound for name, each in least.items()}
        found.append({**about, **work._asdict(), "seconds": seconds, "bound": bound})
    return found


def floors_table(predicted: Record, measured: Record | None) -> str:
    """Floors by card, with ``auto``'s measured time where there is one from a GPU."""
    timed: Mapping[Place, Mapping[str, float]] = {}
    title = (
        "Predicted: the least time by the data sheet, and whether matrix products or memory set it."
    )
    if measured is not None and measured["device"] == "cuda":
        timed = _medians(measured["records"])
        title += f" Measured: `auto`, {measured['hardware']['device']}."

    def least(card: str) -> Callable[[Record], str]:
        return lambda r: f"{_ms(r['seconds'][card])} {r['bound'][card]}"

    def own(r: Record) -> str:
        found = timed.get((r["case"], r["direction"]), {}).get("auto")
        return "not measured" if found is None else _ms(found)

    cells: Cells = {
        "case": "{case}",
        "direction": "{direction}",
        "operations, G": lambda r: f"{r['flops'] / 1e9:,.1f}",
        "bytes, MB": lambda r: f"{r['memory_bytes'] / 1e6:,.1f}",
        **{f"{card}, ms": least(card) for card in CARD_NAMES},
        "measured, ms": own,
    }
    return f"{title}\n\n{columns(predicted['records'], cells)}"


def joined(results: Record | None, others: Record) -> dict[str, Any]:
    """A measurement, and what another has times of that the first has not.

    Raises:
        ValueError: they are of different hardware or versions.
    """
    if results is None:
        return dict(others)
    for name in ("hardware", "versions"):
        if results[name] != others[name]:
            raise ValueError(
                f"{name}: got {others[name]} beside {results[name]}; expected one machine"
            )
    found = {r["name"]: r for r in results["records"]}
    for record in others["records"]:
        if found.get(record["name"], {"status": "left out"})["status"] == "left out":
            found[record["name"]] = record
    return {**results, "records": list(found.values())}


def measured_table(results: Record | None) -> str:
    """Times of all candidates, ours against the best peer, and why times are missing."""
    if results is None:
        return "Not measured yet: no file `benchmarks/kernels.json`."
    rates, records = results["rates"], results["records"]
    seconds = _medians(records)
    title = (
        f"{results['hardware']['device']}; timed by {rates['clock']}. Measured in the same run: a "
        f"bf16 product of {rates['matrix_size']:,} x {rates['matrix_size']:,} matrices at "
        f"{rates['matrix_flops'] / 1e12:.3g} TFLOP/s, a copy in memory at "
        f"{rates['memory_bytes_per_s'] / 1e12:.3g} TB/s."
    )
    tables = _times(records, seconds), _ours(records, seconds), _auto(seconds)
    return "\n\n".join([title, *tables, *_reasons(records)])


def _medians(records: Sequence[Record]) -> Seconds:
    found: dict[Place, dict[str, float]] = {}
    for r in records:
        if r["status"] == "ok":
            found.setdefault(_place(r), {})[r["candidate"]] = r["device_s"]["median"]
    return found


def _times(records: Sequence[Record], timed: Seconds) -> str:
    """A row for each case and direction, a column for each candidate."""
    candidates = list(dict.fromkeys(r["candidate"] for r in records))
    rows = {place: dict.fromkeys(candidates, "-") for place in map(_place, records)}
    for r in records:
        is_timed = r["status"] == "ok"
        text = percentiles(r["device_s"], _ms) if is_timed else r["status"]
        rows[_place(r)][r["candidate"]] = text
    body = ((*place, *own.values()) for place, own in rows.items() if place in timed)
    return markdown([("median (p10 to p90), ms", "", *candidates), *body])


def _ours(records: Sequence[Record], timed: Seconds) -> str:
    """What the times of ``auto`` mean, and how they stand against the best of the others."""
    peers = {
        place: min((s, name) for name, s in [*own.items(), ("-", math.inf)] if name not in OURS)
        for place, own in timed.items()
    }

    def faster(r: Record) -> str:
        ratio = peers[_place(r)][0] / r["device_s"]["median"]
        return times(None if math.isinf(ratio) else ratio)

    cells: Cells = {
        "case": lambda r: _place(r)[0],
        "direction": "{direction}",
        "kernel": lambda r: f"auto ({r['chosen']})" if r.get("chosen") else "auto",
        "TFLOP/s": "{tflops_per_s:.3g}",
        "of the rate that binds": lambda r: (
            f"{r['share_of_' + r['bound'] + '_rate']:.1%} {r['bound']}"
        ),
        "best peer": lambda r: peers[_place(r)][1],
        "times as fast as it": faster,
        "memory on top, MB": lambda r: (
            "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e6:,.1f}"
        ),
    }
    auto = [r for r in records if r["candidate"] == "auto" and r["status"] == "ok"]
    return columns(auto, cells)


def _auto(seconds: Seconds) -> str:
    """One line on the choice of ``auto``, over all cases."""
    gaps = {p: own["auto"] / min(own.values()) - 1 for p, own in seconds.items() if "auto" in own}
    if not gaps:
        return "`auto` was not measured."
    worst = max(gaps, key=lambda place: gaps[place])
    best = min(seconds[worst], key=lambda candidate: seconds[worst][candidate])
    return (
        f"`auto` takes at most {math.ceil(1000 * gaps[worst]) / 10:.1f}% longer than the best of "
        f"all ({', '.join(worst)}, where {best} is best)."
    )


def _reasons(records: Sequence[Record]) -> list[str]:
    """Why there is no time, each reason once."""
    reasons: dict[str, list[str]] = {}
    for r in (record for record in records if record["status"] != "ok"):
        # The first line, and no bar that would end a column.
        line = r["reason"].strip().partition("\n")[0].replace("|", "/")
        line = line if len(line) <= 100 else f"{line[:97]}..."
        text = f"{r['candidate']} {r['status']}: {line}"
        reasons.setdefault(text, []).append("/".join(_place(r)))
    lines = [f"- {text} ({len(where)}: {where[0]} ...)" for text, where in reasons.items()]
    return ["Without a time:", "\n".join(lines)] if lines else []


def compiled_table(compiled: Record) -> str:
    """What the compiler made of the kernels in bf16 at the paper's head_dims, by capability."""
    records = compiled["records"]
    capabilities = sorted({r["capability"] for r in records})
    head: Cells = {
        "kernel": "{kernel}",
        "head_dim": "{head_dim}",
        "rows": "{rows:,}",
        "visibility": "{visibility}",
        "tile": "{tile_rows} x {tile_keys}",
        "warps, stages": "{warps}, {stages}",
    }
    rows: dict[tuple[str, ...], list[str]] = {}
    for r in records:
        if r["dtype"] == "bf16" and r["head_dim"] in PAPER_HEAD_DIMS:
            figures = (r["registers"], f"{r['shared_bytes'] / 1024:.0f}")
            programs = r["programs_per_multiprocessor"]
            own = rows.setdefault(tuple(cell(made_by, r) for made_by in head.values()), [])
            own.append(", ".join(map(str, (*figures, programs))))
    more = (f"sm_{each}: registers, shared KB, programs" for each in capabilities)
    table = markdown([(*head, *more), *((*about, *own) for about, own in rows.items())])
    notes = "\n".join(_compiled_line(records, each) for each in capabilities)
    return f"Triton {compiled['versions']['triton']}.\n\n{notes}\n\n{table}"


def _compiled_line(records: Sequence[Record], capability: int) -> str:
    """Spills, shared memory and wgmma of all configurations of a capability, in a line."""
    mine = [r for r in records if r["capability"] == capability]
    spilling = sum(r["spilled_bytes"] > 0 for r in mine)
    fullest = max(r["shared_bytes"] / r["most_shared_bytes"] for r in mine)
    line = (
        f"- sm_{capability}: {len(mine)} configurations, {spilling} of them spill registers; at "
        f"most {math.ceil(100 * fullest)}% of the shared memory that a block may have"
    )
    if capability != 90:
        return f"{line}."
    halves = [r for r in mine if r["dtype"] == "bf16"]
    # The kernel for dk and dv turns its products round.
    product_rows = [r["tile_keys" if r["kernel"] == "keys" else "tile_rows"] for r in halves]
    small = sum(not r["wgmma"] and rows < 64 for r, rows in zip(halves, product_rows, strict=True))
    return (
        f"{line}; {sum(r['wgmma'] for r in halves)} of the {len(halves)} in bf16 use wgmma, and "
        f"{small} have products of fewer rows than the 64 that a wgmma takes."
    )


def _place(record: Record) -> Place:
    return record["name"].partition("/")[0], record["direction"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
