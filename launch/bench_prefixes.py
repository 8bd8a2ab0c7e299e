"""Measure training on completions of a video's prompt: each a row, and with a shared prefix.

    python launch/bench_prefixes.py --document docs/shared-prefixes.md
    python launch/bench_prefixes.py --quick --output_dir /tmp/prefixes            small, to try it
    python launch/bench_prefixes.py --render --document docs/shared-prefixes.md   only from the JSON

A micro-batch of GRPO: all completions of a prompt, of a model whose images stand among the text and
of one whose images stand beside it. The same random model, batch and steps either way, whose losses
are compared. Every way runs twice, in turn, in fresh ranks. Some fifteen minutes on two cores that
do nothing else. Writes prefixes.json into --output_dir and a table into --document.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ds_lvx
from bench.peak import PROMPT_FREEING, meter
from bench.script import leave, measured, told, usual_parser
from bench_concatenated import case_of
from ds_lvx.compare.case import (
    Case,
    build_model,
    ds_config,
    make_batch,
    random_case,
    random_models,
)
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
    method: str
    shares: bool = False
    completions: int = 1
    frames: int = 8
    said: int = 64  # tokens of a completion
    steps: int = 2  # timed ones, after one that is not


def train(task: Task) -> dict[str, Any]:
    """In a rank: seconds, loss and peak of memory of each timed step."""
    ranks = int(os.environ["WORLD_SIZE"])
    setting = Setting(task.method, checkpointing=True)
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
        elif value.shape[:2] == (rows, length):  # images that a token sees, if they are beside it
            batch[key] = torch.cat((value, *[value[:, -1:]] * task.said), dim=1)
    return batch


def measure(tasks: Sequence[Task], counts: tuple[int, ...], ranks: Ranks) -> dict[str, Any]:
    """For the JSON: of every model every number of completions, both ways.

    Raises:
        RunError: a rank failed.
        ValueError: the losses of both ways differ.
    """
    return {
        **header(device="cpu"),
        "ranks": ranks.count,
        "measured_by": meter(ranks.device).source,
        "models": [_of_model(task, counts, ranks) for task in tasks],
    }


def _of_model(task: Task, counts: tuple[int, ...], ranks: Ranks) -> dict[str, Any]:
    records = []
    for completions in counts:
        apart = replace(task, completions=completions)
        if completions == 1:
            records.append(_record(apart, [_answers(apart, ranks)]) | {"to_apart": 1.0})
            continue
        shared = replace(apart, shares=True)
        # In turn, there and back: a machine does not keep its speed.
        turns = [_answers(each, ranks) for each in (apart, shared, shared, apart)]
        one, other = _record(apart, turns[::3]), _record(shared, turns[1:3])
        for losses in zip(one["losses"], other["losses"], strict=True):
            if abs(losses[0] - losses[1]) > _SAME * abs(losses[0]):
                raise ValueError(f"got losses {losses[0]} and {losses[1]}; expected the same")
        ratio = one["step_s"]["median"] / other["step_s"]["median"]
        records += [one | {"to_apart": 1.0}, other | {"to_apart": ratio}]
    settings = {key: value for key, value in asdict(task).items() if key != "completions"}
    settings["model_type"] = task.case.contract().model_type
    return {**settings, "prompt_tokens": _prompt_tokens(task), "records": records}


def _prompt_tokens(task: Task) -> int:
    return int(answered(replace(task, completions=1))["input_ids"].shape[1]) - task.said


def _answers(task: Task, ranks: Ranks) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = on_ranks(train, task, ranks)
    seconds = spread(slowest(*(answer["step_s"] for answer in answers)))["median"]
    what = f"{task.case.contract().model_type}, {task.completions} completions"
    print(f"{what}, {WAYS[task.shares]}: {seconds:.3f} s", flush=True)
    return answers


def _record(task: Task, runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Of what the ranks of each run answered."""
    steps = [slowest(*(answer["step_s"] for answer in answers)) for answers in runs]
    every = [answer for answers in runs for answer in answers]
    return {
        "completions": task.completions,
        "shares": task.shares,
        "step_s": spread([seconds for run in steps for seconds in run]),
        "peak_bytes": max(max(answer["peak_bytes"]) for answer in every),
        "tokens": [answer["tokens"] for answer in runs[0]],
        "losses": [runs[0][0]["first_loss"], *runs[0][0]["losses"]],
        "runs": runs,
    }


# ---- the report


def name(results: Results) -> str:
    """Of the files."""
    return "prefixes"


def text(results: Results) -> str:
    """A table for each model."""
    return "\n\n".join(_of(model, results) for model in results["models"])


def _of(model: Results, results: Results) -> str:
    case = model["case"]
    where = "among" if case["self_layers"] == 0 else "beside"
    title = (
        f"`{model['model_type']}`: a step on the completions of a prompt of "
        f"{model['prompt_tokens']:,} tokens with {model['frames']} frames {where} them; "
        f"{model['said']} tokens a completion; "
        f"{results['ranks']} ranks, `{model['method']}`, "
        f"{case['cross_layers'] + case['self_layers']} checkpointed layers of "
        f"{case['hidden']}, float32. Median (10th to 90th percentile). "
        f"{results['hardware']['device']}."
    )
    table = columns(
        model["records"],
        {
            "completions": "{completions}",
            "their prompt": lambda r: WAYS[r["shares"]],
            "text that a rank runs, tokens": lambda r: f"{max(r['tokens']):,}",
            "step, s": lambda r: percentiles(r["step_s"]),
            "times as fast": lambda r: times(r["to_apart"]),
            "memory of a rank at the peak, MiB": lambda r: f"{r['peak_bytes'] / MIB:,.0f}",
        },
    )
    return f"{title}\n\n{table}"


def draw(results: Results) -> None:
    """No figure."""


def beside() -> Case:
    """A model whose images stand beside the text, of a size as `case_of` makes them."""
    names = random_models()
    found = next(each for each in map(random_case, names) if each.contract().features_key)
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "cross_layers": 2, "self_layers": 2}
    tower = {"vision_hidden": 256, "vision_heads": 4, "vision_mlp": 512, "vision_layers": 2}
    own = {"mlp": 1365, "vocabulary": 512, "text_tokens": 256, "image_size": 16, "patch_size": 1}
    own |= {"head_dim": 0, "tiles": 1, "features": "trained"}
    return replace(found, **{**sizes, **tower, **own})


def main() -> None:
    """Measure, then write JSON and table."""
    parser = usual_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    models = [(case_of(512, 8, 4, 4, features="trained"), "ulysses"), (beside(), "lvx")]
    frames, said, steps, most = 8, 64, 2, 8
    if options.quick:
        tower = {"vision_hidden": 32, "vision_layers": 1}
        small = replace(beside(), hidden=256, heads=4, kv_heads=2, text_tokens=32, **tower)
        models = [(case_of(256, 4, 2, 1, text_tokens=32, **tower), "ulysses"), (small, "lvx")]
        frames, said, steps, most = 2, 8, 1, 2
    tasks = [Task(case, method, frames=frames, said=said, steps=steps) for case, method in models]
    counts = tuple(each for each in (1, 2, 4, 8) if each <= most)
    ranks = Ranks(options.ranks, timeout_s=900, environment=PROMPT_FREEING)
    with told("bench_prefixes"):
        results = measured("prefixes", options, lambda: measure(tasks, counts, ranks))
        leave("bench_prefixes", sys.modules[__name__], results, options)


if __name__ == "__main__":
    main()
