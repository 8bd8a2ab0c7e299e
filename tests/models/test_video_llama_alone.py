"""Video-LLaMA in one process: what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_lvx.config import LVXConfig
from ds_lvx.config.activation_checkpointing import ActivationCheckpointing
from ds_lvx.models import FAMILIES, family_of, patch_model
from ds_lvx.sharding import shard_batch
from tests.models.alone_case import OneRank, assert_given_back, patched_by
from tests.models.video_llama_case import (
    VIDEO,
    collated,
    ds_config,
    hard_batch,
    tiny_model,
)

CROSS = "video_Qformer.*.crossattention.self"


def patched(model: Any, *rules: dict[str, Any], **section: Any) -> Any:
    config = {**ds_config(stage=0, sp_size=1, self_attn="ring"), **section}
    config["ds_lvx"]["layers"] = [*rules, *config["ds_lvx"]["layers"]]
    return patched_by(config, model)


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    def holds_nothing(model: Any) -> None:
        crossing = [m for n, m in model.named_modules() if n.endswith(".crossattention.self")]
        assert [m.forward.batch for m in crossing if "forward" in vars(m)] == [None, None]

    assert_given_back(tiny_model, hard_batch(), patched, behind=holds_nothing)


def test_the_model_s_own_dictionary_gives_the_same_loss() -> None:
    model, batch = tiny_model(), collated()
    expected = super(type(model), model).forward(batch)["loss"]
    patched(model)
    torch.testing.assert_close(model(**shard_batch(batch, model=model)).loss, expected)


def test_pictures_are_videos_of_one_frame() -> None:
    model, batch = tiny_model(), collated()
    pictures = {**batch, "images": batch["images"][:, :, 0]}
    counted = {**pictures, "images_per_sample": torch.tensor([1, 1])}
    patched(model)
    losses = [model(**shard_batch(each, model=model)).loss for each in (pictures, counted)]
    expected = model(**{**batch, "images": batch["images"][:, :, :1]}).loss
    torch.testing.assert_close(losses, [expected, expected])


def test_a_model_without_a_config_is_known_by_its_class() -> None:
    model = tiny_model()
    family, inside = family_of(nn.ModuleDict({"wrapped": model}))
    assert family is FAMILIES.named("video_llama")
    assert inside is model


def test_only_the_video_s_cross_attention_is_replicated() -> None:
    plans = {plan.name: plan for plan in patched(tiny_model()).plans}
    shared = {name for name, plan in plans.items() if plan.schedule == "replicated"}
    name = "video_Qformer.bert.encoder.layer.{}.crossattention.self"
    assert shared == {name.format(0), name.format(1)}
    of_kernel = {"match": CROSS, "method": "lvx", "kernel": "reference"}
    kernels = {p.kernel for p in patched(tiny_model(), of_kernel).plans if p.name in shared}
    assert kernels == {"reference"}


@pytest.mark.parametrize(
    "rule",
    [{"method": "ulysses"}, {"method": "lvx", "schedule": "ring"}],
)
def test_a_rule_cannot_choose_another_way_for_it(rule: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="whose queries every rank has; expected no rule"):
        patched(tiny_model(), {"match": CROSS, **rule})


def test_checkpoints_are_switched_on_where_there_are_layers() -> None:
    """Tower and Q-Formers may be of a class with a switch, too."""
    model = tiny_model()
    model.visual_encoder._set_gradient_checkpointing = None
    groups: Any = OneRank()
    config = LVXConfig.from_ds_config(ds_config(stage=0, sp_size=1, self_attn="ring"))
    section = ActivationCheckpointing.from_ds_config({"activation_checkpointing": {}})
    patch = patch_model(model, config, groups, checkpoints=section)
    assert all(layer.gradient_checkpointing for layer in model.llama_model.model.layers)
    patch.unpatch()


# ---- models that are refused


def old_text(model: Any) -> None:
    """As the repository's own Llama, which transformers' interface does not reach."""
    for layer in model.llama_model.model.layers:
        del layer.self_attn.layer_idx


def without_cross(model: Any) -> None:
    for layer in model.video_Qformer.bert.encoder.layer:
        del layer.crossattention


def relative(model: Any) -> None:
    layer = model.video_Qformer.bert.encoder.layer[1]
    layer.crossattention.self.position_embedding_type = "relative_key"


def checkpointed(model: Any) -> None:
    model.video_Qformer.config.gradient_checkpointing = True


def hearing(model: Any) -> None:
    model.audio_llama_proj = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (old_text, "got a llama_model LlamaForCausalLM of .*expected transformers' own"),
        (without_cross, "got a video_Qformer QFormer with 0 modules"),
        (relative, "position_embedding_type absolute, relative_key"),
        (checkpointed, "config.gradient_checkpointing"),
        (hearing, "audio branch to train, audio_llama_proj.weight and 1 more"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused(change: Any, words: str) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(NotImplementedError, match=words):
        patched(model)


def test_growing_rope_is_refused() -> None:
    model = tiny_model()
    model.llama_model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(NotImplementedError, match='rope_type "dynamic"'):
        FAMILIES.named("video_llama").check(model, sp_size=2)


def test_frozen_audio_modules_may_lie_beside() -> None:
    model = tiny_model()
    hearing(model)
    model.audio_llama_proj.requires_grad_(False)
    patched(model)


def test_dropout_of_what_every_rank_computes_is_refused() -> None:
    model = tiny_model()
    model.video_Qformer.bert.embeddings.dropout.p = 0.1
    patched(model)
    shard = shard_batch(hard_batch(), model=model)
    with pytest.raises(NotImplementedError, match=r"got dropout 0\.1 in video_Qformer while"):
        model(**shard)
    model.video_Qformer.eval()
    model(**shard)


# ---- batches that are refused

IDS = hard_batch()["input_ids"]


def first_row(row: str) -> torch.Tensor:
    """The text with places where a row of letters has a ``v``."""
    places = torch.tensor([letter == "v" for letter in row])
    return torch.cat((torch.where(places, VIDEO, 5)[None], IDS[1:]))


BAD: dict[str, Any] = {
    r"images \(8, 3, 14, 14\); expected \(4, 3, frames, 28, 28\), or": lambda b: {
        **b,
        "images": b["images"][..., :14, :14],
    },
    r"images \(8, 3, 28, 28\); expected": lambda b: {**b, "images_per_sample": None},
    r"images \(2, 3, 2, 28, 28\); expected \(4, 3, frames": lambda b: {
        **b,
        "images": b["images"][:4].unflatten(0, (2, 2)).transpose(1, 2),
        "images_per_sample": None,
    },
    r"images list; expected": lambda b: {**b, "images": [b["images"]]},
    r"images_per_sample \[5, 1, 0, 1\] for 8 images": lambda b: {
        **b,
        "images_per_sample": torch.tensor([5, 1, 0, 1]),
    },
    r"of \[5, 1, 1, 1\] frames by sample, .* for \[1, 1, 0, 1\] videos": lambda b: {
        **b,
        "images_per_sample": torch.tensor([5, 1, 1, 1]),
    },
    r"of \[0, 0, 0, 0\] frames by sample": lambda b: {**b, "images": None},
    r"a video of 9 frames; expected at most 8": lambda b: {
        **b,
        "images": torch.zeros(12, 3, 28, 28),
        "images_per_sample": torch.tensor([9, 1, 0, 2]),
    },
    r"2 image tokens in sample 0; expected a multiple of 3": lambda b: {
        **b,
        "input_ids": IDS.index_fill(1, torch.tensor([0]), 5),
    },
    r"6 places of videos in 2 runs in sample 0; expected 3 side by side": lambda b: {
        **b,
        "input_ids": first_row("vvv..vvv....."),
    },
    r"3 places of videos in 2 runs in sample 0": lambda b: {
        **b,
        "input_ids": first_row("vv..v........"),
    },
    r"the token 97 of audio in the text": lambda b: {
        **b,
        "input_ids": IDS.index_fill(1, torch.tensor([12]), VIDEO + 1),
    },
    r"position_ids that start anew within a row": lambda b: {
        **b,
        "attention_mask": None,
        "position_ids": torch.arange(13)[None] % 5,
    },
    r"'audio' in the batch; .*images": lambda b: {**b, "audio": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())
