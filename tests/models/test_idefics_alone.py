"""idefics in one process: what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.sharding import shard_batch
from tests.models.alone_case import assert_given_back, insides, patched_by
from tests.models.idefics_case import IMAGE, VOCABULARY, ds_config, hard_batch, tiny_model

LVX: dict[str, Any] = {"method": "lvx"}


def patched(model: Any, cross: dict[str, Any] = LVX) -> Any:
    config = ds_config(stage=0, sp_size=1, cross=cross, self_attn="ring")
    return patched_by(config, model)


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    assert_given_back(tiny_model, hard_batch(), patched)


def test_additional_vocabulary_has_a_loss() -> None:
    """On a batch of its own the model's code fails: it counts without the added tokens."""
    model, batch = tiny_model(additional_vocab_size=2), hard_batch()
    batch["input_ids"][batch["input_ids"] == IMAGE] = VOCABULARY + 1
    batch["labels"][:, 3] = VOCABULARY
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    patched(model)
    out = model(**shard_batch({**batch, "labels": labels}, model=model))
    torch.testing.assert_close(out.loss, expected)


def test_offload_needs_the_resampler() -> None:
    """A model that is refused is left as it was, for another config."""
    model, rule = tiny_model(use_resampler=False), {**LVX, "recompute_kv": True}
    before = insides(model)
    with pytest.raises(NotImplementedError, match="without a perceiver resampler"):
        patched(model, {**rule, "features": "offload"})
    assert insides(model) == before
    patched(model, rule)


def gaps(batch: dict[str, Any]) -> dict[str, Any]:
    mask = batch["image_attention_mask"].clone()
    mask[0, 12, 0] = 1
    return {**batch, "image_attention_mask": mask}


BAD: dict[str, Any] = {
    r"pixel_values \(3, 3, 3, 14, 14\); expected \(3, 3, 3, 28, 28\)": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][..., :14, :14],
    },
    r"pixel_values without image_attention_mask": lambda b: {**b, "image_attention_mask": None},
    r"token 12 of sample 0 sees the images \[0, 2\]": gaps,
    r"image_attention_mask \(3, 5, 3\); expected \(3, 13, 'images'\)": lambda b: {
        **b,
        "image_attention_mask": b["image_attention_mask"][:, :5],
    },
    r"image_attention_mask for 3 images a sample, and 2 images": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][:, :2],
    },
    r"visible_images to 4 images a sample, and 3 images": lambda b: {
        **b,
        "image_attention_mask": None,
        "visible_images": torch.tensor([0, 4]).expand(3, 13, 2),
    },
    r"got image_attention_mask and visible_images": lambda b: {
        **b,
        "visible_images": torch.zeros(3, 13, 2),
    },
    r"position_ids that start anew within a row": lambda b: {
        **b,
        "attention_mask": None,
        "position_ids": torch.arange(13)[None] % 5,
    },
    r"'pixel_value' in the batch; .*'pixel_values'": lambda b: {**b, "pixel_value": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())
