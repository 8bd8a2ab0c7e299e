"""OpenFlamingo in one process: what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MptConfig
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from ds_lvx.attention.replay import recording
from ds_lvx.compare.case import part_of
from ds_lvx.distributed.channel import Channel
from ds_lvx.models import FAMILIES, family_of
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.openflamingo.attention import Attention
from ds_lvx.models.openflamingo.mpt import SelfAttention, carrying, columns
from ds_lvx.models.text import Text
from ds_lvx.sharding import shard_batch
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.openflamingo_case import all_before, ds_config, hard_batch, tiny_model


def patched(model: Any, *, sp_size: int = 1) -> Any:
    cross = {"method": "lvx"}
    config = ds_config(stage=0, sp_size=sp_size, cross=cross, self_attn="ring")
    return patched_by(config, model, sp_size=sp_size)


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    def holds_nothing(model: Any) -> None:
        layers = model.lang_encoder._get_decoder_layers()
        assert all(layer.vis_x is None and layer.media_locations is None for layer in layers)

    assert_given_back(tiny_model, hard_batch(), patched, behind=holds_nothing)


def test_a_model_without_a_config_is_known_by_its_class() -> None:
    model = tiny_model()
    family, inside = family_of(nn.ModuleDict({"wrapped": model}))
    assert family is FAMILIES.named("openflamingo")
    assert inside is model
    regions = family.regions()
    parts = {part_of(name, regions) for name, _ in model.named_parameters()}
    assert parts == {"cross_attention", "text", "vision"}


def test_checkpointed_gated_layers_attend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand outside of the language model's layers, which alone transformers checkpoints."""
    again: list[bool] = []
    own = Attention.sharded

    def counted(self: Attention, *args: Any, **kwargs: Any) -> Any:
        again.append(recording())
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Attention, "sharded", counted)
    model = tiny_model()
    model.lang_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    patched(model)
    model(**shard_batch(hard_batch(), model=model)).loss.backward()
    assert again == [True, True, False, False]


BAD: dict[str, Any] = {
    r"vision_x \(3, 3, 3, 28, 28\); expected \(3, 3, 1, 3, 28, 28\)": lambda b: {
        **b,
        "vision_x": b["vision_x"][:, :, 0],
    },
    r"3 image tokens in the text of a sample and 2 images": lambda b: {
        **b,
        "vision_x": b["vision_x"][:, :2],
    },
    r"got position_ids; expected none": lambda b: {**b, "position_ids": torch.arange(13)[None]},
    r"'vision' in the batch; .*'vision_x'": lambda b: {**b, "vision": 0},
    r"'lang_x' in the batch; .*'input_ids'": lambda b: {"lang_x": b["input_ids"]},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())


def test_all_before_needs_an_image() -> None:
    batch = {**hard_batch(), "vision_x": None}
    with pytest.raises(ValueError, match="expected a blank image at least"):
        shard_batch(batch, model=all_before())


def other_language(model: Any) -> None:
    model.lang_encoder.config.model_type = "opt"


def of_a_checkpoint(model: Any) -> None:
    """An MPT of code that is not transformers'."""
    model.lang_encoder.config.model_type = "mpt"


def numbered_images(model: Any) -> None:
    model.perceiver.media_time_embs = nn.Parameter(torch.zeros(4, 1, 16))


def mixed(model: Any) -> None:
    model.lang_encoder.gated_cross_attn_layers[1].attn.only_attend_immediate_media = False


def growing(model: Any) -> None:
    model.lang_encoder.config.rope_parameters["rope_type"] = "dynamic"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_language, r"a 'opt' \(LlamaFlamingo .*expected one of llama, gpt_neox, mpt as"),
        (of_a_checkpoint, r"a 'mpt' \(LlamaFlamingo .*its MptForCausalLM"),
        (numbered_images, "max_num_media"),
        (mixed, "got 2 gated layers, of which some"),
        (growing, 'rope_type "dynamic"'),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused(change: Any, words: str) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(NotImplementedError, match=words):
        patched(model, sp_size=2)


# ---- a bias by distance


def projecting_again(model: Any) -> None:
    config = ds_config(stage=0, sp_size=1, cross={"method": "lvx"}, self_attn="lvx")
    config["ds_lvx"]["layers"][-1]["recompute_kv"] = True
    patched_by(config, model)


def test_what_is_projected_together_is_not_projected_again() -> None:
    with pytest.raises(NotImplementedError, match="projected together with Q"):
        projecting_again(tiny_model("mpt"))


def exact(module: MptAttention, x: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Float64, with a bias by the distance itself."""
    q, k, v = (x.double() @ module.Wqkv.weight.double().T).unflatten(-1, (3, 8, -1)).unbind(2)
    place = torch.arange(x.shape[1], dtype=torch.float64)
    distance = place - place[:, None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * module.softmax_scale
    scores = scores + slopes.double()[:, None, None] * distance
    weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    return out @ module.out_proj.weight.double().T


def alone(length: int) -> ShardedBatch:
    """A text without padding, on one rank."""
    text = Text.of({"input_ids": torch.zeros(1, length, dtype=torch.int64)})
    return ShardedBatch.of(
        channel=Channel(None),
        text_lengths=(length,),
        kv_lengths=None,
        text_rule=text.visibility(),
        cross_rule=None,
        row_mask=None,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param(torch.float16, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_a_bias_is_as_exact_as_the_model_s_own(dtype: torch.dtype) -> None:
    """Hundreds of scores far from the middle of a text."""
    length = 1500
    torch.manual_seed(0)
    module = MptAttention(MptConfig(d_model=256, n_heads=8)).to(dtype)
    module.Wqkv.weight.normal_(std=0.15)
    x, bias = torch.randn(1, length, 256).to(dtype), build_mpt_alibi_tensor(8, length)
    hidden = torch.ones(length, length).triu(1).bool()[None, None]
    expected = exact(module, x, bias[:, 0, -1] - bias[:, 0, -2])
    theirs = module(x, position_bias=bias, attention_mask=hidden)[0] - expected
    plan = LayerPlan("attn", "self", "ring", "auto", "native", recompute_kv=False)
    carrier = carrying(bias, alone(length))
    mine = SelfAttention(module, plan)(x, position_bias=carrier)[0] - expected
    assert mine.abs().max() <= 2 * theirs.abs().max()
    assert mine.abs().mean() <= 1.2 * theirs.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_is_as_exact_in_16_bits_as_in_32(dtype: torch.dtype) -> None:
    length, slopes = 70_000, torch.tensor([0.7, 2.0**-8 * 11.3137, 1.0])
    of_queries, of_keys = columns(slopes, torch.arange(length), length, dtype=dtype, head_dim=12)
    assert (12 + of_keys.shape[1]) % 8 == 0
    expected = slopes.double()[:, None] * (torch.arange(length) - length // 2)
    found = of_queries.double() @ of_keys.double().T
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
