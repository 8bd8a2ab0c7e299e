"""The kernel benchmark's results as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ds_lvx.compare.document import columns, markdown, times
from ds_lvx.compare.kernels.cases import DIRECTIONS, KernelCase
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.roofline import floor

NOT_MEASURED = "not measured"

PAPER_HEAD_DIMS = (64, 128)
CARD_NAMES = ("A100-80", "H100", "H200", "B200")


def floors(cases: Iterable[KernelCase]) -> list[dict[str, Any]]:
    """Operations, bytes and the least time by card, by its data sheet, of each case's directions.

    ``seconds`` and ``bound`` are by card; see `ds_lvx.plan.roofline`.
    """
    found = []
    for case in cases:
        for direction in DIRECTIONS:
            work = case.work(direction)
            least = {name: floor(work, CARDS[name]) for name in CARD_NAMES}
            found.append(
                {
                    "case": case.name,
                    "direction": direction,
                    "shape": vars(case),
                    "keys": case.keys,
                    "flops": work.flops,
                    "memory_bytes": work.memory_bytes,
                    "seconds": {name: each.seconds for name, each in least.items()},
                    "bound": {name: each.bound for name, each in least.items()},
                }
            )
    return found


def floors_table(predicted: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """Floors by card, with ``auto``'s measured time where there is one from a GPU."""
    seconds = {}
    if measured is not None and measured["device"] == "cuda":
        seconds = {
            _place(record): _ms(record["device_s"]["median"])
            for record in measured["records"]
            if record["candidate"] == "auto" and record["status"] == "ok"
        }

    def least(card: str) -> Callable[[Any], str]:
        return lambda r: f"{_ms(r['seconds'][card])} {r['bound'][card]}"

    cells: dict[str, Callable[[Any], str]] = {
        "case": lambda r: r["case"],
        "direction": lambda r: r["direction"],
        "operations, G": lambda r: f"{r['flops'] / 1e9:,.1f}",
        "bytes, MB": lambda r: f"{r['memory_bytes'] / 1e6:,.1f}",
        **{f"{card}, ms": least(card) for card in CARD_NAMES},
        "measured, ms": lambda r: seconds.get((r["case"], r["direction"]), NOT_MEASURED),
    }
    device = "" if not seconds or measured is None else f" Measured: `auto`, {_device(measured)}."
    title = (
        "Predicted: the least time by the data sheet, and whether matrix products or memory set "
        f"it.{device}"
    )
    return f"{title}\n\n{columns(predicted['records'], cells)}"


def measured_table(results: Mapping[str, Any] | None) -> str:
    """Times of all candidates, ours against the best peer, and why times are missing."""
    if results is None:
        return "Not measured yet: no file `benchmarks/kernels.json`."
    parts = [_title(results), _times(results["records"]), _ours(results), _auto(results)]
    return "\n\n".join([*parts, *_reasons(results["records"])])


def _times(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each case and direction, a column for each candidate."""
    candidates = list(dict.fromkeys(record["candidate"] for record in records))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        cells.setdefault(_place(record), {})[record["candidate"]] = _time(record)
    rows: list[Sequence[str]] = [("median (p10 to p90), ms", "", *candidates)]
    for place, own in cells.items():
        rows.append((*place, *(own.get(name, "-") for name in candidates)))
    return markdown(rows)


def _ours(results: Mapping[str, Any]) -> str:
    """What the times of our kernels mean."""
    compared = {(each["case"], each["direction"]): each for each in results["comparisons"]}

    def best_peer(r: Mapping[str, Any]) -> str:
        peer = compared[_place(r)]["best_peer"]
        return "-" if peer is None else str(peer[0])

    cells: dict[str, Callable[[Any], str]] = {
        "case": lambda r: _place(r)[0],
        "direction": lambda r: r["direction"],
        "kernel": _who,
        "TFLOP/s": lambda r: f"{r['tflops_per_s']:.3g}",
        "of the rate that binds": lambda r: (
            f"{r['share_of_' + r['bound'] + '_rate']:.1%} {r['bound']}"
        ),
        "best peer": best_peer,
        "times as fast as it": lambda r: times(
            compared[_place(r)]["times_best_peer"].get(r["candidate"])
        ),
        "memory on top, MB": lambda r: (
            "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e6:,.1f}"
        ),
    }
    return columns([r for r in results["records"] if r["ours"] and r["status"] == "ok"], cells)


def _reasons(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why there is no time, each reason once."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            text = f"{record['candidate']} {record['status']}: {_short(record['reason'])}"
            reasons.setdefault(text, []).append("/".join(_place(record)))
    lines = [f"- {text} ({len(where)}: {where[0]} ...)" for text, where in reasons.items()]
    return ["Without a time:", "\n".join(lines)] if lines else []


def compiled_table(compiled: Mapping[str, Any]) -> str:
    """What the compiler made of the kernels in bf16 at the paper's head_dims, by capability."""
    records = compiled["records"]
    capabilities = sorted({record["capability"] for record in records})
    columns = [f"sm_{each}: registers, shared KB, programs" for each in capabilities]
    head = ("kernel", "head_dim", "rows", "visibility", "tile", "warps, stages", *columns)
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        if record["dtype"] != "bf16" or record["head_dim"] not in PAPER_HEAD_DIMS:
            continue
        about = (
            record["kernel"],
            str(record["head_dim"]),
            f"{record['rows']:,}",
            "yes" if record["visibility"] else "no",
            f"{record['tile_rows']} x {record['tile_keys']}",
            f"{record['warps']}, {record['stages']}",
        )
        figures = (
            f"{record['registers']}, {record['shared_bytes'] / 1024:.0f}, "
            f"{record['programs_per_multiprocessor']}"
        )
        rows.setdefault(about, []).append(figures)
    table = markdown([head, *((*about, *figures) for about, figures in rows.items())])
    notes = "\n".join(_compiled_line(records, each) for each in capabilities)
    return f"Triton {compiled['versions']['triton']}.\n\n{notes}\n\n{table}"


def _compiled_line(records: Sequence[Mapping[str, Any]], capability: int) -> str:
    """Spills, shared memory and wgmma of all configurations of a capability, in a line."""
    mine = [record for record in records if record["capability"] == capability]
    spilling = sum(record["spilled_bytes"] > 0 for record in mine)
    fullest = max(record["shared_bytes"] / record["most_shared_bytes"] for record in mine)
    line = (
        f"- sm_{capability}: {len(mine)} configurations, {spilling} of them spill registers; at "
        f"most {math.ceil(100 * fullest)}% of the shared memory that a block may have"
    )
    if capability != 90:
        return f"{line}."
    halves = [record for record in mine if record["dtype"] == "bf16"]
    fast = sum(record["wgmma"] for record in halves)
    small = sum(not record["wgmma"] and _product_rows(record) < 64 for record in halves)
    return (
        f"{line}; {fast} of the {len(halves)} in bf16 use wgmma, and {small} have products of "
        "fewer rows than the 64 that a wgmma takes."
    )


def _product_rows(record: Mapping[str, Any]) -> int:
    """Rows of a program's products: the kernel for dk and dv turns them round."""
    return int(record["tile_keys" if record["kernel"] == "keys" else "tile_rows"])


def _title(results: Mapping[str, Any]) -> str:
    rates = results["rates"]
    return (
        f"{_device(results)}; timed by {rates['clock']}. Measured in the same run: a bf16 product "
        f"of {rates['matrix_size']:,} x {rates['matrix_size']:,} matrices at "
        f"{rates['matrix_flops'] / 1e12:.3g} TFLOP/s, a copy in memory at "
        f"{rates['memory_bytes_per_s'] / 1e12:.3g} TB/s."
    )


def _device(results: Mapping[str, Any]) -> str:
    return str(results["hardware"]["device"])


def _who(record: Mapping[str, Any]) -> str:
    chosen = record.get("chosen")
    return f"auto ({chosen})" if record["candidate"] == "auto" and chosen else record["candidate"]


def _place(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["name"].partition("/")[0], record["direction"]


def _time(record: Mapping[str, Any]) -> str:
    if record["status"] != "ok":
        return str(record["status"])
    spread = record["device_s"]
    return f"{_ms(spread['median'])} ({_ms(spread['p10'])} to {_ms(spread['p90'])})"


def _auto(results: Mapping[str, Any]) -> str:
    """One line on the choice of ``auto``, over all cases."""
    gaps = [
        (each["auto_over_best"], each)
        for each in results["comparisons"]
        if each["auto_over_best"] is not None
    ]
    if not gaps:
        return "`auto` was not measured."
    worst, where = max(gaps, key=lambda pair: pair[0])
    return (
        f"`auto` takes at most {math.ceil(1000 * worst) / 10:.1f}% longer than the best of all "
        f"({where['case']}, {where['direction']}, where {where['best'][0]} is best)."
    )


def _short(reason: str) -> str:
    """The first line, and no bar that would end a column."""
    line = reason.strip().partition("\n")[0].replace("|", "/")
    return line if len(line) <= 100 else f"{line[:97]}..."


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
