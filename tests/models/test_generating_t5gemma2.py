"""T5Gemma2 generates what transformers does, with its encoder's rows on their ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_lvx
from tests.models import t5gemma2_case as case
from tests.models.mllama_case import end_engine, start_engine
from tests.models.test_generating_adapters import BEAMS, SAMPLED, SEED, ask
from tests.models.test_generating_families import KEYWORDS, check, without_labels
from tests.ranks import run_ranks

Batch = dict[str, Any]
RANKS = [2, pytest.param(3, marks=pytest.mark.exhaustive)]


def without_answers() -> Batch:
    """The start token alone, of rows that are padded on the right."""
    return without_labels(case.hard_batch())


def begun() -> Batch:
    """Rows and answers padded on the left; some answers begin with the start token."""
    batch = without_labels(case.left_padded())
    batch["decoder_input_ids"][0, 0] = case.BOS
    return batch


def placed() -> Batch:
    """Positions that do not begin at 0, of the rows and of the start token."""
    return {**without_labels(case.one_image()), "decoder_position_ids": torch.tensor([[5]])}


CASES: dict[str, tuple[Batch, dict[str, Any]]] = {
    "greedy": (without_answers(), {}),
    "beams": (begun(), {**BEAMS, "max_new_tokens": 6}),
    "sampled": (placed(), {**SAMPLED, "num_return_sequences": 2}),
    "no start": (without_labels(case.left_padded()), {"encoder_repetition_penalty": 1.5}),
    "image alone": (case.image_alone(), {"decoder_start_token_id": 9}),
    "text": (without_labels(case.text_only()), {"num_beams": 2}),
}


def config(stage: int, ranks: int) -> dict[str, Any]:
    return case.ds_config(
        stage=stage, sp_size=ranks, cross={"method": "lvx"}, self_attn={"method": "ring"}
    )


def alone(batch: Batch, keywords: dict[str, Any]) -> Any:
    torch.manual_seed(SEED)
    model = case.tiny_model().eval()
    out: Any = model.generate(**without_labels(batch), **{**KEYWORDS, **keywords})
    return out.sequences, out.logits


def generate_each(ranks: int) -> dict[str, Any]:
    model = case.tiny_model()
    session = ds_lvx.apply(model, config(0, ranks))
    found = {name: ask(model, *each) for name, each in CASES.items()}
    session.close()
    return found


@pytest.mark.parametrize("ranks", RANKS)
def test_it_generates_what_transformers_does(ranks: int) -> None:
    check(run_ranks(generate_each, ranks, ranks), {n: alone(*each) for n, each in CASES.items()})
