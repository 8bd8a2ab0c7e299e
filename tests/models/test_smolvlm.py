"""SmolVLM and Idefics3: tiles on their ranks, and what is refused; more is in
test_concatenated.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx import owned
from ds_lvx.models import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.mllama_case import assert_same_training, plain_step, reference_steps
from tests.models.smolvlm_case import IMAGE, TOKENS, hard_batch, left_padded, tiny_model
from tests.models.test_generating_families import without_labels
from tests.ranks import run_ranks

NAME = "smolvlm"
rules = partial(case.rules, NAME)


def local_units(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's tiles, by `ds_lvx.owned`: sample by sample."""
    model, mine, pixels = tiny_model(), [], batch["pixel_values"]
    for row, ids in enumerate(batch["input_ids"]):
        count = int((ids == IMAGE).sum()) // TOKENS
        mine += [pixels[row, n] for n in owned([TOKENS] * count, model=model)]
    held = torch.stack(mine)[None] if mine else None
    return {**batch, "pixel_values": held, "pixel_attention_mask": None}


WORDS = {"max_new_tokens": 4, "do_sample": False}


def step_further() -> list[Any]:
    """Tiles that are on their ranks already; Idefics3, its head's weights its own; and tokens."""
    batch = local_units(hard_batch(5))
    idefics3 = tiny_model("idefics3", tied=False)
    return [
        plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model()),
        plain_step(case.rules("idefics3", "ulysses", 2), hard_batch(5), model=idefics3),
        generated(),
    ]


def generated() -> torch.Tensor:
    model = tiny_model()
    session = ds_lvx.apply(model, rules("ring", 2))
    found: torch.Tensor = ds_lvx.generate(model, without_labels(left_padded()), **WORDS)
    session.close()
    return found


@pytest.mark.slow
def test_local_tiles_idefics3_and_generation_equal_one_process() -> None:
    found = run_ranks(step_further, 2)
    for index, model in enumerate((tiny_model(), tiny_model("idefics3", tied=False))):
        alone = reference_steps([[hard_batch(5)]], model)
        assert_same_training([each[index] for each in found], alone, sp_size=2)
    tokens = tiny_model().eval().generate(**without_labels(left_padded()), **WORDS)
    assert all(torch.equal(each[2], tokens) for each in found)


def hidden() -> dict[str, Any]:
    mask = hard_batch()["pixel_attention_mask"].clone()
    mask[0, 0, :, -1] = 0
    return {"pixel_attention_mask": mask}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": hard_batch()["input_ids"][:, :-29]}, "got 21 image tokens in sample 0"),
        (
            {"pixel_values": hard_batch()["pixel_values"][:, 1:]},
            r"got pixel_attention_mask \(3, 10",
        ),
        (
            {"pixel_attention_mask": None, "pixel_values": hard_batch()["pixel_values"][1:]},
            "rows",
        ),
        ({"pixel_values": torch.zeros(12, 3, 8, 8)}, r"got pixel_values \(12, 3, 8, 8\)"),
        (hidden(), "of which no tile is hidden in part"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    batch = {**hard_batch(), **change}
    if "input_ids" in change:
        length = batch["input_ids"].shape[1]
        batch |= {key: batch[key][:, :length] for key in ("attention_mask", "labels")}
    with pytest.raises(ValueError, match=message):
        shard_batch(batch, model=tiny_model())


def test_models_of_other_parts_are_refused() -> None:
    family, model = FAMILIES.named(NAME), tiny_model()
    model.config.scale_factor = 3
    with pytest.raises(NotImplementedError, match="tiles of 4 x 4 patches"):
        family.check(model, sp_size=1)
    model.config.scale_factor = 2
    model.config.text_config.model_type = "other"
    with pytest.raises(NotImplementedError, match="text model of type 'other'; expected 'llama'"):
        family.check(model, sp_size=1)
    del model.model.text_model
    with pytest.raises(NotImplementedError, match="vision_model, connector: set text_name"):
        family.text_model(model)
