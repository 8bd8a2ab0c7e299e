"""OpenFlamingo in one process: what patching changes, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ds_lvx.attention.replay import recording
from ds_lvx.compare.case import part_of
from ds_lvx.config import LVXConfig
from ds_lvx.models import FAMILIES, family_of, patch_model
from ds_lvx.models.openflamingo.attention import Attention
from ds_lvx.sharding import shard_batch
from tests.models.moss_vl_case import OneRank
from tests.models.openflamingo_case import all_before, ds_config, hard_batch, tiny_model


def patched(model: Any, *, sp_size: int = 1) -> Any:
    groups: Any = OneRank()
    groups.sp_size = sp_size
    cross = {"method": "lvx"}
    config = ds_config(stage=0, sp_size=sp_size, cross=cross, self_attn="ring")
    return patch_model(model, LVXConfig.from_ds_config(config), groups)


def insides(model: Any) -> dict[str, Any]:
    """Everything a patch could leave behind, by module."""
    return {
        name: (
            sorted(module.__dict__),
            *map(dict, (module._forward_pre_hooks, module._forward_hooks)),
        )
        for name, module in model.named_modules()
    }


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    model, batch = tiny_model().eval(), hard_batch()
    model(**batch)
    before, expected = insides(model), model(**batch)
    patch = patched(model)
    copied = copy.deepcopy(model)
    out = model(**batch)
    assert torch.equal(out.logits, expected.logits)
    model(**shard_batch(batch, model=model))
    layers = model.lang_encoder._get_decoder_layers()
    assert all(layer.vis_x is None and layer.media_locations is None for layer in layers)
    patch.unpatch()
    assert insides(model) == before
    changed = tiny_model().eval()
    for parameter in (*copied.parameters(), *changed.parameters()):
        parameter.data.mul_(1.1)
    theirs = copied(**shard_batch(batch, model=copied))
    torch.testing.assert_close(theirs.loss, changed(**batch).loss)


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
        (other_language, r"a 'mpt'; expected one of llama, gpt_neox .*ALiBi"),
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
