"""Train a tiny multimodal model to read handwritten digits, its visual tokens on two ranks.

    bash launch/quickstart.sh

The ds_config chooses how: queries travel to the visual tokens (lvx) in the cross-attention layers,
with K and V recomputed in backward, DeepSpeed-Ulysses in the text layers, and ZeRO-3 under it.
Afterwards rank 0 trains transformers' own model alone, from the same weights on the same batches,
and compares the two; and every method of cross-attention says what it sends in one step.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import get_cosine_schedule_with_warmup

import ds_lvx
from digits.data import Batch, Digits, accuracy, load, prompts, training_batches
from digits.model import tiny_model
from digits.report import Run, report

FRAMES = 8  # of a sequence
ANSWER = {"max_new_tokens": 1, "do_sample": False}  # a digit
PROMPT_FRAMES = 4  # the last of which is asked for
WARM_UP_STEPS = 20
TEXT_KEYS = ("input_ids", "labels")


def main() -> None:
    """Train on all ranks, count bytes, train alone on rank 0, report."""
    options = parse_options()
    training, held_out = load()
    try:
        sharded = train_sharded(options, training, held_out)
        methods = ("lvx", "ring", "ulysses")
        bytes_sent = {
            method: cross_attention_bytes(options, training, method) for method in methods
        }
    finally:
        ds_lvx.shutdown()
    if int(os.environ["RANK"]) == 0:
        alone = train_alone(options, training, held_out)
        report(options.output_dir, sharded=sharded, alone=alone, bytes_sent=bytes_sent)


def train_sharded(options: argparse.Namespace, training: Digits, held_out: Digits) -> Run:
    """The training loop of the README, and the digits that it generates for frames never seen."""
    engine = make_engine(options, ds_config(options))
    losses, start = [], time.perf_counter()
    for batch in batches(options, training):
        out = engine(**ds_lvx.shard_batch(batch, model=engine.module))
        engine.backward(out.loss)
        engine.step()
        losses.append(ds_lvx.mean_loss(out.loss).item())
        show(losses)
    seconds = time.perf_counter() - start

    found = ds_lvx.generate(engine, prompts(held_out, frames=PROMPT_FRAMES), **ANSWER)
    ranks = engine.ds_lvx.groups.sp_size
    close(engine)
    return Run(losses, accuracy(found, held_out), seconds, ranks)


def train_alone(options: argparse.Namespace, training: Digits, held_out: Digits) -> Run:
    """The same in one process: transformers' model and PyTorch, nothing of ds_lvx or DeepSpeed."""
    device = get_accelerator().current_device_name()
    model = tiny_model(options.seed).to(device)
    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler(optimizer, steps=options.steps)
    clip = ds_config(options)["gradient_clipping"]
    losses, start = [], time.perf_counter()
    for batch in batches(options, training):
        out = model(**to_device(batch, device), use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    seconds = time.perf_counter() - start

    inputs = to_device(prompts(held_out, frames=PROMPT_FRAMES), device)
    found = model.eval().generate(**inputs, **ANSWER)
    return Run(losses, accuracy(found, held_out), seconds, 1)


def cross_attention_bytes(options: argparse.Namespace, training: Digits, method: str) -> int:
    """Bytes this rank sends for cross-attention in one step, forward and backward.

    The text layers' own attention is measured on the text alone and taken off. What ZeRO sends for
    weights and gradients is the same for every method and not counted. Under ZeRO-3 text alone goes
    through the cross-attention, too, so that it is left out here.
    """
    config = {**ds_config(options), "zero_optimization": {"stage": 2}}
    for rule in config["ds_lvx"]["layers"]:
        if rule["match"].endswith("cross_attn"):
            rule.update(method=method, recompute_kv=method == "lvx")
    batch = next(batches(options, training))
    text = {key: batch[key] for key in TEXT_KEYS}
    with contextlib.redirect_stdout(io.StringIO()):  # the table of layers was shown once
        engine = make_engine(options, config)
    sent = [attention_bytes(engine, part) for part in (batch, text)]
    close(engine)
    return sent[0] - sent[1]


def attention_bytes(engine: Any, batch: Batch) -> int:
    """Bytes this rank sends for attention in a forward and a backward pass."""
    with ds_lvx.traffic() as traffic:
        out = engine(**ds_lvx.shard_batch(batch, model=engine.module))
        engine.backward(out.loss)
    return traffic.bytes_sent


def make_engine(options: argparse.Namespace, config: dict[str, Any]) -> Any:
    """A fresh model under DeepSpeed; the same weights every time."""
    model = tiny_model(options.seed)
    engine, _, _, _ = ds_lvx.initialize(
        model=model,
        optimizer=make_optimizer(model.parameters()),
        lr_scheduler=functools.partial(make_scheduler, steps=options.steps),
        config=config,
    )
    return engine


def close(engine: Any) -> None:
    """End an engine, so that the next one can start in this process."""
    engine.ds_lvx.close()
    engine.destroy()


def make_optimizer(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=4e-3, eps=1e-6)


def make_scheduler(
    optimizer: torch.optim.Optimizer, *, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then a cosine down to 0, which also keeps the rounding of two runs from growing."""
    return get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, steps)


def batches(options: argparse.Namespace, training: Digits) -> Iterator[Batch]:
    """The batches of a run: the same for both runs, and on every rank."""
    size = ds_config(options)["train_micro_batch_size_per_gpu"]
    return training_batches(
        training, steps=options.steps, batch_size=size, frames=FRAMES, seed=options.seed
    )


def to_device(batch: Batch, device: str) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def ds_config(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(options.deepspeed_config.read_text())


def show(losses: list[float]) -> None:
    """A line of progress on rank 0, now and then."""
    step = len(losses)
    if int(os.environ["RANK"]) == 0 and (step == 1 or step % 50 == 0):
        print(f"step {step:4d}   loss {losses[-1]:.4f}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/quickstart.json"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=170)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
