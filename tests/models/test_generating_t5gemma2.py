"""T5Gemma2 generates what transformers does, with its encoder's rows on their ranks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import ds_lvx
from ds_lvx.models.generating.decoding import Decoding
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


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "NotImplementedError: all ranks: got past_key_values for a model with an encoder, which is": (
        {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())},
        "expected the whole batch in every call: leave it out",
    ),
    "NotImplementedError: all ranks: got output_hidden_states=True for a prompt whose tokens": (
        {"output_hidden_states": True},
        "no rank has those of all tokens",
    ),
    "ValueError: all ranks: got encoder_outputs among the arguments of generate; expected": (
        {"encoder_outputs": ()},
        "the whole input in the batch",
    ),
    "ValueError: all ranks: Input length of decoder_input_ids is 1, but `max_length` is set": (
        {"max_new_tokens": None, "max_length": 1},
        "",
    ),
}


def generate_each(ranks: int) -> Any:
    model = case.tiny_model()
    session = ds_lvx.apply(model, config(0, ranks))
    kept: list[dict[str, int]] = []

    def release(decoding: Decoding) -> None:
        kept.append({name: k.shape[1] for name, (k, _) in decoding.keys.by_layer.items()})

    with mock.patch.object(Decoding, "release", release):
        found = {name: ask(model, *each) for name, each in CASES.items()}
    messages = []
    for keywords, _ in WRONG.values():
        with pytest.raises(Exception) as caught:
            ds_lvx.generate(model, without_answers(), **{**KEYWORDS, **keywords})
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    out = ds_lvx.generate(model, without_answers(), **KEYWORDS)
    cache = out.past_key_values
    assert (cache.get_seq_length(), cache.cross_attention_cache.get_seq_length()) == (5, 0)
    assert not hasattr(cache, "ds_lvx"), "keys stay that nobody asks for"
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="got neither decoder_start_token_id nor bos_token_id"):
        ds_lvx.generate(model, without_answers())
    session.close()
    return found, kept, messages


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_it_generates_what_transformers_does(ranks: int) -> None:
    answers = run_ranks(generate_each, ranks, ranks)
    check([found for found, _, _ in answers], {n: alone(*each) for n, each in CASES.items()})
    for number, (batch, _) in enumerate(CASES.values()):
        keys = [[*kept[number].values()] for _, kept, _ in answers]
        assert all(len({*lengths}) == 1 and len(lengths) == 3 for lengths in keys)
        # No rank has keys of the others' rows: the parts of all are little more than the whole.
        rows = batch["input_ids"].shape[1]
        assert rows <= sum(lengths[0] for lengths in keys) < rows + 8
        assert max(lengths[0] for lengths in keys) < rows or rows == case.TOKENS
    for _, _, messages in answers:
        for message, (start, (_, end)) in zip(messages, WRONG.items(), strict=True):
            assert message.startswith(start), message
            assert end in message, message


def generate_with_an_engine() -> Any:
    engine = start_engine(config(3, 2), model=case.tiny_model())
    found = ask(engine, *CASES["beams"])
    end_engine(engine)
    return {"beams": found}


@pytest.mark.exhaustive
def test_under_zero_3() -> None:
    check(run_ranks(generate_with_an_engine, 2), {"beams": alone(*CASES["beams"])})
