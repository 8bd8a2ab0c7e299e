"""GLM-4.1V: GLM-4.6V's classes, what is refused, and sizes; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import Glm46VConfig, Glm46VForConditionalGeneration

from ds_lvx.compare.case import cut, random_case
from ds_lvx.models import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared
from tests.models.glm4v_case import (
    BATCHES,
    IDS,
    TEXT,
    VIDEO,
    VIDEO_START,
    VISION,
    Batch,
    for_one_process,
    hard_batch,
    left_padded,
    mixed,
    tiny_46,
    tiny_model,
)

NAME = "glm4v"


@pytest.mark.exhaustive
def test_the_classes_of_4_6_equal_one_process() -> None:
    assert FAMILIES.named("glm46v").patterns == FAMILIES.named(NAME).patterns
    alone = case.references(BATCHES, tiny_46, for_one_process)
    case.check_each("glm46v", tiny_46, BATCHES, alone, ranks=2, offset=0)
    two = [[hard_batch(0)], [left_padded(1)]]
    jobs = [(case.rules("glm46v", "ring", 3, stage), tiny_46) for stage in (0, 3)]
    case.check(jobs, ranks=3, batches=two, sp_size=3)


# ---- in one process


def patched(model: Any, name: str = NAME) -> Any:
    return patched_by(case.rules(name, "ring", 1), model)


def test_positions_that_the_model_makes_may_be_given() -> None:
    model, batch = tiny_model(), left_padded()
    own = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        video_grid_thw=batch["video_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]
    alone = shard_batch({**batch, "mm_token_type_ids": None}, model=model)
    told = shard_batch({**batch, "position_ids": own}, model=model)
    assert torch.equal(alone["position_ids"], told["position_ids"])


def without(token: int, batch: Batch) -> Batch:
    """A word in the place of a token."""
    ids = batch["input_ids"]
    return {**batch, "input_ids": ids.masked_fill(ids == token, 5), "mm_token_type_ids": None}


BAD: dict[str, Any] = {
    # A video whose begin is lost; one at the token that stands for none.
    r"got 9 images in input_ids, .* image_grid_thw of 4": partial(without, VIDEO_START),
    r"got 0 frames of videos .* in input_ids, .* video_grid_thw of 5": lambda b: {
        **b,
        "input_ids": b["input_ids"].masked_fill(b["mm_token_type_ids"] == 2, VIDEO),
        "mm_token_type_ids": None,
    },
    r"got 6 tokens .* for an image or a frame of image_grid_thw that makes 9": lambda b: {
        **b,
        "image_grid_thw": torch.tensor([[1, 6, 6], [1, 2, 2], [1, 6, 4], [1, 4, 4]]),
    },
    r"got \[2, 4, 6\] in image_grid_thw; expected 1 frame of an image": lambda b: {
        **b,
        "image_grid_thw": torch.tensor([[2, 4, 6], [1, 2, 2], [1, 6, 4], [1, 4, 4]]),
    },
    r"got 5 frames of videos .* video_grid_thw of 0": lambda b: {**b, "video_grid_thw": None},
    r"pixel_values_videos of 0 rows, and a text with places for": lambda b: {
        **b,
        "pixel_values_videos": None,
    },
    r"position_ids \(3, \d+\) that are not the model's own": lambda b: {
        **b,
        "position_ids": torch.arange(b["input_ids"].shape[1]).expand(3, -1),
    },
    r"mm_token_type_ids that are not those of input_ids": lambda b: {
        **b,
        "mm_token_type_ids": b["mm_token_type_ids"].clamp(max=1),
    },
    r"got 'second_per_grid_ts' in the batch": lambda b: {**b, "second_per_grid_ts": [1.0]},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](mixed()), model=tiny_model())


def test_another_text_is_refused() -> None:
    text = {**TEXT, "model_type": "qwen2", "rope_parameters": None}
    config = Glm46VConfig(text_config=text, vision_config=VISION, **IDS)
    words = r"text is a Qwen2Model; expected a Glm4vTextModel or a Glm4vMoeTextModel"
    with pytest.raises(NotImplementedError, match=words):
        patched(Glm46VForConditionalGeneration(config), "glm46v")


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    given = cut(random_case(NAME), hidden=256, cross_layers=2, vision_layers=2)
    assert (given.heads, given.kv_heads, given.frame_tokens) == (2, 2, 144)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 16}
    given = replace(given, **sizes, patch_size=2, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(given, frames=2, method="ring")
    assert layout.text_lengths == (2 * (16 + 2) + 2 + 8,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    text, ids = published.text_config, (published.image_token_id, published.video_start_token_id)
    assert text.rope_parameters["mrope_section"] == [8, 12, 12]
    assert ids == (151_343, 151_341)
    with pytest.raises(ValueError, match=r"heads of 8 in a text of width 64 with 4 .* expected 16"):
        family.config(replace(family.size(published), hidden=64, heads=4, head_dim=8))
    config = family.tiny()[0]
    model = family.build(config, gate=1.0, dtype=torch.float32)
    counted = family.dimensions(config.to_dict(), "tiny", "config.json").parameters
    tables = ("visual.embeddings.", "visual.patch_embed.")
    assert counted == sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim > 1 and not any(part in name for part in tables)
    )
