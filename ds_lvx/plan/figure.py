"""The plan's plot: speed-up over ring attention against S_q / S_kv (the paper's figure 4)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from ds_lvx.attention.shape import evenly
from ds_lvx.plan.choose import candidates, label, obstacle
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import cost
from ds_lvx.plan.job import Job
from ds_lvx.plan.search import METHODS, SCHEDULES

_POINTS = 33


def curves(job: Job, cluster: Cluster, ranks: int) -> dict[str, list[tuple[float, float]]]:
    """``(S_q / S_kv, speed-up)`` by method, of the attention alone, at the job's visual tokens.

    Forward and backward, without the projection of K and V; the projection would be the same for
    all.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    keys = job.visual_tokens
    for point in range(_POINTS):
        queries = max(round(keys ** (point / (_POINTS - 1))), 1)
        shape = replace(
            job.cross_shape(ranks, recompute=False),
            q_lengths=tuple(evenly(queries, ranks)),
            features_dim=0,
        )
        ring = cost(shape, cluster, method="ring").seconds
        for method, schedule in candidates(METHODS, SCHEDULES):
            if method != "ring" and obstacle(shape, method, schedule) is None:
                own = cost(shape, cluster, method=method, schedule=schedule).seconds
                found.setdefault(label(method, schedule), []).append((queries / keys, ring / own))
    return found


def draw(job: Job, cluster: Cluster, ranks: int) -> Figure:
    """The curves, and the job itself as a line."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves(job, cluster, ranks).items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.axvline(job.text_tokens / job.visual_tokens, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(
        f"S_q / S_kv, S_kv = {job.visual_tokens:,}; dotted: {job.text_tokens:,} text tokens"
    )
    axes.set_ylabel("predicted speed-up over ring attention")
    axes.set_title(
        f"Cross-attention of {job.model.name.rpartition('/')[2]}, forward and backward,\n"
        f"{ranks} x {cluster.device.name}, {cluster.gpus_per_node} a node"
    )
    axes.legend()
    return figure


def save(job: Job, cluster: Cluster, ranks: int, path: Path) -> None:
    """Write the plot; groups of one rank have none, and are drawn with all GPUs.

    Raises:
        ValueError: a cluster of one GPU.
    """
    if cluster.gpus == 1:
        raise ValueError("--plot: got one GPU; expected at least 2, to have something to compare")
    draw(job, cluster, ranks if ranks > 1 else cluster.gpus).savefig(path, dpi=110)
