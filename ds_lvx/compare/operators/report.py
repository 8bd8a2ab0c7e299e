"""A comparison's answers as one record, as a table on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_lvx.compare import document
from ds_lvx.compare.memory.measure import spread
from ds_lvx.compare.network import Network
from ds_lvx.compare.operators.agreement import Difference, disagreements

PEERS = ("ring", "ulysses")


class DisagreementError(RuntimeError):
    """Methods do not compute the same; the message says where."""


def check(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The largest difference of each pair and tensor over all ranks, as records for the JSON.

    Raises:
        DisagreementError: one is too large.
    """
    found = [
        Difference(**{**record, "index": tuple(record["index"]), "values": tuple(record["values"])})
        for answer in answers
        for record in answer["differences"]
    ]
    bad = disagreements(found)
    if bad:
        lines = "\n".join(f"  {difference}" for difference in bad)
        raise DisagreementError(
            f"the methods disagree; nothing was timed. The largest first:\n{lines}"
        )
    largest: dict[tuple[str, ...], Difference] = {}
    for own in found:
        key = (own.shape, own.one, own.other, own.tensor)
        if key not in largest or largest[key].error < own.error:
            largest[key] = own
    return [
        {
            "shape": own.shape,
            "one": own.one,
            "other": own.other,
            "tensor": own.tensor,
            "error": own.error,
            "tolerance": own.tolerance,
        }
        for own in largest.values()
    ]


def records(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record a method: seconds of the slowest rank, bytes of the rank that sends most."""
    found = []
    for method in answers[0]["methods"]:
        ranks = [answer["methods"][method] for answer in answers if method in answer["methods"]]
        step, kernels = (_slowest_sum(ranks, part) for part in ("step", "kernels"))
        record = {
            "method": method,
            "step_s": spread(step),
            "forward_s": spread(_slowest(ranks, "step", "forward_s")),
            "backward_s": spread(_slowest(ranks, "step", "backward_s")),
            "kernels_s": spread(kernels),
            "bytes_sent": max(rank["traffic"]["bytes_sent"] for rank in ranks),
            "messages": max(rank["traffic"]["calls"] for rank in ranks),
            "interface_over_traffic": _interface_over_traffic(ranks),
            "ranks": ranks,
        }
        step_s, kernels_s = record["step_s"]["median"], record["kernels_s"]["median"]
        record["exposed_s"] = step_s - kernels_s
        record["step_over_kernels"] = step_s / kernels_s
        found.append(record)
    medians = {record["method"]: record["step_s"]["median"] for record in found}
    for record in found:
        own = record["step_s"]["median"]
        record["times_faster_than"] = {
            peer: seconds / own for peer, seconds in medians.items() if peer != record["method"]
        }
    return found


def _slowest(ranks: Sequence[Mapping[str, Any]], part: str, column: str) -> list[float]:
    return [max(times) for times in zip(*(rank[part][column] for rank in ranks), strict=True)]


def _slowest_sum(ranks: Sequence[Mapping[str, Any]], part: str) -> list[float]:
    """Forward and backward together, of the rank that took longest."""
    sums = [
        [forward + backward for forward, backward in zip(*pair, strict=True)]
        for pair in ((rank[part]["forward_s"], rank[part]["backward_s"]) for rank in ranks)
    ]
    return [max(times) for times in zip(*sums, strict=True)]


def _interface_over_traffic(ranks: Sequence[Mapping[str, Any]]) -> float | None:
    """What left the interfaces without packet headers, over what `ds_lvx.traffic` counted.

    Of all ranks, the one that is furthest from 1.
    """
    ratios = [
        rank["interface"]["sent_payload_bytes"]
        / (rank["traffic"]["bytes_sent"] + rank["traffic"]["control_bytes"])
        for rank in ranks
        if rank["interface"] is not None and rank["traffic"]["bytes_sent"]
    ]
    return max(ratios, key=lambda ratio: abs(ratio - 1.0)) if ratios else None


def title(results: Mapping[str, Any]) -> str:
    """One line about what was compared, on what."""
    shape = results["shape"]
    words = [
        f"S_q = {count(shape['seqlen_q'])}",
        f"S_kv = {count(shape['seqlen_kv'])}",
        f"{shape['heads']} heads ({shape['kv_heads']} of K and V) of {shape['head_dim']}",
        shape["dtype"],
        f"{results['ranks']} ranks",
    ]
    if shape["batch"] > 1:
        words.insert(0, f"batch {shape['batch']}")
    if shape["visibility"] != "all":
        words.append(f"visibility {shape['visibility']}")
    if shape["features_dim"] is not None:
        how = "projected again by lvx" if results["recompute"] else "kept"
        words.append(f"K and V from features of {shape['features_dim']}, {how}")
    if not results["overlap"]:
        words.append("no overlap")
    if results["network"] is not None:
        words.append(f"emulated network of {results['network']['name']}")
    return ", ".join(words)


def count(number: int) -> str:
    """``65536`` as ``64K``."""
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


HEADINGS = (
    "method",
    "forward, s",
    "backward, s",
    "step, s (p10 to p90)",
    "kernels alone, s",
    "step / kernels",
    "sent a rank, MB",
    "x ring",
    "x ulysses",
)


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells, without the headings. Ratios are rounded to our disadvantage."""
    return [
        (
            _label(record),
            _seconds(record["forward_s"]["median"]),
            _seconds(record["backward_s"]["median"]),
            f"{_seconds(record['step_s']['median'])} ({_seconds(record['step_s']['p10'])} to "
            f"{_seconds(record['step_s']['p90'])})",
            _seconds(record["kernels_s"]["median"]),
            f"{math.ceil(record['step_over_kernels'] * 100) / 100:.2f}",
            f"{record['bytes_sent'] / 1e6:.3f}",
            *(times(record["times_faster_than"].get(peer)) for peer in PEERS),
        )
        for record in results["records"]
    ]


def _label(record: Mapping[str, Any]) -> str:
    schedule = record["ranks"][0]["schedule"]
    return f"lvx-auto ({schedule})" if record["method"] == "lvx-auto" else str(record["method"])


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def times(ratio: float | None) -> str:
    """How many times faster, rounded down."""
    if ratio is None:
        return "-"
    digits = 2 if ratio < 10 else 1
    return f"{math.floor(ratio * 10**digits) / 10**digits:.{digits}f}"


def terminal(results: Mapping[str, Any]) -> Table:
    """For `rich`."""
    table = Table(title=title(results), caption=_caption(results), title_justify="left")
    for heading in HEADINGS:
        left = heading == "method"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in rows(results):
        table.add_row(*row)
    return table


def _caption(results: Mapping[str, Any]) -> str:
    lines = [
        f"{results['kind']} on {results['hardware']['device']}, {results['threads_per_rank']} "
        f"threads a rank; medians of {results['repeats']} steps of the slowest rank",
        *(f"{method}: skipped, {reason}" for method, reason in results["skipped"].items()),
    ]
    return "\n".join(lines)


def markdown(results: Mapping[str, Any]) -> str:
    """The same as text for a document."""
    caption = _caption(results).replace("\n", "; ")
    return f"{title(results)}; {caption}.\n\n{document.markdown([HEADINGS, *rows(results)])}"


def write_into(path: Path, results: Mapping[str, Any]) -> None:
    """Replace the table of this comparison in a document, between its two comment lines.

    Raises:
        ValueError: the document does not have both lines, in order.
    """
    document.write_between(path, f"ds-lvx compare, {name(results)}", markdown(results))


def name(results: Mapping[str, Any]) -> str:
    """A name for the files of a comparison, from what was compared."""
    shape = results["shape"]
    words = [
        f"compare-q{count(shape['seqlen_q'])}-kv{count(shape['seqlen_kv'])}".replace(",", ""),
        f"ranks{results['ranks']}",
    ]
    if shape["visibility"] != "all":
        words.append(shape["visibility"])
    if shape["features_dim"] is not None:
        words.append("recompute" if results["recompute"] else "features")
    if not results["overlap"]:
        words.append("no-overlap")
    if results["network"] is not None:
        words.append(results["network"]["name"].replace(",", "-"))
    return "-".join(words)


def network_record(text: str | None, *, ranks_of_a_node: int = 1) -> dict[str, Any] | None:
    """An emulated network for the JSON, from its short form."""
    if not text:
        return None
    network = Network.parse(text)
    ranks = "a rank" if ranks_of_a_node == 1 else f"for {ranks_of_a_node} ranks"
    return {
        "name": str(network),
        "bits_per_s": network.bits_per_s,
        "latency_s": network.latency_s,
        "how": f"one network namespace {ranks}, each behind a token bucket in both directions "
        "(launch/netlab.sh); real processes and sockets on one machine",
    }
