"""Qwen3-VL in one process: what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.sharding import shard_batch
from tests.models.alone_case import patched_by
from tests.models.concatenated_case import rules
from tests.models.qwen2_5_vl_case import WIDTH
from tests.models.qwen3_vl_case import IMAGE, VIDEO, Batch, hard_batch, tiny_model


def patched(model: Any, method: str = "ring") -> Any:
    config = rules("qwen3_vl", method, 1)
    return patched_by(config, model)


def test_positions_that_the_model_makes_may_be_given() -> None:
    model, batch = tiny_model(), hard_batch()
    given = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw", "attention_mask")}
    own = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        **given,
    )[0]
    alone = shard_batch({**batch, "mm_token_type_ids": None}, model=model)
    told = shard_batch({**batch, "position_ids": own}, model=model)
    assert torch.equal(alone["position_ids"], told["position_ids"])


def changed(batch: Batch, **entries: Any) -> Batch:
    return {**batch, **entries}


def without_first_image(batch: Batch) -> Batch:
    """Its tokens are there no more."""
    ids = batch["input_ids"].clone()
    ids[0, ids[0] == IMAGE] = 5
    return {**batch, "input_ids": ids, "mm_token_type_ids": None}


def without_a_time(batch: Batch) -> Batch:
    """Two frames of a video are one run, with as many tokens as both."""
    ids = batch["input_ids"].clone()
    between = (ids[2, :-1] == VIDEO).logical_and(ids[2, 1:] != VIDEO).nonzero()[0, 0] + 1
    kept = [n for n in range(ids.shape[1]) if n not in range(between, between + 3)]
    cut = {key: batch[key][:, kept] for key in ("input_ids", "attention_mask", "labels")}
    return {**batch, **cut, "mm_token_type_ids": None}


BAD: dict[str, Any] = {
    r"got 3 images in input_ids, .* image_grid_thw of 4": lambda b: changed(
        b, image_grid_thw=torch.tensor([[1, 4, 6], [1, 2, 2], [1, 6, 4], [1, 2, 2]])
    ),
    r"got 0 images in input_ids, .* image_grid_thw of 3": without_first_image,
    r"got 4 frames of videos .* in input_ids, .* video_grid_thw of 5": without_a_time,
    r"got 6 tokens .* in sample 0 for an image or a frame of image_grid_thw that makes 9": (
        lambda b: changed(b, image_grid_thw=torch.tensor([[1, 6, 6], [1, 2, 2], [1, 6, 4]]))
    ),
    r"got 5 frames of videos .* video_grid_thw of 0": lambda b: changed(b, video_grid_thw=None),
    r"pixel_values_videos of 0 rows, and a text with places for": lambda b: changed(
        b, pixel_values_videos=None
    ),
    r"position_ids \(3, \d+\) that are not the model's own": lambda b: changed(
        b, position_ids=torch.arange(b["input_ids"].shape[1]).expand(3, -1)
    ),
    r"mm_token_type_ids that are not those of input_ids": lambda b: changed(
        b, mm_token_type_ids=torch.zeros_like(b["input_ids"])
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())


def test_every_row_of_a_grid_gives_the_features_that_it_gives_alone() -> None:
    """Else frames of one rank were not those of the whole video."""
    tower, generator = tiny_model().model.visual, torch.Generator().manual_seed(0)
    pixels = torch.randn(3 * 24, WIDTH, generator=generator)
    whole = tower(pixels, torch.tensor([[3, 6, 4]]))
    apart = [tower(part, torch.tensor([[1, 6, 4]])) for part in pixels.split(24)]
    for n in range(2):
        deep = torch.cat([each.deepstack_features[n] for each in apart])
        torch.testing.assert_close(deep, whole.deepstack_features[n])
