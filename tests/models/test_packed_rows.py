"""MOSS-VL's samples that share a row of text, and an MPT's, train as those of a row each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.models.text import IGNORED_LABEL
from ds_lvx.sharding import shard_batch
from tests.models import moss_vl_case, openflamingo_case
from tests.models.mllama_case import assert_same_training, plain_step, reference_steps
from tests.ranks import run_ranks

Batch = dict[str, Any]
CROSS = {"method": "lvx", "recompute_kv": True}


def in_a_row(batch: Batch) -> Batch:
    """The text of a batch in one row, without its padding."""
    kept = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED_LABEL
    return {
        "input_ids": batch["input_ids"][kept][None],
        "labels": labels[kept][None],
        "position_ids": torch.cat([torch.arange(int(row.sum())) for row in kept])[None],
    }


def moss_vl(seed: int = 0) -> tuple[Batch, Batch]:
    """Media of unequal size, text before them, and a sample without any."""
    first: moss_vl_case.Sample = [3, (3, 4, 6), 2, (1, 2, 2), 4]
    batch = moss_vl_case.make_batch([first, [9], [(1, 4, 2), 2, (2, 2, 4), 3]], seed=seed)
    media = {key: batch[key] for key in ("pixel_values", "grid_thw")}
    numbers = [sum(batch["media_nums_per_sample"])]
    return batch, {**in_a_row(batch), **media, "media_nums_per_sample": numbers}


def flamingo() -> tuple[Batch, Batch]:
    """Text before the first image, and a sample without any."""
    batch = openflamingo_case.make_batch(["...ii....i...", "......", ".i......."])
    pixels = batch["vision_x"]
    return batch, {**in_a_row(batch), "vision_x": torch.cat((pixels[0], pixels[2, :1]))[None]}


def steps(ranks: int, self_attn: str) -> list[dict[str, Any]]:
    given = {"stage": 0, "sp_size": ranks, "cross": CROSS, "self_attn": self_attn}
    return [
        plain_step(moss_vl_case.ds_config(**given), moss_vl()[1], model=moss_vl_case.tiny_model()),
        plain_step(
            openflamingo_case.ds_config(**given),
            flamingo()[1],
            model=openflamingo_case.tiny_model("mpt"),
        ),
    ]


@pytest.mark.parametrize("self_attn", ["ring", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_packed_samples_train_as_padded_ones_do(self_attn: str) -> None:
    results = run_ranks(steps, 2, 2, self_attn)
    models = moss_vl_case.tiny_model(), openflamingo_case.tiny_model("mpt")
    for place, ((batch, _), model) in enumerate(zip((moss_vl(), flamingo()), models, strict=True)):
        expected = {**reference_steps([[batch]], model), "logits": []}
        found = [rank[place] for rank in results]
        for result in found:  # of what is frozen there is none
            result["grads"] = {name: result["grads"][name] for name in expected["grads"]}
        del expected["weights"]
        assert_same_training(found, expected, sp_size=2)


def test_what_of_a_row_cannot_be_told_apart() -> None:
    padded, row = moss_vl()
    model = moss_vl_case.tiny_model()
    for wrong, message in (
        ({**row, "grid_thw": row["grid_thw"] + torch.tensor([1, 0, 0])}, "for a grid_thw of"),
        ({**row, "visible_frames": row["position_ids"]}, "visible_frames for samples that share"),
        ({**row, "position_ids": row["position_ids"] * 2}, "position_ids; expected none"),
        ({**padded, "position_ids": torch.arange(16)[None]}, "position_ids; expected none"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_batch(wrong, model=model)
    more = {"grid_thw": torch.cat((row["grid_thw"], torch.tensor([[1, 2, 2]])))}
    more["pixel_values"] = torch.cat((row["pixel_values"], torch.zeros(4, moss_vl_case.PATCH)))
    more["media_nums_per_sample"] = [len(more["grid_thw"])]
    with pytest.raises(ValueError, match=r"7 image tokens in row 0, which several .* 8 frames"):
        shard_batch({**row, **more}, model=model)
    with pytest.raises(NotImplementedError, match="text sees all images before it"):
        shard_batch(flamingo()[1], model=openflamingo_case.all_before())
