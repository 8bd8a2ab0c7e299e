"""T5Gemma2 in one process: how rows are cut, what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.models.t5gemma2.batch import Cut
from ds_lvx.sharding import shard_batch
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.t5gemma2_case import ds_config, hard_batch, tiny_model

LVX: dict[str, Any] = {"method": "lvx"}


def patched(model: Any, cross: dict[str, Any] = LVX) -> Any:
    config = ds_config(stage=0, sp_size=1, cross=cross, self_attn="ring")
    return patched_by(config, model)


# ---- how rows are cut


def cut(row: str, ranks: int, held: list[int] | None = None) -> list[str]:
    """The parts of a row, a letter a token; images have two, ``i``."""
    visual = torch.tensor([each == "i" for each in row])
    given = None if held is None else torch.tensor(held)[:, None]
    found = Cut.of([(torch.arange(len(row)), visual)], ranks, unit=2, held=given)
    parts = found.column[0].split(list(found.lengths))
    assert [part.count("i") // 2 for part in _words(row, parts)] == found.held[:, 0].tolist()
    return _words(row, parts)


def _words(row: str, parts: Any) -> list[str]:
    return ["".join(row[place] for place in part) for part in parts]


@pytest.mark.parametrize(
    ("row", "held", "parts"),
    [
        ("......", None, ["..", "..", ".."]),
        ("..ii..ii..", None, ["..", "ii..", "ii.."]),
        ("iiiiiiii", None, ["ii", "ii", "iiii"]),
        ("ii", None, ["", "", "ii"]),
        ("i.i.i.i.", None, ["i.i", ".", "i.i."]),  # an image's tokens need not be side by side
        ("..ii..ii..", [2, 0, 0], ["..ii..ii", "", ".."]),
        ("..ii..ii..", [0, 0, 2], ["..", "", "ii..ii.."]),
    ],
)
def test_a_row_is_cut_between_images(row: str, held: list[int] | None, parts: list[str]) -> None:
    assert cut(row, 3, held) == parts


def test_a_row_is_cut_by_itself() -> None:
    rows = [(torch.arange(3, 7), torch.zeros(4).bool()), (torch.arange(1), torch.zeros(1).bool())]
    found = Cut.of(rows, 2, unit=2, held=None)
    assert found.column.tolist() == [[3, 4, 5, 6], [-1, -1, 0, -1]]
    assert found.lengths == (2, 2)


# ---- patching


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    assert_given_back(tiny_model, hard_batch(), patched)


@pytest.mark.parametrize(
    ("cross", "words"),
    [
        ({"method": "ulysses"}, "'ulysses' for model.decoder.layers.0.self_attn, a decoder layer"),
        ({"method": "auto"}, "'auto' for model.decoder"),
        ({**LVX, "recompute_kv": True}, "recompute_kv for model.decoder.* checkpoint the layers"),
    ],
)
def test_what_the_decoder_cannot_run_is_refused(cross: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        patched(tiny_model(), cross)


def test_softcapped_scores_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"attn_logit_softcapping 50\.0; expected null"):
        patched(tiny_model(attn_logit_softcapping=50.0))


def test_attention_dropout_is_refused_in_training() -> None:
    model = tiny_model()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    patched(model)
    model.eval()(**shard_batch(hard_batch(), model=model))
    with pytest.raises(NotImplementedError, match=r"attention dropout 0\.1 while training"):
        model.train()(**shard_batch(hard_batch(), model=model))


BAD: dict[str, Any] = {
    r"got neither labels .* nor decoder_input_ids": lambda b: {**b, "labels": None},
    r"labels \(3, 9\); expected the shape of decoder_input_ids, \(3, 4\)": lambda b: {
        **b,
        "decoder_input_ids": torch.ones(3, 4, dtype=torch.int64),
    },
    r"attention_mask \(3, 5\); expected the shape of input_ids": lambda b: {
        **b,
        "attention_mask": b["attention_mask"][:, :5],
    },
    r"input_ids of 2 samples and 3 for the decoder": lambda b: {
        **b,
        "input_ids": b["input_ids"][:2],
        "attention_mask": None,
    },
    r"\[15, 4, 0\] image tokens by sample; expected multiples of 4": lambda b: {
        **b,
        "input_ids": b["input_ids"].index_fill(1, torch.tensor([0]), 5),
    },
    r"pixel_values \(5, 3, 8, 8\); expected \('images', 3, 16, 16\)": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][..., :8, :8],
    },
    r"pixel_values of 4 images, of 5 in 3 samples; .*images_per_sample": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][:4],
    },
    r"pixel_values of \[3, 1, 0\] images by sample, and image tokens of \[4, 1, 0\]": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][:4],
        "images_per_sample": torch.tensor([3, 1, 0]),
    },
    r"'pixel_value' in the batch; .*'pixel_values'": lambda b: {**b, "pixel_value": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())
