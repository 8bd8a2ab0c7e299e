"""Long prompts, whose text is split over the ranks, generate what one process does."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import ds_lvx
from ds_lvx.models import draft
from tests.generation_case import LVX, blind, config, interleaved, one_image, text_alone
from tests.models import idefics_case
from tests.models.mllama_case import Batch, ds_config, end_engine, start_engine, tiny_model
from tests.ranks import run_ranks
from tests.test_generation_past import KEYWORDS, SECOND, behind, text_of, whole

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (interleaved, {}),
    "blind": (blind, {}),
    "one": (one_image, {}),
    "text": (text_alone, {}),
    "beams": (interleaved, {"num_beams": 2}),  # rows of a sample: not split
}


def generate_long(sp_size: int) -> dict[str, Any]:
    model, found, lengths = tiny_model(), {}, []
    session = ds_lvx.apply(model, config(sp_size))
    text: Any = model.model.language_model
    seen = text.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    with mock.patch.object(draft, "SPLIT_TOKENS", 5):
        for name, (make, keywords) in CASES.items():
            out = ds_lvx.generate(model, make(), **KEYWORDS, **keywords)
            tokens = make()["input_ids"].shape[1]
            share = -(-tokens // sp_size) if session.groups.sp_rank == 0 else tokens // sp_size
            expected = tokens if name == "beams" else share
            assert lengths[0] == expected or tokens % sp_size, (name, lengths)
            assert (lengths[0] < tokens) == (name != "beams"), (name, lengths)
            lengths.clear()
            found[name] = out.sequences, out.logits
            if name == "one":
                longer = text_of(make(), behind(out.sequences, SECOND))
                cache = out.past_key_values
                out = ds_lvx.generate(model, longer, past_key_values=cache, **KEYWORDS)
                found["second"] = out.sequences, out.logits
                lengths.clear()
    seen.remove()
    session.close()
    return found


def reference() -> dict[str, Any]:
    model, found = tiny_model().eval(), {}
    for name, (make, keywords) in CASES.items():
        given = {key: value for key, value in make().items() if key != "labels"}
        out: Any = model.generate(**given, **KEYWORDS, **keywords)
        found[name] = out.sequences, out.logits
        if name == "one":
            longer = whole(make(), behind(out.sequences, SECOND))
            out = model.generate(**longer, **KEYWORDS)
            found["second"] = out.sequences, out.logits
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_split_prompts_generate_what_one_process_does(ranks: int) -> None:
    expected = reference()
    for answer in run_ranks(generate_long, ranks, ranks):
        for name, each in expected.items():
            torch.testing.assert_close(
                answer[name], each, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


IDEFICS = (idefics_case.left_padded, idefics_case.text_only, idefics_case.all_before)


def generate_idefics() -> list[Any]:
    model, found, lengths = idefics_case.tiny_model(), [], []
    given = idefics_case.ds_config(stage=0, sp_size=2, cross=LVX, self_attn="ring")
    session = ds_lvx.apply(model, given)
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    with mock.patch.object(draft, "SPLIT_TOKENS", 5):
        for make in IDEFICS:
            out = ds_lvx.generate(model, make(), **KEYWORDS)
            assert lengths[0] < make()["input_ids"].shape[1], lengths
            lengths.clear()
            found.append((out.sequences, out.logits))
    session.close()
    return found


def test_idefics_splits_its_prompts() -> None:
    model, expected = idefics_case.tiny_model().eval(), []
    for make in IDEFICS:
        given = {key: value for key, value in make().items() if key != "labels"}
        out: Any = model.generate(**given, **KEYWORDS)
        expected.append((out.sequences, out.logits))
    for answer in run_ranks(generate_idefics, 2):
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


def generate_with_an_engine(batch: Batch) -> Any:
    engine = start_engine(ds_config(stage=3, sp_size=2, cross=LVX, self_attn="ring"))
    with mock.patch.object(draft, "SPLIT_TOKENS", 5):
        found = ds_lvx.generate(engine, batch, max_new_tokens=4)
    end_engine(engine)
    return found


def test_a_split_prompt_under_zero_3() -> None:
    batch = interleaved()
    given = {key: value for key, value in batch.items() if key != "labels"}
    expected = tiny_model().eval().generate(**given, max_new_tokens=4)
    for found in run_ranks(generate_with_an_engine, 2, batch):
        assert torch.equal(found, expected)
