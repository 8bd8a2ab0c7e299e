"""VideoLLaMA 3: what is refused, and sizes; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

from ds_lvx.compare.case import cut, random_case
from ds_lvx.models import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared
from tests.models.video_llama_3_case import MASK, VISION, Batch, hard_batch, tiny_model

NAME = "video_llama_3"
patched = partial(patched_by, case.rules(NAME, "ring", 1))


def with_mask(batch: Batch, change: Any) -> Batch:
    mask = batch[MASK].clone()
    change(mask)
    return {**batch, MASK: mask}


BAD: dict[str, Any] = {
    r"got image_merge_sizes NoneType for 3 rows of image_grid_thw": lambda b: {
        **b,
        "image_merge_sizes": None,
    },
    r"got video_merge_sizes \[2\] for 2 rows of video_grid_thw": lambda b: {
        **b,
        "video_merge_sizes": torch.tensor([2]),
    },
    r"got \[3, 4, 4\] in video_grid_thw; .* the sides multiples of 3": lambda b: {
        **b,
        "video_merge_sizes": torch.tensor([3, 2]),
    },
    r"got video_compression_mask torch.int64 \(24,\); expected bool \(24,\)": lambda b: {
        **b,
        MASK: b[MASK].long(),
    },
    r"got video_compression_mask torch.bool \(23,\); expected bool \(24,\)": lambda b: {
        **b,
        MASK: b[MASK][1:],
    },
    r"got a video_compression_mask that keeps no token of a frame": lambda b: with_mask(
        b, lambda mask: mask[:4].fill_(False)
    ),
    r"got \d+ tokens in sample 0 for a row of video_grid_thw that makes 12": lambda b: {
        **b,
        MASK: None,
    },
    r"got pixel_values_videos \(96, 47\); expected \(patches, 48\)": lambda b: {
        **b,
        "pixel_values_videos": b["pixel_values_videos"][:, 1:],
    },
    r"got pixel_values_videos of 95 rows, and a text with places for 96": lambda b: {
        **b,
        "pixel_values_videos": b["pixel_values_videos"][1:],
    },
    r"got 'mm_token_type_ids' in the batch": lambda b: {**b, "mm_token_type_ids": b["input_ids"]},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())


def test_a_mask_that_differs_between_ranks_is_noticed() -> None:
    """Though as many tokens are kept."""

    def kinds(batch: Batch) -> dict[str, Any]:
        family, model = FAMILIES.named(NAME), tiny_model()
        text = family.text(batch, model).dealt(2)
        found: dict[str, Any] = family.visual(batch, text, model).shared_record()
        return found

    batch = hard_batch()
    place = int(batch[MASK].view(-1, 4)[1].nonzero()[0, 0])
    missing = int((~batch[MASK].view(-1, 4)[1]).nonzero()[0, 0])

    def move(mask: torch.Tensor) -> None:
        mask[4 + place], mask[4 + missing] = False, True

    assert kinds(batch) != kinds(with_mask(batch, move))


def test_another_text_is_refused() -> None:
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = VideoLlama3Config(text_config=text, vision_config=VISION)
    with pytest.raises(NotImplementedError, match=r"of class LlamaModel; expected a Qwen2Model"):
        patched(VideoLlama3ForConditionalGeneration(config))


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    given = cut(random_case(NAME), hidden=256, cross_layers=2, vision_layers=2)
    assert (given.heads, given.kv_heads, given.frame_tokens) == (2, 2, 256)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "patch_size": 2}
    given = replace(given, **sizes, image_size=64, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(given, frames=2, method="ring")
    assert layout.text_lengths == (2 * 256 + 8,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    assert (published.image_token_id, published.video_token_id) == (151_655, 151_656)
    config = family.tiny()[0]
    model = family.build(config, gate=1.0, dtype=torch.float32)
    counted = family.dimensions(config.to_dict(), "tiny", "config.json").parameters
    assert counted == sum(
        p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "patch_embed" not in n
    )
