"""Qwen3-VL with frames that are on their ranks already; more is in test_concatenated.py."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import torch

from ds_lvx import owned
from tests.models import concatenated_case as case
from tests.models.mllama_case import assert_same_training, plain_step, reference_steps
from tests.models.qwen3_vl_case import IMAGE, MERGE, VIDEO, hard_batch, tiny_model
from tests.ranks import run_ranks

NAME = "qwen3_vl"
rules = partial(case.rules, NAME)


def local_units(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's images and temporal patches, by `ds_lvx.owned`: sample by sample."""
    model, sizes = tiny_model(), units_of(batch)
    mine = [owned([tokens for _, _, tokens in each], model=model) for each in sizes]
    rows: dict[str, list[Any]] = {"pixel_values": [], "pixel_values_videos": []}
    starts = dict.fromkeys(rows, 0)
    for each, held in zip(sizes, mine, strict=True):
        for number, (key, count, _) in enumerate(each):
            if number in held:
                rows[key].append(batch[key][starts[key] : starts[key] + count])
            starts[key] += count
    return {**batch, **{key: torch.cat(part) if part else None for key, part in rows.items()}}


def units_of(batch: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    """Of each sample its units: where the pixels are, their rows, and their tokens."""
    keys = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}
    found = []
    for row in batch["input_ids"].tolist():
        runs = [(token, len(list(run))) for token, run in groupby(row) if token in keys]
        found.append([(keys[token], count * MERGE**2, count) for token, count in runs])
    return found


def step_local() -> dict[str, Any]:
    batch = local_units(hard_batch(5))
    return plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())


def test_frames_that_are_on_their_ranks_already() -> None:
    alone = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2), alone, sp_size=2)
