"""Going on from a cache is what a fresh generation from the whole conversation is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import ds_lvx
from ds_lvx.models.generating import limits
from tests.generation_case import config, interleaved, one_image
from tests.models import idefics_case, moss_vl_case, mplugowl3_case, openflamingo_case
from tests.models.mllama_case import Batch, tiny_model
from tests.models.test_generating_families import without_labels
from tests.ranks import run_ranks

TOKENS = 4
KEYWORDS = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": TOKENS}
SECOND = torch.tensor([17, 23, 5])  # what is asked then
THIRD = torch.tensor([31, 6])


def behind(ids: Tensor, more: Tensor, *, keep: int | None = None) -> Tensor:
    """A conversation that goes on: its first tokens, all by default, and some more."""
    return torch.cat([ids[:, :keep], more.to(ids.device).expand(len(ids), -1)], dim=1)


def text_of(batch: Batch, ids: Tensor) -> Batch:
    """The text of a conversation whose first prompt was in a batch."""
    mask = batch.get("attention_mask")
    if mask is None:
        return {"input_ids": ids}
    return {
        "input_ids": ids,
        "attention_mask": F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1),
    }


def ask(
    model: Any, batch: Batch, keywords: Mapping[str, Any], *, drop: int = 0
) -> list[tuple[Tensor, Any]]:
    """Five answers: to a prompt, then on from there, then on from before the last two tokens of the
    first answer, from a copy that was made before the last, and from before the last token of the
    prompt (``drop`` of them)."""
    first = ds_lvx.generate(model, batch, **KEYWORDS, **keywords)
    cache, length = first.past_key_values, batch["input_ids"].shape[1]
    answers = [first]
    ids = behind(first.sequences, SECOND)
    for text in (ids, behind(first.sequences, THIRD, keep=length + 2)):
        held = copy.deepcopy(cache)
        given = text_of(batch, text)
        answers.append(ds_lvx.generate(model, given, past_key_values=cache, **KEYWORDS, **keywords))
    again = ds_lvx.generate(
        model, text_of(batch, ids), past_key_values=held, **KEYWORDS, **keywords
    )
    answers.append(again)
    ids = behind(first.sequences, THIRD, keep=length - drop)
    given = text_of(batch, ids)
    answers.append(ds_lvx.generate(model, given, past_key_values=held, **KEYWORDS, **keywords))
    return [(answer.sequences, answer.logits) for answer in answers]


def ask_mllama(batch: Batch, sp_size: int) -> list[tuple[Tensor, Any]]:
    model = tiny_model()
    session = ds_lvx.apply(model, config(sp_size))
    with ds_lvx.traffic() as traffic:
        answers = ask(model, batch, {}, drop=1)
    assert (traffic.bytes_sent > 0) == (sp_size > 1)
    session.close()
    return answers


def whole(batch: Batch, ids: Tensor) -> Batch:
    """What a processor would say of a longer text."""
    found = {**without_labels(batch), **text_of(batch, ids)}
    mask = batch["cross_attention_mask"]
    more = mask[:, -1:].repeat(1, ids.shape[1] - mask.shape[1], 1, 1)
    return {**found, "cross_attention_mask": torch.cat([mask, more], dim=1)}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", [interleaved, one_image])
def test_answers_are_those_of_whole_conversations(ranks: int, case: Any) -> None:
    batch, model = case(), tiny_model().eval()
    length = batch["input_ids"].shape[1]
    first = model.generate(**without_labels(batch), **KEYWORDS).sequences
    second = behind(first, SECOND)
    third, last = (behind(first, THIRD, keep=length + more) for more in (2, -1))
    texts = [batch["input_ids"], second, third, second, last]
    expected = []
    for text in texts:
        out: Any = model.generate(**whole(batch, text), **KEYWORDS)
        expected.append((out.sequences, out.logits))
    for answers in run_ranks(ask_mllama, ranks, batch, ranks):
        torch.testing.assert_close(answers, expected, atol=1e-5, rtol=1e-5)


# ---- other families, by whole forwards of the model


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "idefics_case": (idefics_case.left_padded, {}),
    "moss_vl_case": (moss_vl_case.one_image, {"suppress_tokens": [moss_vl_case.IMAGE]}),
    "mplugowl3_case": (mplugowl3_case.one_image, {}),
    "openflamingo_case": (
        openflamingo_case.left_padded,
        {"suppress_tokens": [openflamingo_case.IMAGE]},
    ),
}


def ask_family(name: str, batch: Batch, keywords: dict[str, Any]) -> list[tuple[Tensor, Any]]:
    case = import_module(f"tests.models.{name}")
    model = case.tiny_model()
    given = case.ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses")
    # Of the others the last token sees another image than the one before.
    drop = 1 if case in (moss_vl_case, mplugowl3_case) else 0
    session = ds_lvx.apply(model, given)
    answers = ask(model, batch, keywords, drop=drop)
    # The prompt is split; what follows is shorter.
    answers += ask(model, batch, {**keywords, "text_keys": "sharded"}, drop=drop)
    with mock.patch.object(limits, "SPLIT_TOKENS", 5):
        answers.append(ask(model, batch, keywords, drop=drop)[1])
    session.close()
    return answers


@torch.no_grad()
def forwards(model: Any, batch: Batch, ids: Tensor) -> list[Tensor]:
    """The logits by which the last tokens were chosen."""
    given = {**without_labels(batch), **text_of(batch, ids)}
    for key in ("cross_attention_mask", "image_attention_mask"):
        if key in batch:
            mask = batch[key]
            repeats = [1, ids.shape[1] - mask.shape[1]] if key == "image_attention_mask" else None
            if repeats is None:  # [B, 1, T, frames]
                more = mask[:, :, -1:].repeat(1, 1, ids.shape[1] - mask.shape[2], 1)
                given[key] = torch.cat([mask, more], dim=2)
            else:
                given[key] = torch.cat([mask, mask[:, -1:].repeat(*repeats, 1)], dim=1)
    logits = model(**given).logits
    return [logits[:, place - 1] for place in range(-TOKENS, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("idefics_case", marks=pytest.mark.exhaustive),
        "moss_vl_case",
        pytest.param("mplugowl3_case", marks=pytest.mark.exhaustive),
        pytest.param("openflamingo_case", marks=pytest.mark.exhaustive),
    ],
)
def test_families_go_on_from_their_caches(name: str) -> None:
    make, keywords = FAMILIES[name]
    batch, model = make(), import_module(f"tests.models.{name}").tiny_model().eval()
    for answers in run_ranks(ask_family, 2, name, batch, keywords):
        for second in (1, 6):
            torch.testing.assert_close(answers[second], answers[second + 2], atol=1e-5, rtol=1e-5)
        for ids, logits in answers:
            expected = forwards(model, batch, ids)
            torch.testing.assert_close([*logits], expected, atol=1e-5, rtol=1e-5)


# ---- an empty cache of the caller's


def fill_mllama(batch: Batch, sp_size: int) -> dict[str, Any]:
    """What an empty cache holds afterwards, and what is answered on from it."""
    model, cache = tiny_model(), DynamicCache()
    session = ds_lvx.apply(model, config(sp_size))
    first = ds_lvx.generate(model, batch, past_key_values=cache, max_new_tokens=TOKENS)
    held = [
        (layer.keys.clone(), layer.values.clone())
        for layer in cache.layers
        if layer.get_seq_length() > 0
    ]
    text = text_of(batch, behind(first, SECOND))
    second = ds_lvx.generate(model, text, past_key_values=cache, max_new_tokens=TOKENS)
    filled = DynamicCache(config=model.config.get_text_config())
    again = ds_lvx.generate(model, batch, past_key_values=filled, **KEYWORDS)
    assert again.past_key_values is filled, "the result has another cache"
    assert torch.equal(again.sequences, first), "another answer"
    session.close()
    return {"held": held, "first": first, "second": second}


def test_an_empty_cache_is_filled_as_transformers_does() -> None:
    batch, model, cache = interleaved(), tiny_model().eval(), DynamicCache()
    given = without_labels(batch)
    first = model.generate(**given, past_key_values=cache, max_new_tokens=TOKENS)
    second = model.generate(**whole(batch, behind(first, SECOND)), max_new_tokens=TOKENS)
    of_text = [
        (cache.layers[number].keys, cache.layers[number].values)
        for number in range(model.config.text_config.num_hidden_layers)
        if number not in model.config.text_config.cross_attention_layers
    ]
    for found in run_ranks(fill_mllama, 2, batch, 2):
        assert torch.equal(found["first"], first)
        assert torch.equal(found["second"], second)
        torch.testing.assert_close(found["held"], of_text, atol=1e-5, rtol=1e-5)


# ---- what cannot go on


def mistakes() -> dict[str, str]:
    rank, batch = torch.distributed.get_rank(), one_image()
    model = tiny_model()
    session = ds_lvx.apply(model, config(2))
    one = ds_lvx.generate(model, batch, **KEYWORDS)
    beams = ds_lvx.generate(model, batch, **KEYWORDS, num_beams=2)
    text = text_of(batch, behind(one.sequences, SECOND))
    other = {**text, "input_ids": text["input_ids"].flip(1)}
    image = model.config.image_token_index
    past = one.past_key_values
    wrong: dict[str, tuple[Any, dict[str, Any]]] = {
        "beams": (text, {"past_key_values": beams.past_key_values}),
        "images": ({**text, "pixel_values": batch["pixel_values"]}, {"past_key_values": past}),
        "other text": (other, {"past_key_values": past}),
        "one rank": (text, {"past_key_values": past} if rank == 0 else {}),
        "new image": (
            text_of(batch, behind(one.sequences, torch.tensor([image, 3]))),
            {"past_key_values": past},
        ),
        "rows": (text, {"past_key_values": past, "num_beams": 2}),
        "empty on one": (text, {"past_key_values": past if rank == 0 else DynamicCache()}),
    }
    messages = {}
    for name, (given, arguments) in wrong.items():
        with pytest.raises(Exception) as caught:
            ds_lvx.generate(model, given, **{**KEYWORDS, **arguments})
        messages[name] = f"{type(caught.value).__name__}: {caught.value}"
    session.close()
    return messages


def test_what_cannot_go_on_is_named_on_every_rank() -> None:
    first, second = run_ranks(mistakes, 2)
    assert first == second
    for name, expected in {
        "beams": "ValueError: all ranks: got past_key_values of type DynamicCache without sharded",
        "images": "ValueError: all ranks: got pixel_values beside past_key_values, which has the",
        "other text": "ValueError: all ranks: got a text [1, 12] that goes with past_key_values",
        "one rank": "ValueError: ds_lvx.generate: the ranks disagree on ",
        "empty on one": "ValueError: ds_lvx.generate: the ranks disagree on ",
        "new image": "ValueError: all ranks: got an image in the text behind that of past_key",
        "rows": "ValueError: all ranks: got 2 rows for past_key_values of 1 samples; expected one",
    }.items():
        assert first[name].startswith(expected), first[name]
