"""Qwen2.5-VL in one process: what patching changes, and what is refused."""

from __future__ import annotations

import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ds_lvx import gather_sequence
from ds_lvx.models.qwen2_5_vl import tower
from ds_lvx.sharding import draft_batch, owned, shard_batch
from tests.models.alone_case import patched_by
from tests.models.concatenated_case import rules
from tests.models.qwen2_5_vl_case import IMAGE, Batch, hard_batch, text_only, tiny_model


def patched(model: Any, method: str = "ring") -> Any:
    config = rules("qwen2_5_vl", method, 1)
    return patched_by(config, model)


def test_sliding_windows_are_refused_by_name() -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    words = r'layer 1 is of type "sliding_attention"; .*use_sliding_window to false'
    with pytest.raises(NotImplementedError, match=words):
        patched(model)


def test_linear_attention_is_refused_by_name() -> None:
    model = tiny_model()
    model.config.text_config.layer_types = ["full_attention", "full_attention", "linear_attention"]
    words = r'layer 2 is of type "linear_attention"; .*whose text attends to all of it'
    with pytest.raises(NotImplementedError, match=words):
        patched(model)


def test_positions_that_the_model_makes_may_be_given() -> None:
    model, batch = tiny_model(), hard_batch()
    given = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw", "attention_mask")}
    own = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        second_per_grid_ts=batch["second_per_grid_ts"],
        **given,
    )[0]
    alone = shard_batch({**batch, "mm_token_type_ids": None}, model=model)
    told = shard_batch({**batch, "position_ids": own}, model=model)
    assert torch.equal(alone["position_ids"], told["position_ids"])


def test_padding_whose_next_token_is_learnt_stays() -> None:
    """Its loss counts in one process, too."""
    batch = text_only()
    batch["labels"][1] = 5
    shard = shard_batch(batch, model=tiny_model())
    assert int((shard["shift_labels"] != -100).sum()) == shard["num_items_in_batch"] == 22


def test_owned_asks_the_model() -> None:
    assert owned(3, model=tiny_model()) == [0, 1, 2]
    assert owned([4, 0, 9]) == range(3)


def test_a_draft_pickles_without_the_whole_batch() -> None:
    draft = draft_batch(hard_batch(), model=tiny_model())
    arguments = pickle.loads(pickle.dumps(draft)).checked().visual.arguments
    assert set(arguments) == {
        *("pixel_values", "image_grid_thw"),
        # What follows from the grid: as much as its patches, or windows.
        *(
            "tower_position_ids",
            "tower_window_index",
            "tower_cu_seqlens",
            "tower_cu_window_seqlens",
        ),
    }


def test_a_flash_tower_is_told_how_long_its_parts_are() -> None:
    """Its kernel would ask the device."""
    vision = SimpleNamespace(_attn_implementation="flash_attention_2")
    heard = Mock(config=vision, dtype=torch.float32)
    made = tower.arguments(
        [[2, 4, 6], [1, 2, 2]], partial(tower.windows, merge=2, window=16, patch=4)
    )
    tower.run(heard, {"pixel_values": torch.zeros(52, 1), **made})
    told = heard.call_args.kwargs
    assert told["cu_seqlens"].tolist() == [0, 24, 48, 52]
    assert told["cu_window_seqlens"].tolist() == [0, 16, 24, 40, 48, 52]
    assert (told["max_seqlen"], told["max_window_seqlen"]) == (24, 16)


def changed(batch: Batch, **entries: Any) -> Batch:
    return {**batch, **entries}


def without_first_image(batch: Batch) -> Batch:
    """Its tokens are there no more."""
    ids = batch["input_ids"].clone()
    ids[0, ids[0] == IMAGE] = 5
    return {**batch, "input_ids": ids, "mm_token_type_ids": None}


BAD: dict[str, Any] = {
    r"image_grid_thw with 3 more rows than there are images": without_first_image,
    r"got 6 tokens in sample 0 for a row of image_grid_thw that makes 9": lambda b: changed(
        b, image_grid_thw=torch.tensor([[1, 6, 6], [1, 2, 2], [1, 6, 4]])
    ),
    r"tokens of an image or a video in sample 0 without a row of video_grid_thw": lambda b: changed(
        b, video_grid_thw=None
    ),
    r"\[1, 3, 4\] in image_grid_thw; expected .* multiples of 2": lambda b: changed(
        b, image_grid_thw=torch.tensor([[1, 3, 4]])
    ),
    r"image_grid_thw \(3,\); expected a tensor \[images or videos, 3\]": lambda b: changed(
        b, image_grid_thw=torch.tensor([1, 3, 4])
    ),
    r"pixel_values of 51 rows, and a text with places for 52; .*frames=\"local\"": lambda b: (
        changed(b, pixel_values=b["pixel_values"][:51])
    ),
    r"pixel_values_videos of 0 rows, and a text with places for": lambda b: changed(
        b, pixel_values_videos=None
    ),
    r"pixel_values of type list; expected a tensor": lambda b: changed(b, pixel_values=[1]),
    r"position_ids \(3, \d+\) that are not the model's own": lambda b: changed(
        b, position_ids=torch.arange(b["input_ids"].shape[1]).expand(3, -1)
    ),
    r"mm_token_type_ids that are not those of input_ids": lambda b: changed(
        b, mm_token_type_ids=torch.zeros_like(b["input_ids"])
    ),
    r"attention_mask that hides token \d+ of sample 0, of an image or a video": lambda b: changed(
        b, attention_mask=b["attention_mask"] * (b["mm_token_type_ids"] != 2)
    ),
    r"second_per_grid_ts of 1 numbers for 2 videos": lambda b: changed(b, second_per_grid_ts=[1.0]),
    r"input_ids \(3, 0\); expected at least one sample": lambda _: {
        "input_ids": torch.zeros(3, 0).long()
    },
    r"attention_mask \(3, 5\); expected the shape of input_ids": lambda b: changed(
        b, attention_mask=b["attention_mask"][:, :5]
    ),
    r"'pixel_value' in the batch; .*'pixel_values'": lambda b: changed(b, pixel_value=0),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())


def test_positions_of_a_text_alone_have_its_shape() -> None:
    words = r"position_ids \(4, 2, 12\); expected \(3, 2, 12\) or \(2, 12\)"
    batch = changed(text_only(), position_ids=torch.zeros(4, 2, 12).long())
    with pytest.raises(ValueError, match=words):
        shard_batch(batch, model=tiny_model())


def test_packed_samples_are_refused() -> None:
    batch = changed(text_only(), position_ids=torch.arange(6).repeat(2)[None], attention_mask=None)
    with pytest.raises(NotImplementedError, match="position_ids that start anew within a row"):
        shard_batch(batch, model=tiny_model())


def test_what_is_put_in_order_is_of_every_token() -> None:
    model, batch = tiny_model(), hard_batch()
    shard = shard_batch(batch, model=model)
    logits = torch.zeros(*shard["input_ids"].shape, 2)
    assert gather_sequence(logits, shard=shard).shape[:2] == batch["input_ids"].shape
    for wrong in (logits[:, 1:], logits[:1], logits[:, :0]):
        with pytest.raises(ValueError, match=r"for a shard of \[3, \d+\] tokens"):
            gather_sequence(wrong, shard=shard)
