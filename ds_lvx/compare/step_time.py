"""What recomputation costs of a whole training step, in the proportions of a real model.

In a step K and V of the cross-attention are a small part: the vision tower, the projector and the
text's own layers take their time too. So one eighth of Llama-3.2-11B-Vision is trained at its real
dimensions (one cross-attention and four self-attention layers, four and one layers of the vision
tower, one frame of four tiles), in one process, with and without recomputation, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ds_lvx.compare.case import Case
from ds_lvx.compare.fresh import run_fresh
from ds_lvx.compare.memory import spread
from ds_lvx.compare.rank import Request
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
    frames: int,
    steps: int,
    rounds: int,
    threads: int,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Step times without and with ``recompute_kv``.

    Args:
        case: what is trained; vision tower frozen and trained, in turns.
        frames: of the sample.
        steps: measured in each process, after one to warm up.
        rounds: processes for each setting, in turns, so that both see the same neighbours.
        threads: of the one process on a CPU.
        say: gets a line about every comparison.

    Returns:
        One record for each of: tower frozen or trained, layers checkpointed or not.
    """
    records = []
    for features in ("frozen", "tower"):
        for checkpointing in (False, True):
            without = Setting(checkpointing=checkpointing)
            pair = {"kept": without, "recomputed": replace(without, recompute_kv=True)}
            times: dict[str, list[float]] = {name: [] for name in pair}
            parts: dict[str, list[Any]] = {name: [] for name in pair}
            for _ in range(rounds):
                for name, setting in pair.items():
                    request = Request(
                        replace(case, features=features),
                        setting,
                        ranks=1,
                        frames=frames,
                        warm_up_frames=frames,
                        steps=steps,
                    )
                    (answer,) = run_fresh(request, threads=threads)
                    times[name] += answer["step_s"]
                    parts[name].append(answer)
            spreads = {name: spread(samples) for name, samples in times.items()}
            cost = spreads["recomputed"]["median"] / spreads["kept"]["median"] - 1.0
            records.append(
                {
                    "vision_tower": "trained" if features == "tower" else "frozen",
                    "checkpointing": checkpointing,
                    "visual_tokens": frames * case.frame_tokens,
                    "recomputation_costs": cost,
                    "step_s": spreads,
                    "case": asdict(replace(case, features=features)),
                    "runs": parts,
                }
            )
            say(f"vision tower {features}, checkpointing {checkpointing}: {cost:+.1%} of a step")
    return records
