"""InternVL with random weights, for `ds-lvx compare`."""

from __future__ import annotations

from dataclasses import replace

import torch

from ds_lvx.compare.case import cut, random_case
from ds_lvx.models import FAMILIES
from tests.models.compare_case import compared

NAME = "internvl"


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    case = cut(random_case(NAME), hidden=256, cross_layers=2, vision_layers=2)
    assert (case.heads, case.kv_heads, case.self_layers, case.frame_tokens) == (2, 2, 0, 256)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 16}
    case = replace(case, **sizes, patch_size=4, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(case, frames=3, method="ring")
    assert layout.text_lengths == (3 * 4 + 8,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_frame_is_the_same_whoever_makes_it() -> None:
    family = FAMILIES.named(NAME)
    config = family.config(replace(family.size(), image_size=28))
    several = [
        family.random_frames(config, text_tokens=8, total=3, frames=frames, seed=0)
        for frames in (range(3), [2], [])
    ]
    assert torch.equal(several[0]["pixel_values"][2:], several[1]["pixel_values"])
    assert "pixel_values" not in several[2]


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    assert published.image_token_id == 151_667
    assert published.image_seq_length == family.frame_tokens(published) == 256
