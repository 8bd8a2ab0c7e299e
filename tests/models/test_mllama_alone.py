"""With ``num_images`` each sample of a batch has the loss that it has alone in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx.models.mllama import visible_images
from tests.models.mllama_case import (
    IMAGE,
    Batch,
    assert_same_training,
    ds_config,
    make_batch,
    plain_step,
    tiny_model,
    trained,
)
from tests.ranks import RankError, run_ranks

FRAME_KEYS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
IMAGES = [3, 1, 0]


def mixed() -> Batch:
    """Three images; one, with text before it; and none, each with a padding tile somewhere."""
    batch = make_batch([[4, 5, 9], [7], [0]], length=17, num_tiles=[[2, 1, 2], [1], []], seed=21)
    ids = batch["input_ids"]
    ids[2, 0] = 5  # the text of the last sample has no image token at all
    batch["labels"] = ids.masked_fill(ids == IMAGE, -100)
    batch["attention_mask"][1, 13:] = 0
    batch["labels"][1, 13:] = -100
    batch["cross_attention_mask"][2] = 0
    return {**batch, "num_images": torch.tensor(IMAGES)}


def alone(batch: Batch, row: int) -> Batch:
    """One sample as transformers' processor would have made it by itself."""
    count = IMAGES[row]
    sample = {key: value[row : row + 1] for key, value in batch.items() if key != "num_images"}
    for key in FRAME_KEYS:
        sample[key] = sample[key][:, :count]
    sample["cross_attention_mask"] = sample["cross_attention_mask"][:, :, :count]
    visual = (*FRAME_KEYS, "cross_attention_mask")
    return sample if count else {k: v for k, v in sample.items() if k not in visual}


def reference() -> dict[str, Any]:
    """The samples one by one, each labelled token with the same weight."""
    model, batch = tiny_model(), mixed()
    labelled = [int((row[1:] != -100).sum()) for row in batch["labels"]]
    logits: list[Tensor] = []
    total = 0.0
    for row, count in enumerate(labelled):
        out = model(**alone(batch, row), use_cache=False)
        loss = out.loss * count / sum(labelled)
        loss.backward()
        total += loss.item()
        logits.append(out.logits.detach())
    grads = {name: p.grad for name, p in trained(model)}
    return {"losses": [[total]], "logits": [[torch.cat(logits)]], "grads": grads}


def compact(batch: Batch) -> Batch:
    """With the run of images that each token sees in place of the mask."""
    visible = visible_images(batch["input_ids"], IMAGE)
    return {
        **{k: v for k, v in batch.items() if k != "cross_attention_mask"},
        "visible_images": visible,
    }


CROSS: list[dict[str, Any]] = [
    {"method": "lvx", "schedule": "ring"},
    {"method": "lvx", "schedule": "gather", "recompute_kv": True},
    {"method": "ulysses"},
    {"method": "ring"},
]


def steps(ranks: int, batches: list[Batch]) -> list[dict[str, Any]]:
    """Each method with one of the batches, as this rank has them."""
    return [
        plain_step(ds_config(stage=0, sp_size=ranks, cross=cross, self_attn="ring"), batch)
        for cross, batch in zip(CROSS, batches, strict=True)
    ]


@pytest.mark.parametrize(
    "ranks",
    [1, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (2, 3))],
)
def test_a_sample_is_in_a_batch_what_it_is_alone(ranks: int) -> None:
    batches = [mixed(), compact(mixed()), mixed(), compact(mixed())]
    expected = reference()
    by_rank = run_ranks(steps, ranks, ranks, batches)
    for place, cross in enumerate(CROSS):
        try:
            assert_same_training([rank[place] for rank in by_rank], expected, sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{cross}: {error}") from error


def test_transformers_itself_lets_text_see_the_padding_images() -> None:
    """What is compared here differs from the model's own batch: the key is there for that."""
    model, batch = tiny_model(), mixed()
    del batch["num_images"]
    together = model(**batch, use_cache=False).logits[2]
    apart = model(**alone(mixed(), 2), use_cache=False).logits[0]
    assert not torch.allclose(together, apart, atol=1e-3)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (torch.tensor([3, 1]), r"num_images \(2,\); expected a tensor \[3\]"),
        ([3, 1, 0], "num_images list; expected a tensor"),
        (torch.tensor([3, 0, 0]), "num_images 0 for sample 1, whose text sees 1 images"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: Any, words: str) -> None:
    config = ds_config(stage=0, sp_size=1, cross=CROSS[0], self_attn="ring")
    with pytest.raises(RankError, match=words):
        run_ranks(plain_step, 1, config, {**mixed(), "num_images": counts})
