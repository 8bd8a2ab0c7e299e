"""Memory of a training step by setting, and what recomputation costs of its time.

Every size is measured in fresh processes. The slope over three sizes is what a visual token costs;
weights, gradients, the text and everything else that does not grow with the visual input are in the
intercept. Tokens are those of one rank.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.peak import PROMPT_FREEING
from bench.weigh import Weighing, weigh
from ds_lvx.compare.case import Case, ds_config
from ds_lvx.compare.document import Cells, Results, columns, percentiles
from ds_lvx.compare.harness import Ranks, on_ranks, slowest, spread
from ds_lvx.models.dimensions import Layers
from ds_lvx.plan import memory as formulas
from ds_lvx.plan.memory import Setting

GIB = 2**30
HEAVY_BYTES = 65_536
"""A setting that needs more than this a token is measured at smaller sizes."""
PLAIN = "lvx"
ALSO_FROZEN = (
    PLAIN,
    "lvx, recompute",
    "lvx, recompute, checkpointing, chunks",
    "lvx, recompute, checkpointing, chunks, offload",
)
"""Settings that are measured with frozen features too."""

_TIMEOUT_S = 6 * 3600.0
"""A step that fills a rank's memory takes most of an hour on a CPU."""


@dataclass(frozen=True)
class Scales:
    """How the settings are measured."""

    case: Case  # what is trained
    where: Ranks  # that share the sample
    frames: int = 32  # the smallest visual input of a rank, at which step times are compared
    steps: int = 3  # measured at that size; one at others
    # What the largest run may add to a rank's memory; 0: it is not so large.
    budget_bytes: int = GIB

    def run(
        self, setting: Setting, *, frames: int, timed: bool = False, counts_launches: bool = False
    ) -> dict[str, Any]:
        """One run: each rank's samples, and the rank that needs most.

        A run for times warms up at full size. One for bytes does not: what malloc has left over
        from a step of the same size would count as there before.
        """
        sizes = (frames,) * (1 + self.steps) if timed else (1, frames)
        load = Weighing(self.case, setting, sizes, counts_launches=counts_launches)
        ranks = on_ranks(weigh, load, self.where)

        def most(name: str) -> float:
            return max(statistics.median(rank[name]) for rank in ranks)

        return {
            "tokens": frames * self.case.frame_tokens,
            "kept_bytes": most("kept_bytes"),
            "peak_bytes": most("peak_bytes"),
            "step_s": slowest(*(rank["step_s"] for rank in ranks)),
            "processor_s": slowest(*(rank["processor_s"] for rank in ranks)),
            "load_average": os.getloadavg(),
            "ranks": ranks,
        }

    def cost(self, setting: Setting) -> float:
        """Bytes a token by the formula."""
        return _predict(setting, self.case, **self.place)["peak_bytes_per_token"]

    @property
    def place(self) -> dict[str, Any]:
        """What the formula has to know of where."""
        return {"ranks": self.where.count, "cuda": self.where.device == "cuda"}


def ranks_here(count: int) -> Ranks:
    """So many on this machine, whose memory is what they use.

    Raises:
        ValueError: more than there are GPUs.
    """
    return Ranks.here(count, timeout_s=_TIMEOUT_S, environment=PROMPT_FREEING)


def settings(chunk_tokens: int) -> dict[str, Setting]:
    """What is compared, by name."""
    recompute = Setting(recompute_kv=True)
    both = replace(recompute, checkpointing=True)
    chunks = replace(both, kv_chunk_tokens=chunk_tokens)
    found = {
        PLAIN: Setting(),
        "lvx, recompute": recompute,
        "lvx, recompute, checkpointing": both,
        "lvx, recompute, checkpointing, offload": replace(both, features="offload"),
        "lvx, recompute, checkpointing, chunks": chunks,
        "lvx, recompute, checkpointing, chunks, offload": replace(chunks, features="offload"),
    }
    for method in ("ulysses", "ring"):
        found[method] = Setting(method)
        found[f"{method}, checkpointing"] = Setting(method, checkpointing=True)
    return found


def measure(
    name: str, setting: Setting, scales: Scales, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure one setting: step times at the smallest size, bytes at three, the last as fits.

    ``say`` gets a line about every run. The record for the JSON has the ds_config, predicted and
    measured bytes a token, and every sample.
    """
    case = scales.case
    timed = scales.run(setting, frames=scales.frames, timed=True)
    say(f"{name}, features {case.features}: {timed['step_s'][-1]:.1f} s a step")
    first, second, third = (2, 3, 4) if scales.cost(setting) > HEAVY_BYTES else (3, 6, 9)
    record: dict[str, Any] = {
        "name": name,
        "features": case.features,
        "setting": asdict(setting),
        "case": asdict(case),
        "ds_config": ds_config(setting, case, ranks=scales.where.count),
        "budget_bytes": scales.budget_bytes,
        "environment_of_the_ranks": PROMPT_FREEING,
        "timed": timed,
        "runs": [scales.run(setting, frames=size * scales.frames) for size in (first, second)],
    }
    if scales.budget_bytes > 0:
        return enlarge(record, scales, say=say)
    record["runs"].append(scales.run(setting, frames=third * scales.frames))
    return record | compared(record, **scales.place)


def enlarge(
    record: Mapping[str, Any], scales: Scales, *, say: Callable[[str], None] = print, **about: Any
) -> dict[str, Any]:
    """A record of `measure` as it would be with one more run, the largest that the budget allows.

    The case and the number of ranks are the same. The run's record holds ``about``, too.
    """
    setting = Setting(**record["setting"])
    slope, intercept = _line(record["runs"], "peak_bytes")
    # Where sizes are too small for a slope, the formula keeps the run from being endless.
    room = (scales.budget_bytes - intercept) / max(slope, scales.cost(setting))
    frames = max(int(room / scales.case.frame_tokens), 1)
    run = {**scales.run(setting, frames=frames), **about}
    runs = sorted([*record["runs"], run], key=lambda each: int(each["tokens"]))
    larger = {**record, "budget_bytes": scales.budget_bytes, "runs": runs}
    larger |= compared(larger, **scales.place)
    say(
        f"  {larger['peak_bytes_per_token']:,.0f} bytes a token; {run['tokens']:,} tokens: "
        f"{run['peak_bytes'] / GIB:.3f} GiB, {run['step_s'][-1]:.1f} s"
    )
    return larger


def _line(runs: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float]:
    """Slope and intercept of bytes over tokens."""
    tokens = [run["tokens"] for run in runs]
    slope, intercept = np.polyfit(tokens, [run[column] for run in runs], 1)
    return float(slope), float(intercept)


def compared(record: Mapping[str, Any], *, ranks: int, cuda: bool) -> dict[str, Any]:
    """What follows from a record's samples: slopes, times, and the formulas beside them."""
    setting, case = Setting(**record["setting"]), Case(**record["case"])
    predicted = _predict(setting, case, ranks=ranks, cuda=cuda)
    slope, _ = _line(record["runs"], "peak_bytes")
    return {
        "kept_bytes_per_token": _line(record["runs"], "kept_bytes")[0],
        "peak_bytes_per_token": slope,
        "tokens_per_gib": GIB / slope,
        "predicted": predicted,
        "measured_over_predicted": slope / predicted["peak_bytes_per_token"],
        "step_s": spread(record["timed"]["step_s"]),
        "processor_s": spread(record["timed"]["processor_s"]),
    }


def _predict(setting: Setting, case: Case, *, ranks: int, cuda: bool) -> dict[str, float]:
    """Bytes that a visual token costs by the formulas, here and on an accelerator."""
    accelerator = formulas.Load(keys=1, ranks=ranks, features_train=case.features != "frozen")
    here = replace(accelerator, host_is_device=not cuda)
    saved = formulas.kept(case.layers, setting, here)
    return {
        "kept_bytes_per_token": saved.features + case.cross_layers * saved.of_keys,
        "kept_by_a_layer_bytes_per_token": saved.of_keys,
        "peak_bytes_per_token": peak_per_key(case.layers, setting, here),
        "peak_bytes_per_token_on_an_accelerator": peak_per_key(case.layers, setting, accelerator),
    }


def peak_per_key(layers: Layers, setting: Setting, load: formulas.Load) -> float:
    """Bytes that one more visual token adds to `ds_lvx.plan.memory.peak`, where there are many."""
    few, many = 2**22, 2**23
    low, high = (formulas.peak(layers, setting, replace(load, keys=keys)) for keys in (few, many))
    return (high - low) / (many - few) / load.batch


def recomputation(scales: Scales, *, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """Times of a whole step, in the proportions of a real model, with and without `recompute_kv`.

    In a step K and V of the cross-attention are a small part: the vision tower, the projector and
    the text's own layers take their time too. Both have ``rounds`` processes, in turns, so that
    they see the same neighbours. ``recomputation_costs`` in the record for the JSON are shares of
    the step without it, in wall time and in processor time.
    """
    kept, case = Setting(checkpointing=checkpointing), scales.case
    pair = {"kept": kept, "recomputed": replace(kept, recompute_kv=True)}
    runs: dict[str, list[Any]] = {name: [] for name in pair}
    for _ in range(rounds):
        for name, setting in pair.items():
            found = scales.run(setting, frames=scales.frames, timed=True, counts_launches=True)
            runs[name] += found["ranks"]
    seconds, costs = {}, {}
    for column in ("step_s", "processor_s"):
        both = {n: spread([s for run in own for s in run[column]]) for n, own in runs.items()}
        seconds[column] = both
        costs[column] = both["recomputed"]["median"] / both["kept"]["median"] - 1.0
    return {
        "vision_tower": "trained" if case.features == "tower" else "frozen",
        "checkpointing": checkpointing,
        "visual_tokens": scales.frames * case.frame_tokens,
        "recomputation_costs": costs,
        **seconds,
        "case": asdict(case),
        "load_average": os.getloadavg(),
        "runs": runs,
    }


# ---- the report


def name(results: Results) -> str:
    """``memory``, or ``step_time``."""
    return "memory" if "ranks" in results else "step_time"


def text(results: Results) -> str:
    """``memory.json`` or ``step_time.json`` as a table in Markdown."""
    return _of_bytes(results) if name(results) == "memory" else _of_times(results)


def _of_bytes(results: Results) -> str:
    records, case = results["records"], results["case"]
    plain = {r["features"]: r["tokens_per_gib"] for r in records if r["name"] == PLAIN}

    def largest(r: Mapping[str, Any]) -> str:
        run = r["runs"][-1]
        return f"{run['tokens']:,}, {run['peak_bytes'] / GIB:.2f}" if r["budget_bytes"] else "-"

    cells: Cells = {
        "features": "{features}",
        "setting": "{name}",
        "kept, bytes a token": "{kept_bytes_per_token:,.0f}",
        "peak, bytes a token": "{peak_bytes_per_token:,.0f}",
        "formula": "{predicted[peak_bytes_per_token]:,.0f}",
        "measured / formula": "{measured_over_predicted:.3f}",
        "tokens per GiB": "{tokens_per_gib:,.0f}",
        "x plain": lambda r: f"{r['tokens_per_gib'] / plain.get(r['features'], np.nan):.1f}",
        "step, s": "{step_s[median]:.1f}",
        "processor, s": "{processor_s[median]:.1f}",
        "largest run: tokens, GiB": largest,
    }
    title = (
        f"{case['cross_layers']} cross-attention layers of {case['hidden']}, {case['heads']} heads "
        f"and {case['kv_heads']} of K and V, bf16; {results['ranks']} ranks, tokens and bytes of "
        f"one; {case['text_tokens']} text tokens. Step times at "
        f"{records[0]['timed']['tokens']:,} tokens. {results['hardware']['device']}."
    )
    return f"{title}\n\n{columns(records, cells)}"


def _of_times(results: Results) -> str:
    cells: Cells = {
        "vision tower": "{vision_tower}",
        "checkpointing": lambda r: "yes" if r["checkpointing"] else "no",
        "K, V kept: step, s": lambda r: percentiles(r["step_s"]["kept"], "{:.2f}".format),
        "recomputed: step, s": lambda r: percentiles(r["step_s"]["recomputed"], "{:.2f}".format),
        "costs": "{recomputation_costs[step_s]:+.1%}",
        "costs in processor time": "{recomputation_costs[processor_s]:+.1%}",
    }
    title = (
        "A whole step of one eighth of the model at its real dimensions, "
        f"{results['records'][0]['visual_tokens']:,} visual tokens, "
        f"{results['case']['text_tokens']} text tokens, one process; median (10th to 90th "
        f"percentile). {results['hardware']['device']}."
    )
    return f"{title}\n\n{columns(results['records'], cells)}"


def draw(results: Results) -> Any:
    """Visual tokens per GiB by setting, with what the formula says as a mark."""
    if name(results) != "memory":
        return None
    from matplotlib.figure import Figure  # of the extra "plots"

    records = list(results["records"])[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(records)), layout="constrained")
    axes = figure.subplots()
    places = range(len(records))
    values = [record["tokens_per_gib"] for record in records]
    colours = ["C0" if record["features"] == "trained" else "C1" for record in records]
    bars = axes.barh(places, values, color=colours)
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=8, fontsize=8)
    predicted = [GIB / record["predicted"]["peak_bytes_per_token"] for record in records]
    axes.plot(predicted, places, "k|", markersize=12, label="formula")
    axes.set_yticks(places, [f"{r['name']} ({r['features']})" for r in records], fontsize=8)
    axes.set(
        xlim=(0, 1.15 * max(values)),
        xlabel="visual tokens per GiB of a rank, at the peak of a training step",
        title="Room for visual tokens; in brackets, whether their features want a gradient",
    )
    axes.legend(loc="center right")
    return figure
