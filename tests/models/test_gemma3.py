"""Gemma 3: sizes, published settings, and what is refused; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.compare.case import cut, random_case
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared
from tests.models.gemma3_case import IMAGE, hard_batch, left_padded, tiny_model
from tests.models.test_generating_families import without_labels
from tests.ranks import run_ranks

NAME = "gemma3"


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    given = cut(random_case(NAME), hidden=512, cross_layers=2, vision_layers=2)
    assert (given.heads, given.kv_heads, given.frame_tokens) == (2, 1, 256)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 56}
    given = replace(given, **sizes, vocabulary=96, text_tokens=8)
    model, layout = compared(given, frames=3, method="ring")
    assert layout.text_lengths == (3 * 2 + 8,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    text = published.text_config
    assert text.layer_types[4:7] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (text.sliding_window, published.image_token_id) == (1024, 262_144)
    assert family.frame_tokens(published) == 256
    with pytest.raises(NotImplementedError, match="have 4 tokens; expected 1,"):
        family.size(tiny_model().config)


# ---- generating


def as_published() -> Any:
    """Whose generation_config.json asks for a cache that transformers no longer has."""
    model = tiny_model().eval()
    model.generation_config.update(cache_implementation="hybrid", eos_token_id=[1, 2])
    return model


def generate() -> torch.Tensor:
    model = as_published()
    session = ds_lvx.apply(model, case.rules(NAME, "ring", 1))
    found: torch.Tensor = ds_lvx.generate(model, left_padded(), max_new_tokens=2)
    session.close()
    return found


def test_the_settings_of_published_models_generate() -> None:
    expected = as_published().generate(**without_labels(left_padded()), max_new_tokens=2)
    (found,) = run_ranks(generate, 1)
    assert torch.equal(found, expected)


# ---- in one process


def test_texts_that_see_what_follows_are_refused() -> None:
    model = tiny_model()
    model.config.text_config.use_bidirectional_attention = True
    with pytest.raises(NotImplementedError, match="use_bidirectional_attention; expected"):
        patched_by(case.rules(NAME, "ring", 1), model)


def test_rotary_frequencies_that_grow_are_refused_in_layers_of_either_type() -> None:
    model = tiny_model()
    model.config.text_config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(NotImplementedError, match='got rope_type "dynamic"'):
        FAMILIES.named(NAME).check(model, sp_size=2)


WRONG = {
    r"got token_type_ids \(3, 3\); expected integers of the shape of input_ids": {
        "token_type_ids": torch.zeros(3, 3).long()
    },
    r"got 5 image tokens in sample 1; expected a multiple of 4": {"input_ids": 5},
    r"got pixel_values \(12, 3, 16, 8\); expected \(images, 3, 16, 16\)": {"pixel_values": 8},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_batch_that_does_not_fit_is_named(words: str) -> None:
    model, batch = tiny_model(), hard_batch()
    patched_by(case.rules(NAME, "ring", 1), model)
    ((key, value),) = WRONG[words].items()
    if key == "input_ids":
        batch[key][1, :value] = IMAGE
    elif key == "pixel_values":
        batch[key] = batch[key][..., :value]
    else:
        batch[key] = value
    with pytest.raises(ValueError, match=words):
        shard_batch(batch, model=model)
