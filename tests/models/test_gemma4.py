"""Gemma 4: experts, checkpoints, and what is refused; more is in test_concatenated.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.alone_case import patched_by
from tests.models.gemma4_case import (
    FULL,
    IMAGE,
    SLIDING,
    hard_batch,
    larger_model,
    left_padded,
    moe_model,
    tiny_model,
    with_audio_tower,
)

MODELS = {each.__name__: each for each in (tiny_model, larger_model, moe_model)}
NAME = "gemma4"


@pytest.mark.slow
def test_experts_and_a_tower_for_sounds_train_at_any_stage() -> None:
    """The larger models, with experts, and one with a tower that no batch asks for."""
    jobs = [
        (case.rules(NAME, "ulysses", 2, 3), moe_model),
        (case.section(case.rules(NAME, "lvx", 2, 2)), moe_model),
        (case.rules(NAME, "ring", 2, 3), with_audio_tower),
        (case.rules(NAME, "ring", 2, 2), with_audio_tower),
    ]
    case.check(jobs, ranks=2, batches=[[hard_batch(0)], [left_padded(1)]], sp_size=2)


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    text = published.text_config
    assert text.layer_types[4:7] == [SLIDING, FULL, SLIDING]
    assert (text.per_layer_config[5].head_dim, text.per_layer_config[0].head_dim) == (512, 256)
    assert family.frame_tokens(published) == 256
    with pytest.raises(NotImplementedError, match="hidden_size_per_layer_input is not that of"):
        family.size(tiny_model().config)


# ---- in one process


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"text_config": {"use_bidirectional_attention": "all"}},
            'use_bidirectional_attention "all"',
        ),
        ({"vision_config": None}, "without vision_config"),
    ],
)
def test_models_that_are_not_served_are_refused(entries: dict[str, Any], words: str) -> None:
    model = tiny_model()
    for key, value in entries.items():
        if value is None:
            setattr(model.config, key, None)
        else:
            vars(getattr(model.config, key)).update(value)
    with pytest.raises(NotImplementedError, match=words):
        patched_by(case.rules(NAME, "ring", 1), model)


WRONG: dict[str, dict[str, Any]] = {
    r"got input_features, sounds; expected text, images": {"input_features": torch.zeros(1, 8, 4)},
    r"got mm_token_type_ids \(3, 3\); expected integers of the shape of input_ids": {
        "mm_token_type_ids": torch.zeros(3, 3).long()
    },
    r"got pixel_values \(5, 32, 11\); expected \(images, patches, 12\)": {
        "pixel_values": torch.zeros(5, 32, 11)
    },
    r"got image_position_ids \(5, 32\); expected integers \(images, patches, 2\)": {
        "image_position_ids": torch.zeros(5, 32).long()
    },
    r"got image_position_ids whose image 0 is no grid of 2 x 2": {
        "image_position_ids": torch.ones(5, 32, 2).long()
    },
    r"got pixel_values without image_position_ids": {"image_position_ids": None},
    r"got a text up to sample 0 that does not fit image_position_ids; expected as many": {
        "input_ids": 4
    },
    r"got a text up to sample 2 that does not fit image_position_ids; expected none left": {
        "input_ids": 50
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_a_batch_that_does_not_fit_is_named(words: str) -> None:
    model, batch = larger_model(), hard_batch()
    patched_by(case.rules(NAME, "ring", 1), model)
    ((key, value),) = WRONG[words].items()
    if isinstance(value, int):  # a word in the place of one of the images' tokens, or of all
        images = batch[key] == IMAGE
        batch[key][tuple(images.nonzero()[0]) if value == 4 else images] = value
    else:
        batch[key] = value
    with pytest.raises((ValueError, NotImplementedError), match=words):
        shard_batch({k: v for k, v in batch.items() if v is not None}, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("model", [moe_model, tiny_model])
def test_a_checkpoint_is_loaded_and_saved_as_it_is(model: Any, tmp_path: Path) -> None:
    """With its scales, which are no parameters."""
    made = model().bfloat16()
    expected = dict(made.named_buffers())
    for found in case.check_saved(NAME, made, tmp_path, size="8KB"):
        assert found.keys() == expected.keys()
        for key, buffer in found.items():
            torch.testing.assert_close(buffer.float(), expected[key].float(), atol=1e-2, rtol=1e-2)
