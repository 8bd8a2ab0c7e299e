"""Samples that share a row train as those that have a row each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.models.text import IGNORED_LABEL
from tests.models.mllama_case import assert_same_training, sharded_steps
from tests.models.mplugowl3_case import ds_config, hard_batch, tiny_model
from tests.ranks import run_ranks


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The samples of a batch in one row, without their padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED_LABEL
    start, offsets = 0, []
    for length, each in zip(lengths, batch["media_offset"], strict=True):
        offsets.append(each + start)
        start += length

    def row(key: torch.Tensor) -> torch.Tensor:
        return torch.cat([each[:n] for each, n in zip(key, lengths, strict=True)])[None]

    return {
        "input_ids": row(batch["input_ids"]),
        "labels": row(labels),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "pixel_values": batch["pixel_values"],
        "media_offset": [torch.cat(offsets)],
    }


def train(config: dict[str, Any], batches: list[dict[str, Any]], gated: bool) -> dict[str, Any]:
    model = tiny_model(gated=gated)
    return {**sharded_steps(config, [[each] for each in batches], model=model), "logits": []}


@pytest.mark.slow
@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_packed_samples_train_as_padded_ones_do(*, gated: bool) -> None:
    batches = [hard_batch(0), hard_batch(1)]
    assert bool((batches[0]["attention_mask"] == 0).any())
    cross = {"method": "lvx", "recompute_kv": True}
    configs = [
        ds_config(stage=0, sp_size=n, cross=cross, self_attn="lvx" if n == 1 else "ring")
        for n in (1, 2)
    ]
    (reference,) = run_ranks(train, 1, configs[0], batches, gated)
    reference["losses"] = [[loss] for loss in reference["losses"]]
    results = run_ranks(train, 2, configs[1], [packed(each) for each in batches], gated)
    assert_same_training(results, reference, sp_size=2)
