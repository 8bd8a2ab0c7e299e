"""What patching changes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MllamaForConditionalGeneration

from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import FAMILIES, family_of, patch_model
from ds_lvx.models.layers import make_plans, table
from ds_lvx.models.patch import is_patched, scale_gradient, unpatch
from ds_lvx.sharding import shard_batch
from tests.models.alone_case import insides, patched_by
from tests.models.mllama_case import (
    VISION_RULE,
    Batch,
    assert_same_training,
    ds_config,
    hard_batch,
    lora_model,
    plain_step,
    reference_steps,
    sharded_steps,
    tiny_model,
)
from tests.ranks import RankError, run_ranks

MLLAMA = FAMILIES.named("mllama")
LVX = ds_config(stage=0, sp_size=1, cross={"method": "lvx"}, self_attn="ring")


def patched(model: nn.Module) -> Any:
    return patched_by(LVX, model)


def test_names_class_and_state_stay_and_unpatch_leaves_nothing(tmp_path: Path) -> None:
    model, untouched = tiny_model(), tiny_model()
    before, state = insides(model), model.state_dict()
    patch = patched(model)
    assert type(model) is MllamaForConditionalGeneration
    assert list(model.state_dict()) == list(state)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in untouched.named_parameters()]
    assert not is_patched(untouched)
    model.save_pretrained(tmp_path)
    assert "ds_lvx" not in (tmp_path / "config.json").read_text()
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in untouched.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, msg=name)
    patch.unpatch()
    patch.unpatch()
    assert insides(model) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_the_keyword_a_patched_model_is_its_own_self(implementation: str) -> None:
    model = tiny_model().eval()
    model.set_attn_implementation(implementation)
    batch = hard_batch()
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    before = model(**batch).logits
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    patched(model)
    assert torch.equal(model(**batch).logits, before)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), generated)


def test_text_that_dispatches_keeps_its_forward_and_the_models_config() -> None:
    model = tiny_model()
    patched(model)
    attention = model.model.language_model.layers[0].self_attn
    assert "forward" not in attention.__dict__
    assert attention.config._attn_implementation == "ds_lvx"
    assert model.config.text_config._attn_implementation == "sdpa"
    # Chosen afterwards, it is what runs without the keyword.
    model.set_attn_implementation("eager")
    out = model.eval()(**hard_batch(), output_attentions=True)
    assert out.attentions[0] is not None
    unpatch(model)
    assert attention.config is model.config.text_config


@pytest.mark.parametrize("key", ["sliding_window", "softcap"])
def test_text_attention_of_another_kind_is_refused(key: str) -> None:
    model = tiny_model()
    patched(model)
    batch = shard_batch(hard_batch(), model=model)
    with pytest.raises(NotImplementedError, match=rf"got {key}=4 for model\..*self_attn"):
        model(**batch, **{key: 4})


def test_text_can_project_its_keys_again() -> None:
    config = ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="lvx")
    config["ds_lvx"]["layers"][2]["recompute_kv"] = True
    results = run_ranks(plain_step, 2, config, hard_batch())
    assert_same_training(results, reference_steps([[hard_batch()]]), sp_size=2)


def test_under_autocast_the_sharded_text_has_one_dtype() -> None:
    model = tiny_model().eval()
    batch = hard_batch()
    exact = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        patched(model)
        logits = model(**shard_batch(batch, model=model)).logits
    assert logits.dtype == expected.dtype
    # Products in bf16 round otherwise on every kind of processor.
    assert (logits - exact).norm() < 1.5 * (expected - exact).norm()


def test_a_deep_copy_has_its_own_weights_and_can_be_unpatched() -> None:
    model = tiny_model().eval()
    batch = hard_batch()
    patched(model)
    other = copy.deepcopy(model)
    assert is_patched(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = tiny_model().eval()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.1)
    logits = other(**shard_batch(batch, model=other)).logits
    torch.testing.assert_close(logits, expected(**batch).logits, atol=1e-5, rtol=1e-5)
    unpatch(other)
    assert not is_patched(other)
    assert is_patched(model)


def test_an_earlier_patch_of_the_instance_gets_its_place_back() -> None:
    model = tiny_model()
    module = MLLAMA.attention_layers(model)[-1].module
    calls: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("called")
        return type(module).forward(module, *args, **kwargs)

    module.forward = counted
    patch = patched(model)
    model(**hard_batch())
    assert calls == ["called"]
    patch.unpatch()
    assert module.forward is counted


def test_outputs_that_transformers_records() -> None:
    model = tiny_model().eval()
    batch = hard_batch()
    expected = model(**batch, output_hidden_states=True)
    patched(model)
    out = model(**shard_batch(batch, model=model), output_hidden_states=True)
    assert len(out.hidden_states) == len(expected.hidden_states)
    first = model(**shard_batch(batch, model=model), return_dict=False)[0]
    torch.testing.assert_close(first, expected.loss)


def test_patching_twice_is_refused() -> None:
    model = tiny_model()
    patched(model)
    with pytest.raises(ValueError, match="patched already"):
        patched(model)


# ---- plans


def plans_of(layers: list[dict[str, Any]], *, sp_size: int, **text: Any) -> Any:
    config = LVXConfig(sequence_parallel_size=sp_size, layers=layers)  # type: ignore[arg-type]
    return make_plans(MLLAMA.attention_layers(tiny_model(**text)), config, sp_size=sp_size)


CROSS = {"match": "*.cross_attn", "method": "lvx", "recompute_kv": True}
TEXT = {"match": "*language_model*.self_attn", "method": "ulysses"}


def test_the_table_collapses_layers() -> None:
    text = table(plans_of([VISION_RULE, CROSS, TEXT], sp_size=2))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "method", "schedule", "kernel", "recompute_kv"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["model.language_model.layers.{1,3}.cross_attn"] == ["lvx", "auto", "auto", "yes"]
    assert rows["model.language_model.layers.{0,2}.self_attn"] == ["ulysses", "-", "auto", "no"]
    assert rows["model.vision_model.transformer.layers.{0..1}.self_attn"][0] == "none"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            [VISION_RULE, CROSS],
            ["layers.{0,2}.self_attn", '"*language_model*.self_attn"', "ulysses"],
        ),
        ([VISION_RULE, TEXT], ["layers.{1,3}.cross_attn", '"*.cross_attn"', '"lvx"']),
        ([VISION_RULE, CROSS, {**TEXT, "method": "none"}], ["text is sharded"]),
        ([VISION_RULE, {"match": "*.crossattn", "method": "lvx"}], ["*.crossattn"]),
    ],
)
def test_a_layer_over_sharded_tokens_needs_a_method(layers: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"ds_lvx\.layers") as caught:
        plans_of(layers, sp_size=2)
    for word in words:
        assert word in str(caught.value)
    if "crossattn" not in words[0]:
        plans_of(layers, sp_size=1)


def test_the_vision_tower_has_no_method() -> None:
    every = {"match": "*.self_attn", "method": "ring"}
    with pytest.raises(
        NotImplementedError, match=r"layers.0.self_attn, but.*\*vision_model\*"
    ) as caught:
        plans_of([CROSS, every], sp_size=2)
    assert len(str(caught.value).splitlines()) == 1


def test_text_has_no_features_to_offload() -> None:
    text = {**TEXT, "method": "lvx", "recompute_kv": True, "features": "offload"}
    with pytest.raises(NotImplementedError, match=r'got features "offload" for .*attn, which') as e:
        plans_of([VISION_RULE, CROSS, text], sp_size=2)
    assert "cross_attn" not in str(e.value)


def test_hybrids_say_what_runs_across() -> None:
    hybrid = {"method": "hybrid", "ulysses": 2}
    rules = [{"match": "*.cross_attn", **hybrid}, {**TEXT, **hybrid}]
    lines = table(plans_of([VISION_RULE, *rules], sp_size=4)).splitlines()
    columns = {line.split("  ")[0]: line.split()[-6:-2] for line in lines}
    assert columns["model.language_model.layers.{1,3}.cross_attn"] == ["hybrid", "2", "lvx", "auto"]
    assert columns["model.language_model.layers.{0,2}.self_attn"] == ["hybrid", "2", "ring", "-"]
    with pytest.raises(NotImplementedError, match="across is ring, which has no schedules"):
        plans_of([VISION_RULE, rules[0], {**rules[1], "schedule": "gather"}], sp_size=4)


def test_ulysses_with_more_ranks_than_heads() -> None:
    with pytest.raises(ValueError, match=r"ulysses on 5 ranks .* 4 heads"):
        plans_of([VISION_RULE, CROSS, TEXT], sp_size=5)
    with pytest.raises(ValueError, match=r"ulysses on 8 ranks .* 4 heads.* a smaller ulysses"):
        plans_of([VISION_RULE, CROSS, {**TEXT, "method": "hybrid", "ulysses": 8}], sp_size=16)
    plans_of([VISION_RULE, CROSS, {**TEXT, "method": "ring"}], sp_size=5)


def test_replicated_queries_are_not_what_a_sharded_text_has() -> None:
    cross = {"match": "*.cross_attn", "method": "lvx", "schedule": "replicated"}
    with pytest.raises(NotImplementedError, match="the text is sharded"):
        plans_of([VISION_RULE, cross, TEXT], sp_size=2)


def test_a_model_of_no_supported_family() -> None:
    with pytest.raises(NotImplementedError, match=r"Linear.*mllama"):
        family_of(nn.Linear(2, 2))


def test_rotary_frequencies_that_follow_the_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ring")
    with pytest.raises(NotImplementedError, match='rope_type "dynamic"'):
        patched_by(config, tiny_model(rope_parameters=rope), sp_size=2)


# ---- forwards that are refused


def test_a_batch_that_is_not_sharded() -> None:
    with pytest.raises(RankError, match="ValueError: got a batch that is not sharded over the 2"):
        run_ranks(forward_unsharded, 2)


def test_a_batch_of_other_groups() -> None:
    with pytest.raises(RankError, match=r"sharded over 1 rank for a model that shares .* 2"):
        run_ranks(forward_of_other_groups, 2)


def forward_of_other_groups() -> None:
    """The newest groups are the default of `shard_batch`; they need not be the model's."""
    config = LVXConfig.from_ds_config(
        ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ring")
    )
    model = tiny_model()
    patch_model(model, config, SequenceParallelGroups(2))
    SequenceParallelGroups(1)
    model(**shard_batch(hard_batch(), model=model))


def forward_unsharded() -> None:
    config = LVXConfig.from_ds_config(
        ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ring")
    )
    model = tiny_model()
    patch_model(model, config, SequenceParallelGroups(2))
    model(**hard_batch())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"use_cache": True}, NotImplementedError, "cache of sharded keys"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, ValueError, "17 tokens of this rank"),
        ({"pixel_values": None}, ValueError, "visual input of another batch"),
    ],
)
def test_a_shard_that_was_tampered_with(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = tiny_model()
    patched(model)
    with pytest.raises(error, match=words):
        model(**{**shard_batch(hard_batch(), model=model), **change})


def test_attention_dropout_is_refused_in_training_only() -> None:
    model = tiny_model(dropout=0.1)
    patched(model)
    with pytest.raises(NotImplementedError, match=r"dropout 0\.1"):
        model(**shard_batch(hard_batch(), model=model))
    model.eval()(**shard_batch(hard_batch(), model=model))


def test_scaling_a_gradient_leaves_the_value() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    y = scale_gradient(x, 4.0)
    y.backward()
    assert (y.item(), x.grad) == (3.0, torch.tensor(4.0))


# ---- LoRA and checkpointing


def train_lora(config: dict[str, Any], batches: list[list[Batch]]) -> dict[str, Any]:
    return sharded_steps(config, batches, model=lora_model())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "recompute"), [(2, False), pytest.param(3, True, marks=pytest.mark.exhaustive)]
)
def test_lora_trains_as_in_one_process(stage: int, recompute: bool) -> None:
    batches = [[hard_batch(0)], [hard_batch(1)]]
    expected = reference_steps(batches, lora_model())
    assert all("lora_" in name for name in expected["grads"])
    assert all(grad.any() for grad in expected["grads"].values())
    cross = {"method": "lvx", "recompute_kv": recompute}
    config = ds_config(stage=stage, sp_size=2, cross=cross, self_attn="ulysses")
    assert_same_training(run_ranks(train_lora, 2, config, batches), expected, sp_size=2)
