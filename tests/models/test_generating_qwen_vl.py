"""Qwen-VL generates what whole forwards of the model, without a cache, say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.models import FAMILIES
from tests.models import qwen_vl_case as case
from tests.models.mllama_case import end_engine, start_engine
from tests.models.test_generating_checkpoint_code import (
    BEAMS,
    NEW,
    SAMPLED,
    SEED,
    forwards,
    mean_log_probability,
)
from tests.models.test_generating_families import KEYWORDS, check, without_labels
from tests.ranks import run_ranks

Batch = dict[str, Any]
MARKS = [case.START, case.START + 1]  # of images, of which there is none more
KEPT = {**KEYWORDS, "suppress_tokens": MARKS}


def long() -> Batch:
    """Longer than the texts of the training: the base of the rotary embedding is another."""
    return case.make_batch([f"..i{'.' * 70}ii.", f"{' ' * 78}i....."], seed=5)


CASES: dict[str, tuple[Batch, dict[str, Any]]] = {
    "left": (case.left_padded(), {}),
    "one": (case.one_image(), SAMPLED),
    "long": (long(), {}),
    "text": ({k: v[:1] for k, v in case.text_only().items()}, {}),
}


def alone(batch: Batch) -> Batch:
    """As the model's own forward takes it, which opens the images that the text names."""
    return {key: value for key, value in without_labels(batch).items() if key != "pixel_values"}


def config(stage: int, ranks: int) -> dict[str, Any]:
    return case.ds_config(stage=stage, sp_size=ranks, self_attn="ring")


def generate_each(ranks: int) -> Any:
    model = case.tiny_model()
    session = ds_lvx.apply(model, config(0, ranks))
    found = {}
    for name, (batch, keywords) in CASES.items():
        torch.manual_seed(SEED)
        out = ds_lvx.generate(model, batch, **{**KEPT, **keywords})
        found[name] = out.sequences, out.logits
    keywords = {**KEPT, **BEAMS, "output_scores": True}
    beams = ds_lvx.generate(model, CASES["left"][0], **keywords)
    session.close()
    return found, (beams.sequences, beams.sequences_scores)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_it_generates_what_whole_forwards_do(ranks: int) -> None:
    model, expected = case.tiny_model().eval(), {}
    for name, (batch, keywords) in CASES.items():
        expected[name] = forwards(
            model, alone(batch), suppress_tokens=MARKS, sampled=bool(keywords)
        )
    answers = run_ranks(generate_each, ranks, ranks)
    check([found for found, _ in answers], expected)
    for _, (sequences, scores) in answers:
        for row in range(2):
            wanted = mean_log_probability(model, alone(CASES["left"][0]), sequences[row::2])
            torch.testing.assert_close(scores[row::2], wanted, atol=1e-5, rtol=1e-5)


def ask_twice() -> Any:
    engine, batch = start_engine(config(3, 2), model=case.tiny_model()), CASES["one"][0]
    first = ds_lvx.generate(engine, batch, **KEPT)
    more = torch.tensor([[7, 9]])
    longer = {"input_ids": torch.cat([first.sequences, more], dim=1)}
    second = ds_lvx.generate(engine, longer, past_key_values=first.past_key_values, **KEPT)
    wrong = {"input_ids": torch.cat([first.sequences, more * 0 + case.START], dim=1)}
    with pytest.raises(ValueError, match="all ranks: got an image in the text behind that of"):
        ds_lvx.generate(engine, wrong, past_key_values=second.past_key_values, **KEPT)
    end_engine(engine)
    return first.sequences, second.sequences


@pytest.mark.slow
def test_zero_3_and_a_second_question() -> None:
    model = case.tiny_model().eval()
    for first, second in run_ranks(ask_twice, 2):
        given = alone(CASES["one"][0])
        assert torch.equal(first, forwards(model, given, suppress_tokens=MARKS)[0])
        given["input_ids"] = second[:, :-NEW]
        assert torch.equal(given["input_ids"][:, :-2], first)
        assert torch.equal(second, forwards(model, given, suppress_tokens=MARKS)[0])


def test_code_without_transformers_generation_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"got a SimpleNamespace that is no GenerationM"):
        FAMILIES.named("qwen").generator(SimpleNamespace())
