"""What the quickstart found: a table on the terminal, `metrics.json` and `curves.png`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY_STEPS = 10
PACKAGES = ("ds_lvx", "torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        losses: the loss of the whole batch, by step.
        accuracy: share of the held-out digits that were named rightly.
        seconds: wall time of the steps.
        ranks: over which a sequence was split.
    """

    losses: list[float]
    accuracy: float
    seconds: float
    ranks: int


def report(folder: Path, *, sharded: Run, alone: Run, bytes_sent: Mapping[str, int]) -> None:
    """Write `metrics.json` and `curves.png` into ``folder`` and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = summarize(sharded, alone, bytes_sent)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(sharded, alone).savefig(folder / "curves.png", dpi=110)
    print(table(metrics, folder), flush=True)


def summarize(sharded: Run, alone: Run, bytes_sent: Mapping[str, int]) -> dict[str, Any]:
    """What `metrics.json` holds."""
    apart = differences(sharded, alone)
    return {
        "heldout_accuracy": sharded.accuracy,
        "heldout_accuracy_one_process": alone.accuracy,
        "loss_first": sharded.losses[0],
        "loss_last": sharded.losses[-1],
        "max_loss_difference_to_one_process": max(apart),
        f"max_loss_difference_first_{EARLY_STEPS}_steps": max(apart[:EARLY_STEPS]),
        "sequence_parallel_size": sharded.ranks,
        "steps": len(sharded.losses),
        "bytes_sent": dict(bytes_sent),
        "bytes_sent_counts": "bytes that rank 0 sends for cross-attention in one training step, "
        "forward and backward, counted by ds_lvx.traffic(); without the text layers' attention "
        "and without ZeRO's weights and gradients",
        "seconds": sharded.seconds,
        "seconds_one_process": alone.seconds,
        "measured": True,
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "losses": sharded.losses,
        "losses_one_process": alone.losses,
    }


def differences(sharded: Run, alone: Run) -> list[float]:
    """How far the two losses are apart, by step."""
    return [abs(a - b) for a, b in zip(sharded.losses, alone.losses, strict=True)]


def hardware() -> dict[str, Any]:
    accelerator = get_accelerator()
    return {
        "accelerator": accelerator.device_name(),
        "device": platform.processor() or platform.machine()
        if accelerator.device_name() == "cpu"
        else torch.cuda.get_device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
    }


def draw(sharded: Run, alone: Run) -> Figure:
    """The two loss curves, and under them how far they are apart."""
    from matplotlib.figure import Figure  # whose import takes a second

    figure = Figure(figsize=(7, 5), layout="constrained")
    curves, apart = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(sharded.losses) + 1)
    curves.plot(steps, sharded.losses, label=f"ds_lvx, {sharded.ranks} ranks", linewidth=2)
    curves.plot(steps, alone.losses, "--", label="transformers, one process", linewidth=1)
    curves.set_ylabel("loss")
    curves.legend()
    curves.set_title(f"Handwritten digits: {sharded.accuracy:.1%} of those held out are read")
    apart.semilogy(steps, [max(value, 1e-9) for value in differences(sharded, alone)], "C3")
    apart.set_ylabel("difference")
    apart.set_xlabel("step")
    return figure


def table(metrics: Mapping[str, Any], folder: Path) -> str:
    """The short table at the end."""
    early = metrics[f"max_loss_difference_first_{EARLY_STEPS}_steps"]
    ranks = f"{metrics['sequence_parallel_size']} ranks"
    sent = metrics["bytes_sent"]
    rows = [
        ("", ranks, "one process"),
        ("digits held out, read rightly", *_both(metrics, "heldout_accuracy", "{:.1%}")),
        ("loss of the last step", f"{metrics['loss_last']:.4f}", _last(metrics)),
        ("seconds", *_both(metrics, "seconds", "{:.1f}")),
        ("losses apart, at most", f"{metrics['max_loss_difference_to_one_process']:.1e}", ""),
        (f"  in the first {EARLY_STEPS} steps", f"{early:.1e}", ""),
        ("cross-attention sends a step", "", ""),
        *((f"  {method}", f"{count:,} B", "") for method, count in sent.items()),
    ]
    lines = [f"{name:<32}{left:>14}{right:>14}" for name, left, right in rows]
    rule = "-" * len(lines[0])
    where = f"{folder / 'metrics.json'} and {folder / 'curves.png'} have the rest"
    return "\n".join(["", lines[0], rule, *lines[1:], rule, where])


def _both(metrics: Mapping[str, Any], key: str, layout: str) -> tuple[str, str]:
    return layout.format(metrics[key]), layout.format(metrics[f"{key}_one_process"])


def _last(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['losses_one_process'][-1]:.4f}"
