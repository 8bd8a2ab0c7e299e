"""What recomputation costs of a whole training step, in the proportions of a real model.

In a step K and V of the cross-attention are a small part: the vision tower, the projector and the
text's own layers take their time too. So one eighth of Llama-3.2-11B-Vision is trained at its real
dimensions (one cross-attention and four self-attention layers, four and one layers of the vision
tower, one frame of four tiles), in one process, with and without recomputation, in turns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ds_lvx.compare.case import Case
from ds_lvx.compare.memory.measure import spread
from ds_lvx.compare.memory.rank import Request, run
from ds_lvx.plan.memory import Setting

EIGHTH = Case(
    cross_layers=1,
    self_layers=4,
    mlp=14336,
    vision_hidden=1280,
    vision_heads=16,
    vision_mlp=5120,
    vision_layers=4,
    vision_global_layers=1,
    image_size=560,
    patch_size=14,
    tiles=4,
    trains="cross",
)


def measure(
    case: Case,
    *,
    checkpointing: bool,
    frames: int,
    steps: int,
    rounds: int,
    threads: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Step times without and with ``recompute_kv``.

    Args:
        case: what is trained; its ``features`` say whether the vision tower is.
        checkpointing: of the layers, without and with.
        frames: of the sample.
        steps: measured in each process, after one to warm up.
        rounds: processes for each, in turns, so that both see the same neighbours.
        threads: of the one process on a CPU.
        say: gets a line about the comparison.

    Returns:
        A record for the JSON; ``recomputation_costs`` are shares of the step without it, in wall
        time and in processor time.
    """
    without = Setting(checkpointing=checkpointing)
    pair = {"kept": without, "recomputed": replace(without, recompute_kv=True)}
    runs: dict[str, list[Any]] = {name: [] for name in pair}
    for _ in range(rounds):
        for name, setting in pair.items():
            request = Request(
                case, setting, ranks=1, frames=frames, warm_up_frames=frames, steps=steps
            )
            runs[name] += run(request, threads=threads)
    times = {
        column: {
            name: spread([seconds for run in own for seconds in run[column]])
            for name, own in runs.items()
        }
        for column in ("step_s", "processor_s")
    }
    costs = {
        column: pairs["recomputed"]["median"] / pairs["kept"]["median"] - 1.0
        for column, pairs in times.items()
    }
    tower = "trained" if case.features == "tower" else "frozen"
    say(
        f"vision tower {tower}, checkpointing {checkpointing}: "
        f"{costs['step_s']:+.1%} of a step, {costs['processor_s']:+.1%} of processor time"
    )
    return {
        "vision_tower": tower,
        "checkpointing": checkpointing,
        "visual_tokens": frames * case.frame_tokens,
        "recomputation_costs": costs,
        **times,
        "case": asdict(case),
        "load_average": os.getloadavg(),
        "runs": runs,
    }
