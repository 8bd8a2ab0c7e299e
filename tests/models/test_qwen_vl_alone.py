"""Qwen-VL in one process: what patching changes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lvx.models import FAMILIES, family_of
from ds_lvx.sharding import shard_batch
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.qwen_vl_case import (
    ds_config,
    hard_batch,
    lora_model,
    one_image,
    tiny_model,
)


def patched(model: Any, **rule: Any) -> Any:
    config = ds_config(stage=0, sp_size=1, self_attn="ring")
    config["ds_lvx"]["layers"][1].update(rule)
    return patched_by(config, model)


def own(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "pixel_values"}


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    assert_given_back(tiny_model, hard_batch(), patched, own=own)


def test_what_stands_in_the_places_of_an_image_is_of_no_matter() -> None:
    model, batch = tiny_model(), one_image()
    expected = model(**own(batch)).loss
    patched(model)
    ids = batch["input_ids"]
    first = int((ids[0] == 120).nonzero())
    blank = ids.index_fill(1, torch.arange(first + 1, first + 5), 7)
    shard = shard_batch({**batch, "input_ids": blank}, model=model)
    torch.testing.assert_close(model(**shard).loss, expected)


def test_a_switch_of_older_code_checkpoints_the_layers() -> None:
    model, calls = tiny_model(), []
    block = model.transformer.h[0]
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    patched(model)
    model.gradient_checkpointing_enable()
    model(**shard_batch(one_image(), model=model)).loss.backward()
    assert len(calls) == 2


def test_a_model_of_text_alone_has_no_family() -> None:
    model = tiny_model()
    del model.transformer.visual
    with pytest.raises(NotImplementedError, match="class QWenLMHeadModel; expected one of"):
        family_of(model)
    assert family_of(lora_model())[0] is FAMILIES.named("qwen")


def test_what_a_layer_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"recompute_kv for transformer\.h\.0\.attn"):
        patched(tiny_model(), method="lvx", recompute_kv=True)
    model = tiny_model(attn_dropout_prob=0.1)
    patched(model)
    shard = shard_batch(hard_batch(), model=model)
    with pytest.raises(NotImplementedError, match=r"attention dropout 0\.1"):
        model(**shard)
    with pytest.raises(NotImplementedError, match="output_hidden_states=True"):
        model(**shard, output_hidden_states=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no section 'visual'"):
        FAMILIES.named("qwen").load_processor(str(tmp_path))


BAD: dict[str, Any] = {
    r"pixel_values \(4, 3, 14, 14\); expected \(images, 3, 28, 28\)": lambda b: {
        "pixel_values": b["pixel_values"][..., :14, :14]
    },
    r"pixel_values of 3 images, of 4 in 3 samples": lambda b: {
        "pixel_values": b["pixel_values"][1:]
    },
    r"of \[0, 0, 0\] images by sample, and a text with places for \[3, 1, 0\]": lambda b: {
        "pixel_values": None
    },
    r"4 tokens <img> \(120\) and 3 tokens </img> \(121\); expected": lambda b: {
        "input_ids": b["input_ids"].index_fill(1, torch.tensor([7]), 5)
    },
    r"behind 4 places": lambda b: {"input_ids": b["input_ids"].roll(-1, dims=1)},
    r"position_ids that start anew within a row": lambda b: {
        "attention_mask": None,
        "position_ids": torch.arange(b["input_ids"].shape[1])[None] % 5,
    },
    r"'pixel_value' in the batch; .*'pixel_values'": lambda b: {"pixel_value": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    batch = hard_batch()
    with pytest.raises((ValueError, NotImplementedError), match=words):
        shard_batch({**batch, **BAD[words](batch)}, model=tiny_model())
