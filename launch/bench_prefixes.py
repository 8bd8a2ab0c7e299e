"""Measure training on completions of a video's prompt: each a row, and with a shared prefix.

    python launch/bench_prefixes.py --document docs/concatenated.md
    python launch/bench_prefixes.py --quick --output_dir /tmp/prefixes         small, to try it
    python launch/bench_prefixes.py --render --document docs/concatenated.md   only from the JSON

A micro-batch of GRPO: all completions of a prompt. The same random model, batch and steps either
way, whose losses are compared. Every way runs in fresh ranks. Some five minutes on two cores that
do nothing else. Writes prefixes.json into --output_dir and a table into --document.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ds_lvx
from bench.peak import PROMPT_FREEING, meter
from bench.script import leave, measured, told, usual_parser
from bench_concatenated import case_of
from ds_lvx.compare.case import Case, build_model, ds_config, make_batch
from ds_lvx.compare.document import Results, columns, percentiles, times
from ds_lvx.compare.harness import Ranks, meet, on_ranks, own_device, slowest, spread
from ds_lvx.compare.machine import header
from ds_lvx.compare.training.rank import by_column, training
from ds_lvx.plan.memory import Setting

MIB = 2**20
WAYS = {False: "a row each", True: "shared"}
_SAME = 1e-5


@dataclass(frozen=True)
class Task:
    """A micro-batch, and how it runs."""

    case: Case
    shares: bool = False
    completions: int = 1
    frames: int = 8
    said: int = 64  # tokens of a completion
    steps: int = 3  # timed ones, after one that is not


def train(task: Task) -> dict[str, Any]:
    """In a rank: seconds, loss and peak of memory of each timed step."""
    ranks = int(os.environ["WORLD_SIZE"])
    setting = Setting("ulysses", checkpointing=True)
    config = ds_config(setting, task.case, ranks=ranks, dtype="float32")
    config["ds_lvx"]["share_prefixes"] = task.shares
    with own_device():
        model = build_model(task.case, dtype=torch.float32)
    with training(model, torch.optim.SGD, config) as engine:
        del model
        batch, steps = answered(task), []
        world = engine.ds_lvx.groups.world_channel
        for _ in range(1 + task.steps):
            memory = meter()
            memory.reset()
            before, begun = memory.now_bytes(), meet(world)
            shard = ds_lvx.shard_batch(batch, model=engine.module)
            loss = engine(**shard).loss
            engine.backward(loss)
            engine.step()
            seconds, peak = meet(world) - begun, memory.peak_bytes() - before
            steps.append({"step_s": seconds, "peak_bytes": peak})
            steps[-1] |= {"losses": float(ds_lvx.mean_loss(loss))}
    tokens = shard["input_ids"].numel()
    return {**by_column(steps[1:]), "tokens": tokens, "first_loss": steps[0]["losses"]}


def answered(task: Task) -> dict[str, Tensor]:
    """A random prompt with its completions, each a row of its own and learnt."""
    frames = range(task.frames)
    one = make_batch(task.case, frames=frames, total=task.frames, dtype=torch.float32)
    length, rows = one["input_ids"].shape[1], task.completions
    one.pop("labels", None)
    batch = {key: torch.cat([value] * rows) for key, value in one.items()}
    said = torch.randint(3, 500, (rows, task.said), generator=torch.Generator().manual_seed(0))
    batch["labels"] = torch.cat((torch.full((rows, length), -100), said), dim=1)
    for key, value in batch.items():
        if value.shape == (rows, length):
            more = {"input_ids": said, "attention_mask": torch.ones_like(said)}
            batch[key] = torch.cat((value, more.get(key, torch.zeros_like(said))), dim=1)
    return batch


def measure(task: Task, counts: tuple[int, ...], ranks: Ranks) -> dict[str, Any]:
    """For the JSON: every number of completions, both ways.

    Raises:
        RunError: a rank failed.
        ValueError: the losses of both ways differ.
    """
    records = []
    for completions in counts:
        apart = _record(replace(task, completions=completions), ranks)
        records.append(apart | {"to_apart": 1.0})
        if completions > 1:
            shared = _record(replace(task, completions=completions, shares=True), ranks)
            for one, other in zip(apart["losses"], shared["losses"], strict=True):
                if abs(one - other) > _SAME * abs(one):
                    raise ValueError(f"got losses {one} and {other}; expected the same")
            ratio = apart["step_s"]["median"] / shared["step_s"]["median"]
            records.append(shared | {"to_apart": ratio})
    settings = {key: value for key, value in asdict(task).items() if key != "completions"}
    return {
        **header(device="cpu"),
        "ranks": ranks.count,
        "measured_by": meter(ranks.device).source,
        **settings,
        "prompt_tokens": _prompt_tokens(task),
        "records": records,
    }


def _prompt_tokens(task: Task) -> int:
    return int(answered(replace(task, completions=1))["input_ids"].shape[1]) - task.said


def _record(task: Task, ranks: Ranks) -> dict[str, Any]:
    answers = on_ranks(train, task, ranks)
    step_s = spread(slowest(*(answer["step_s"] for answer in answers)))
    print(f"{task.completions} completions, {WAYS[task.shares]}: {step_s['median']:.3f} s")
    return {
        "completions": task.completions,
        "shares": task.shares,
        "step_s": step_s,
        "peak_bytes": max(max(answer["peak_bytes"]) for answer in answers),
        "tokens": [answer["tokens"] for answer in answers],
        "losses": [answers[0]["first_loss"], *answers[0]["losses"]],
        "ranks": answers,
    }


# ---- the report


def name(results: Results) -> str:
    """Of the files."""
    return "prefixes"


def text(results: Results) -> str:
    """The table."""
    case = results["case"]
    title = (
        f"A step on the completions of a prompt of {results['prompt_tokens']:,} tokens, "
        f"{results['frames']} frames among them; {results['said']} tokens a completion; "
        f"{results['ranks']} ranks, `ulysses`, {case['cross_layers']} checkpointed layers of "
        f"{case['hidden']}, float32. Median (10th to 90th percentile). "
        f"{results['hardware']['device']}."
    )
    table = columns(
        results["records"],
        {
            "completions": "{completions}",
            "their prompt": lambda r: WAYS[r["shares"]],
            "tokens that a rank runs": lambda r: f"{max(r['tokens']):,}",
            "step, s": lambda r: percentiles(r["step_s"]),
            "times as fast": lambda r: times(r["to_apart"]),
            "memory of a rank at the peak, MiB": lambda r: f"{r['peak_bytes'] / MIB:,.0f}",
        },
    )
    return f"{title}\n\n{table}"


def draw(results: Results) -> None:
    """No figure."""


def main() -> None:
    """Measure, then write JSON and table."""
    parser = usual_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    task, most = Task(case_of(512, 8, 4, 4, features="trained")), 8
    if options.quick:
        small = case_of(256, 4, 2, 1, text_tokens=32, vision_hidden=32, vision_layers=1)
        task, most = Task(small, frames=2, said=8, steps=1), 2
    counts = tuple(each for each in (1, 2, 4, 8) if each <= most)
    ranks = Ranks(options.ranks, timeout_s=900, environment=PROMPT_FREEING)
    with told("bench_prefixes"):
        results = measured("prefixes", options, lambda: measure(task, counts, ranks))
        leave("bench_prefixes", sys.modules[__name__], results, options)


if __name__ == "__main__":
    main()
