"""MOSS-VL in one process: what patching changes, and what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from ds_lvx.models import FAMILIES
from ds_lvx.models.draft import Draft
from ds_lvx.sharding import draft_batch, shard_batch
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.moss_vl_case import Batch, ds_config, hard_batch, tiny_model

LVX = ds_config(stage=0, sp_size=1, cross={"method": "lvx"}, self_attn="ring")


def patched(model: Any) -> Any:
    return patched_by(LVX, model)


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    assert_given_back(tiny_model, hard_batch(), patched)


def without(batch: Batch, key: str) -> Batch:
    return {name: value for name, value in batch.items() if name != key}


def hidden_first_frame(batch: Batch) -> Batch:
    mask = batch["cross_attention_mask"].clone()
    mask[..., 0] = True
    return {**batch, "cross_attention_mask": mask}


BAD: dict[str, Any] = {
    r"pixel_values \(10, 48\) for a grid_thw of \d+ patches": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][:10],
    },
    r"media_nums_per_sample \[1\] for 3 samples and 6 rows": lambda b: {
        **b,
        "media_nums_per_sample": [1],
    },
    r"media_nums_per_sample None": lambda b: without(b, "media_nums_per_sample"),
    r"grid_thw with the row \[3, 4, 5\]; .*multiples of 2": lambda b: {
        **b,
        "grid_thw": torch.tensor([[3, 4, 5], *b["grid_thw"].tolist()[1:]]),
    },
    r"grid_thw \(18,\)": lambda b: {**b, "grid_thw": b["grid_thw"].flatten()},
    r"got 5 image tokens in the text of sample 0 and 4 frames": lambda b: {
        **b,
        "input_ids": b["input_ids"].index_fill(1, torch.tensor([0]), 195),
    },
    r"got position_ids; expected none": lambda b: {
        **b,
        "position_ids": torch.zeros_like(b["input_ids"]),
    },
    r"token 6 of sample 0 sees frames that are not the first": hidden_first_frame,
    r"cross_attention_mask torch.float32": lambda b: {
        **b,
        "cross_attention_mask": b["cross_attention_mask"].float(),
    },
    r"got cross_attention_mask and visible_frames": lambda b: {
        **b,
        "visible_frames": torch.zeros_like(b["input_ids"]),
    },
    r"got visible_frames \(3, 2\)": lambda b: {
        **without(b, "cross_attention_mask"),
        "visible_frames": b["input_ids"][:, :2],
    },
    r"'grid_thv' in the batch; .*'grid_thw'": lambda b: {**b, "grid_thv": b["grid_thw"]},
}


def test_only_a_frozen_tower_runs_in_parts() -> None:
    model, batch = tiny_model(), {**hard_batch(), "vision_runs": 2}
    with pytest.raises(NotImplementedError, match="vision_runs 2 for a vision tower that trains"):
        shard_batch(batch, model=model)
    model.model.visual.requires_grad_(False)
    patched(model)
    sizes: list[int] = []
    model.model.visual.patch_embed.register_forward_hook(lambda *a: sizes.append(len(a[2])))
    out = model(**shard_batch(batch, model=model))
    out.loss.backward()
    assert len(sizes) == 2
    assert sum(sizes) == len(batch["pixel_values"])
    for runs in (0, "2", True):
        with pytest.raises(ValueError, match="vision_runs"):
            shard_batch({**batch, "vision_runs": runs}, model=model)


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=model)


def test_a_draft_pickles_and_holds_its_ranks_pixels_only() -> None:
    model, batch = tiny_model(), hard_batch()
    draft = pickle.loads(pickle.dumps(draft_batch(batch, model=model)))
    shard = shard_batch(draft, model=model)
    assert torch.equal(shard["pixel_values"], batch["pixel_values"])
    family = FAMILIES.named("moss_vl")
    parts = [Draft.of(family, batch, model, place=(r, 3), frames="all").content for r in range(3)]
    rows = [part.visual.arguments["pixel_values"] for part in parts if part is not None]
    assert sum(map(len, rows)) == len(batch["pixel_values"])
    assert max(map(len, rows)) < 0.5 * len(batch["pixel_values"])
