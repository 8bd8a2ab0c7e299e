"""BLIP-2 and its like in one process: what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.sharding import shard_batch
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.blip_case import (
    ds_config,
    hard_batch,
    instructed,
    opt,
    t5,
    tiny_model,
    videos,
)

BATCHES = {"blip-2": hard_batch, "instructblip": instructed, "instructblipvideo": videos}


def patched(model: Any) -> Any:
    config = ds_config(stage=0, sp_size=1, self_attn="ring")
    return patched_by(config, model)


@pytest.mark.parametrize("kind", BATCHES)
def test_a_patched_model_is_its_own_self_and_can_be_given_back(kind: str) -> None:
    assert_given_back(lambda: tiny_model(kind), BATCHES[kind](), patched)


def test_text_models_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"layerdrop 0.1"):
        patched(tiny_model(text=opt(layerdrop=0.1)))


def test_answers_of_other_samples_are_refused() -> None:
    batch = {**hard_batch(), "labels": torch.zeros(2, 5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"labels \(2, 5\); expected \(3, tokens\)"):
        shard_batch(batch, model=tiny_model(text=t5()))


BAD: dict[str, tuple[str, Any]] = {
    r"pixel_values \(4, 3, 14, 14\); expected \(images, 3, 28, 28\)": (
        "blip-2",
        lambda b: {**b, "pixel_values": b["pixel_values"][..., :14, :14]},
    ),
    r"pixel_values of 3 images, of 4 in 3 samples": (
        "blip-2",
        lambda b: {**b, "pixel_values": b["pixel_values"][1:]},
    ),
    r"of \[2, 2, 0\] images by sample, and a text with places for \[1, 3, 0\]": (
        "blip-2",
        lambda b: {**b, "images_per_sample": torch.tensor([2, 2, 0])},
    ),
    r"2 image tokens in sample 0; expected a multiple of 3": (
        "blip-2",
        lambda b: {**b, "input_ids": b["input_ids"].index_fill(1, torch.tensor([0]), 5)},
    ),
    r"position_ids that start anew within a row": (
        "blip-2",
        lambda b: {**b, "attention_mask": None, "position_ids": torch.arange(17)[None] % 5},
    ),
    r"qformer_input_ids NoneType; expected \(images, tokens\), 4 rows": (
        "instructblip",
        lambda b: {**b, "qformer_input_ids": None},
    ),
    r"qformer_attention_mask \(2, 4\); expected \(images, tokens\), 4 rows": (
        "instructblip",
        lambda b: {**b, "qformer_attention_mask": b["qformer_attention_mask"][:2]},
    ),
    r"of \[2, 2\] images by sample, and a text with places for \[3, 3\]": (
        "instructblipvideo",
        lambda b: {**b, "pixel_values": b["pixel_values"][:, :2]},
    ),
    r"'pixel_value' in the batch; .*'pixel_values'": ("blip-2", lambda b: {**b, "pixel_value": 0}),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    kind, change = BAD[words]
    with pytest.raises((ValueError, NotImplementedError), match=words):
        shard_batch(change(BATCHES[kind]()), model=tiny_model(kind))
