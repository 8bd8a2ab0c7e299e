"""Qwen3.5: layers with a state, experts, and sizes; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils import z3_leaf_module

from ds_lvx.compare.case import cut, random_case
from ds_lvx.models.layers import table
from ds_lvx.models.qwen3_5.delta import Groups, _Layer
from ds_lvx.models.registry import FAMILIES
from tests.models import concatenated_case as case
from tests.models import qwen3_5_moe_case as moe
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared
from tests.models.qwen3_5_case import hard_batch, tiny_model

NAME = "qwen3_5"


def with_holes(seed: int = 6) -> dict[str, Any]:
    """Padding in the midst of samples, and behind some of it a token that is learnt: it moves the
    state of a layer, though nobody sees it."""
    batch = hard_batch(seed)
    for row, column in ((0, 2), (0, 3), (0, 36), (1, 5), (1, 12)):
        assert batch["mm_token_type_ids"][row, column] == 0
        batch["attention_mask"][row, column] = 0
        batch["labels"][row, column] = -100
    batch["labels"][1, 13] = 7
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_padding_between_tokens(ranks: int) -> None:
    """Also where heads do not divide by the ranks: there are six."""
    alone = case.references([with_holes], tiny_model)
    case.check_each(NAME, tiny_model, [with_holes], alone, ranks=ranks, offset=2)


def test_the_convolution_gets_dense_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank runs one group of heads, too: causal-conv1d refuses parts of rows."""
    module: Any = tiny_model().model.language_model.layers[0].linear_attn
    groups, given = Groups.of(module.num_k_heads, module.num_v_heads, 2), []
    code = import_module(type(module).__module__)
    convolve = code.causal_conv1d_fn
    monkeypatch.setattr(
        code, "causal_conv1d_fn", lambda x, *more, **words: given.append(x) or convolve(x, *more)
    )
    batch: Any = SimpleNamespace(branches=None)
    layer: Any = _Layer(None, module, groups, batch, None)  # type: ignore[arg-type]
    width = 2 * module.head_k_dim + groups.values * (module.head_v_dim + 2)
    layer.run(torch.ones(2, 5, 1, width), lambda whole: whole[:1])
    assert [x.transpose(1, 2).is_contiguous() for x in given] == [True]


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    given = cut(random_case(NAME), hidden=512, cross_layers=2, vision_layers=2)
    assert (given.heads, given.kv_heads, given.state_heads, given.state_values) == (2, 2, 2, 4)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 64}
    given = replace(given, **sizes, vocabulary=96, text_tokens=8)
    model, _ = compared(given, frames=2, method="ring")
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


@pytest.mark.parametrize("name", [NAME, "qwen3_5_moe"])
def test_a_checkpoint_has_a_size(name: str) -> None:
    family = FAMILIES.named(name)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    text = published.text_config
    assert text.layer_types[:4] == ["linear_attention"] * 3 + ["full_attention"]
    assert text.rope_parameters["mrope_section"] == [11, 11, 10]
    assert (text.linear_num_key_heads, text.linear_num_value_heads) == (16, 32)


# ---- in one process


def test_layers_with_a_state_need_no_rule() -> None:
    patch = patched_by(case.rules(NAME, "ring", 1), tiny_model())
    methods = [(plan.kind, plan.method) for plan in patch.plans if plan.kind != "local"]
    assert methods == [("recurrent", "ulysses"), ("self", "ring"), ("recurrent", "ulysses")]
    lines = table(patch.plans).splitlines()
    assert [line.split()[1:] for line in lines if "linear_attn" in line] == [
        ["ulysses", "-", "-", "no"]
    ]


WRONG: dict[str, dict[str, Any]] = {
    r'method "ring", kernel "auto" for .*linear_attn.*expected no rule for it': {"method": "ring"},
    r'method "ulysses", kernel "triton" for .*state': {"method": "ulysses", "kernel": "triton"},
}


@pytest.mark.parametrize("words", WRONG)
def test_rules_that_are_not_theirs_are_refused(words: str) -> None:
    config = case.rules(NAME, "ulysses", 1)
    config["ds_lvx"]["layers"][1] = {"match": "*language_model*", **WRONG[words]}
    with pytest.raises(NotImplementedError, match=words):
        patched_by(config, tiny_model())


# ---- of experts


@pytest.mark.slow
def test_checkpoints_are_loaded_and_saved_as_they_are_at_zero_3(tmp_path: Path) -> None:
    case.check_saved("qwen3_5_moe", moe.tiny_model().bfloat16(), tmp_path)


def test_experts_are_one_module_and_their_router_s_loss_is_refused() -> None:
    name = "qwen3_5_moe"
    config, model = case.rules(name, "ring", 1), moe.tiny_model()
    patched_by(config, model)
    assert all(z3_leaf_module(each.mlp.experts) for each in model.model.language_model.layers)
    with pytest.raises(NotImplementedError, match="text model with output_router_logits"):
        patched_by(config, moe.tiny_model(output_router_logits=True))
    with pytest.raises(NotImplementedError, match=r"_size 24 and moe_intermediate_size 16"):
        FAMILIES.named(name).size(model.config)
