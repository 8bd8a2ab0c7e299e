"""Qwen3-VL-MoE: experts, and sizes; more is in test_concatenated.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import z3_leaf_module
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ds_lvx.compare.case import cut, random_case
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.export import gather_weights
from tests.models import concatenated_case as case
from tests.models import qwen3_vl_moe_case as moe
from tests.models.alone_case import insides, patched_by
from tests.models.compare_case import compared
from tests.models.mllama_case import assert_same_training, end_engine, reference_steps, start_engine
from tests.models.qwen3_vl_moe_case import hard_batch, text_only, tiny_model
from tests.ranks import run_ranks

NAME = "qwen3_vl_moe"


def many_experts() -> Any:
    """Of which a token goes through one: no rank's tokens choose all."""
    return tiny_model(num_experts=9, num_experts_per_tok=1)


def one_by_one() -> Any:
    """Transformers' own loop over the experts that are chosen."""
    model = many_experts()
    model.set_experts_implementation("eager")
    return model


def few() -> list[list[Any]]:
    """Fewer tokens than ranks, so that one has no expert to ask; and a few."""
    return [[moe.make_batch([[2]], seed=3)], [moe.make_batch([[3, (1, 1, 1)]], seed=3)]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "stages"),
    [
        (one_by_one, (3,)),
        pytest.param(one_by_one, (0, 1, 2), marks=pytest.mark.exhaustive),
        pytest.param(many_experts, (0, 1, 2, 3), marks=pytest.mark.exhaustive),
    ],
)
def test_experts_that_a_rank_s_tokens_do_not_choose(make: Any, stages: tuple[int, ...]) -> None:
    jobs = [(case.rules(NAME, "lvx", 3, stage), make) for stage in stages]
    case.check(jobs, ranks=3, batches=few(), sp_size=3)


def adapted() -> Any:
    """LoRA on all linear layers, beside experts and routers that train whole; checkpointed."""
    adapters = LoraConfig(
        r=2,
        target_modules="all-linear",
        modules_to_save=["mlp.experts", "mlp.gate"],
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), adapters)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.slow
def test_a_loss_in_tiles_beside_lora() -> None:
    config, batches = case.rules(NAME, "ring", 2, 3), [[hard_batch()]]
    config["ds_lvx"]["loss_tiles"] = 3
    results = run_ranks(case.train_each, 2, [(config, adapted)], batches)
    expected = {**reference_steps(batches, adapted()), "logits": []}
    assert sum(".experts." in name and grad.any() for name, grad in expected["grads"].items()) == 4
    assert_same_training([each for (each,) in results], expected, sp_size=2)


def read_as_for_zero3() -> Any:
    """A model that keeps the conversions of all checkpoints, as transformers leaves it; the weights
    of its experts for gate and up are square."""
    model = tiny_model()
    model._weight_conversions = _build_checkpoint_conversion_mapping()[NAME]
    for converter in model._weight_conversions:
        converter._was_used = True
    older = WeightRenaming(r"^model\.language_model\.model", "model.language_model")
    model._weight_conversions.append(older)
    return model


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights as ZeRO-3 has them, and as they are saved, on rank 0."""
    model = read_as_for_zero3()
    engine = start_engine(case.rules(NAME, "lvx", 2, 3), model)
    rank = dist.get_rank()
    held = gather_weights(engine.module, partitioned=True, only_trained=False, keep=rank == 0)
    if rank == 0:
        engine.module.save_pretrained(folder, state_dict=held)
    end_engine(engine)
    found = load_file(folder / "model.safetensors") if rank == 0 else {}
    return held, found


@pytest.mark.slow
def test_weights_are_saved_as_they_are(tmp_path: Path) -> None:
    held, found = run_ranks(saved, 2, tmp_path)[0]
    assert held["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 32, 32)
    torch.testing.assert_close(found, held)


def patched(model: Any) -> Any:
    return patched_by(case.rules(NAME, "ring", 1), model)


def test_a_patched_model_can_be_given_back() -> None:
    model = tiny_model()
    before = insides(model)
    patch = patched(model)
    experts = model.model.language_model.layers[0].mlp.experts
    assert z3_leaf_module(experts)
    patch.unpatch()
    assert insides(model) == before
    assert not z3_leaf_module(experts)


def test_the_loss_of_routers_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="text model with output_router_logits"):
        patched(tiny_model(output_router_logits=True))
    model = tiny_model()
    patched(model)
    shard = shard_batch(text_only(), model=model)
    with pytest.raises(NotImplementedError, match="a forward with output_router_logits"):
        model(**shard, output_router_logits=True)
    model.config.text_config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="false in the text's config"):
        model(**shard)


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    given = cut(random_case(NAME), hidden=256, cross_layers=2, vision_layers=2)
    assert (given.heads, given.kv_heads, given.mlp, given.experts) == (2, 2, 96, 128)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 64}
    given = replace(given, **sizes, vocabulary=96, text_tokens=8, experts=3, chosen_experts=2)
    model, _ = compared(given, frames=2, method="ring")
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    text = published.text_config
    assert (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size) == (128, 8, 768)
    with pytest.raises(NotImplementedError, match=r"mlp_only_layers \[1\] .* every layer"):
        family.size(tiny_model().config)


@pytest.mark.parametrize("dense", [[], [1]])
def test_a_token_s_weights_are_those_of_its_experts(dense: list[int]) -> None:
    family, model = FAMILIES.named(NAME), tiny_model(mlp_only_layers=dense)
    made = family.dimensions(model.config.to_dict(), "tiny", "config.json")
    counted = {n: p.numel() for n, p in model.named_parameters() if p.ndim in (2, 3)}
    positions = counted.pop("model.visual.pos_embed.weight")
    assert positions == 9 * 16
    # Of layers that are not alike it is a mean, in whole numbers.
    assert made.parameters == pytest.approx(sum(counted.values()), abs=300 if dense else 0)
    idle = sum(n for name, n in counted.items() if ".experts." in name) // 2
    routers = sum(n for name, n in counted.items() if name.endswith("mlp.gate.weight"))
    layers = made.cross
    active = layers.parameters - layers.token_parameters
    assert active == pytest.approx(idle + routers, abs=3)
