"""InternVL: frames on their ranks, other texts, and what is refused; more is in
test_concatenated.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ds_lvx import owned
from ds_lvx.models import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.internvl_case import IMAGE, TOKENS, hard_batch, text_only, tiny_model
from tests.models.mllama_case import assert_same_training, plain_step, reference_steps
from tests.ranks import run_ranks

NAME = "internvl"
rules = partial(case.rules, NAME)


# ---- frames that are on their ranks already


def local_units(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's tiles, by `ds_lvx.owned`: sample by sample."""
    model, mine, start = tiny_model(), [], 0
    for row in batch["input_ids"]:
        count = int((row == IMAGE).sum()) // TOKENS
        mine += [start + n for n in owned([TOKENS] * count, model=model)]
        start += count
    return {**batch, "pixel_values": batch["pixel_values"][mine] if mine else None}


def step_local() -> dict[str, Any]:
    batch = local_units(hard_batch(5))
    return plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())


def test_frames_that_are_on_their_ranks_already() -> None:
    alone = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2), alone, sp_size=2)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_other_texts_equal_one_process(kind: str) -> None:
    """Untied heads as well."""
    make = partial(tiny_model, kind, tied=False)
    alone = case.references([hard_batch], make)
    case.check_each(NAME, make, [hard_batch], alone, ranks=2, offset=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": hard_batch()["input_ids"][:, :-29]}, "got 21 image tokens in sample 0"),
        ({"pixel_values": hard_batch()["pixel_values"][1:]}, "got pixel_values of 11 rows"),
        ({"pixel_values": torch.zeros(12, 3, 8, 8)}, r"got pixel_values \(12, 3, 8, 8\)"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    batch = {**hard_batch(), **change}
    if "input_ids" in change:
        length = batch["input_ids"].shape[1]
        batch |= {key: batch[key][:, :length] for key in ("attention_mask", "labels")}
    with pytest.raises(ValueError, match=message):
        shard_batch(batch, model=tiny_model())


def test_a_text_of_another_type_is_refused() -> None:
    model = tiny_model()
    model.config.text_config.model_type = "other"
    with pytest.raises(NotImplementedError, match="text model of type 'other'; expected one of"):
        FAMILIES.named(NAME).check(model, sp_size=1)


def test_packed_samples_are_refused() -> None:
    """In one process positions that start anew part them, where there is no mask."""
    length = text_only()["input_ids"].shape[1]
    positions = torch.arange(length)[None] % (length // 2)
    batch = {**text_only(), "position_ids": positions, "attention_mask": None}
    with pytest.raises(NotImplementedError, match="position_ids that start anew within a row"):
        shard_batch(batch, model=tiny_model())
