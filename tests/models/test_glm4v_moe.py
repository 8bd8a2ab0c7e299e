"""GLM-4.5V: GLM-4.6V's classes, experts, and sizes; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import z3_leaf_module

from ds_lvx.models import FAMILIES
from tests.models import concatenated_case as case
from tests.models import glm4v_moe_case as moe
from tests.models.alone_case import patched_by
from tests.models.glm4v_moe_case import (
    BATCHES,
    BIAS,
    for_one_process,
    hard_batch,
    left_padded,
    tiny_46,
    tiny_model,
)

NAME = "glm4v_moe"


@pytest.mark.exhaustive
def test_the_classes_of_4_6_equal_one_process() -> None:
    alone = case.references(BATCHES, tiny_46, for_one_process)
    case.check_each("glm46v", tiny_46, BATCHES, alone, ranks=2, offset=2)
    two = [[hard_batch(0)], [left_padded(1)]]
    jobs = [(case.rules("glm46v", "ring", 3, stage), tiny_46) for stage in (0, 3)]
    case.check(jobs, ranks=3, batches=two, sp_size=3)


def test_sizes_of_4_6_have_the_experts_of_their_configuration() -> None:
    family, config = FAMILIES.named("glm46v"), FAMILIES.named(NAME).tiny()[0]
    size = FAMILIES.named(NAME).size(config)
    made = family.config(size)
    assert made.text_config.n_routed_experts == config.text_config.n_routed_experts == 4
    assert family.size(made) == size
    counted = [
        FAMILIES.named(name).dimensions(each.to_dict(), "tiny", "its config")
        for name, each in (("glm46v", made), (NAME, config))
    ]
    assert counted[0] == counted[1]


def many_experts() -> Any:
    """Of which a token goes through one: no rank's tokens choose all. By transformers' own loop."""
    model = tiny_model(n_routed_experts=9, num_experts_per_tok=1, n_group=3)
    model.set_experts_implementation("eager")
    return model


def few() -> list[list[Any]]:
    """Fewer tokens than ranks, so that one has no expert to ask; and a few."""
    return [[moe.make_batch([[2]], seed=3)], [moe.make_batch([[3, (1, 1, 1)]], seed=3)]]


@pytest.mark.exhaustive
def test_fewer_tokens_than_ranks_or_than_experts() -> None:
    jobs = [(case.rules(NAME, "lvx", 3, stage), many_experts) for stage in range(4)]
    case.check(jobs, ranks=3, batches=few(), sp_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make"),
    [(NAME, tiny_model), pytest.param("glm46v", tiny_46, marks=pytest.mark.exhaustive)],
)
def test_checkpoints_are_loaded_and_saved_as_they_are_at_zero_3(
    name: str, make: Any, tmp_path: Path
) -> None:
    """With an expert a file, or nearly; the bias of the choice stays as exact as it was."""
    model = make().bfloat16()
    for key, buffer in make().named_buffers():
        model.get_buffer(key).data = buffer
    for found in case.check_saved(name, model, tmp_path):
        biases = {key: each for key, each in found.items() if key.endswith(BIAS)}
        assert len(biases) == 2
        for key, buffer in biases.items():
            assert torch.equal(buffer, model.get_buffer(key)), key


def test_experts_are_one_module_and_their_router_s_loss_is_refused() -> None:
    config, model = case.rules(NAME, "ring", 1), tiny_model()
    patched_by(config, model)
    first, *others = model.model.language_model.layers
    assert not hasattr(first.mlp, "experts")
    assert all(z3_leaf_module(layer.mlp.experts) for layer in others)
    with pytest.raises(NotImplementedError, match="text model with output_router_logits"):
        patched_by(config, tiny_model(output_router_logits=True))


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    text, ids = published.text_config, (published.image_token_id, published.video_start_token_id)
    assert (text.head_dim, text.rope_parameters["mrope_section"]) == (128, [8, 12, 12])
    assert (text.n_routed_experts, text.moe_intermediate_size) == (128, 1408)
    assert ids == (151_363, 151_341)
    model = family.build(family.tiny()[0], gate=1.0, dtype=torch.float32)
    assert [hasattr(each.mlp, "experts") for each in model.model.language_model.layers[:2]] == [
        False,
        True,
    ]
    cut = replace(family.size(model.config), layers=1)
    assert family.size(family.config(cut)).layers == 1
    with pytest.raises(NotImplementedError, match=r"first_k_dense_replace 2 and n_shared_experts"):
        family.size(tiny_model(first_k_dense_replace=2).config)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_token_s_weights_are_those_of_its_experts(dense: int) -> None:
    family = FAMILIES.named(NAME)
    model = tiny_model(first_k_dense_replace=dense, n_shared_experts=2)
    made = family.dimensions(model.config.to_dict(), "tiny", "config.json")
    counted = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1}
    patches = sum(counted.pop(f"model.visual.{n}.weight") for n in _LEFT_OUT)
    # Of layers that are not alike it is a mean, in whole numbers.
    assert made.parameters == pytest.approx(sum(counted.values()), abs=600 if dense else 0), patches
    idle = sum(n for name, n in counted.items() if ".experts." in name) * 4 // 6
    routers = sum(n for name, n in counted.items() if name.endswith("mlp.gate.weight"))
    layers = made.cross
    assert layers.parameters - layers.token_parameters == pytest.approx(idle + routers, abs=3)
    linear = {n for n in counted if "language_model.layers" in n and n.endswith("_proj.weight")}
    held = sum(counted[name] for name in linear)
    assert layers.count * layers.linear_parameters == pytest.approx(held, abs=600 if dense else 0)


_LEFT_OUT = ("embeddings.position_embedding", "patch_embed.proj")
