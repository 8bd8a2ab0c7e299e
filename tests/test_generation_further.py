"""A long text behind a cache, split over the ranks, is answered as the whole conversation is."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import LogitsProcessor

import ds_lvx
from ds_lvx.models.generating import limits
from tests.generation_case import LVX, interleaved, text_alone
from tests.models import test_generating_checkpoint_code as code
from tests.models import test_generating_families as families
from tests.models.mllama_case import Batch, ds_config, end_engine, start_engine, tiny_model
from tests.models.test_generating_families import without_labels
from tests.ranks import run_ranks
from tests.test_generation_past import FAMILIES, KEYWORDS, THIRD, behind, forwards, text_of, whole

LONG = torch.tensor([17, 23, 5, 9, 40, 12, 3])
SPLIT = len(LONG)
# How the first call leaves the keys of its text, and how many bytes may be whole then.
KEPT: dict[str, tuple[dict[str, str], int]] = {
    "whole": ({}, 1 << 30),
    "sharded": ({"text_keys": "sharded"}, 1 << 30),
    "sharded then": ({}, 0),
}


MAKES = (interleaved, text_alone)


def converse(model: Any, batch: Batch, keywords: dict[str, Any], *, limit: int) -> list[Any]:
    """Answers to a short prompt; to a long text behind it; to a short one; and, from a copy of the
    cache of the second, to another long text behind a part of it."""

    def ask(ids: Tensor, cache: Any) -> Any:
        given = text_of(batch, ids)
        return ds_lvx.generate(model, given, past_key_values=cache, **{**KEYWORDS, **keywords})

    first = ds_lvx.generate(model, batch, **{**KEYWORDS, **keywords})
    cache, answers = first.past_key_values, [first]
    with (
        mock.patch.object(limits, "SPLIT_TOKENS", SPLIT),
        mock.patch.object(limits, "SHARDED_BYTES", limit),
    ):
        answers.append(ask(behind(first.sequences, LONG), cache))
        held = copy.deepcopy(cache)
        answers.append(ask(behind(answers[1].sequences, THIRD), cache))
        keep = first.sequences.shape[1] + 3
        answers.append(ask(behind(answers[1].sequences, LONG.flip(0), keep=keep), held))
    return [(answer.sequences, answer.logits) for answer in answers]


def lengths_of(layer: Any, found: list[int]) -> Any:
    """Keep how many tokens a layer of text runs."""
    return layer.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))


def converse_mllama(sp_size: int) -> dict[str, Any]:
    model, results = tiny_model(), {}
    session = ds_lvx.apply(model, ds_config(stage=0, sp_size=sp_size, cross=LVX, self_attn="ring"))
    lengths: list[int] = []
    text: Any = model.model.language_model
    seen = lengths_of(text.layers[0], lengths)
    for name, (keywords, limit) in KEPT.items():
        for make in MAKES if limit > 0 else MAKES[:1]:
            results[f"{name}, {make.__name__}"] = converse(model, make(), keywords, limit=limit)
    # The second text is LONG and the token before it, of which no rank runs more than its share.
    assert 1 + len(LONG) not in lengths, lengths
    assert lengths.count(-(-(1 + len(LONG)) // sp_size)) >= len(results), lengths
    seen.remove()
    session.close()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_long_texts_behind_a_cache_are_split(ranks: int) -> None:
    model, makes = tiny_model().eval(), {make.__name__: make for make in MAKES}
    first, *others = run_ranks(converse_mllama, ranks, ranks)
    for name, answers in first.items():
        batch = makes[name.split()[-1]]()
        for ids, logits in answers:
            asked = ids[:, : -len(logits)]
            given = whole(batch, asked) if "pixel_values" in batch else text_of(batch, asked)
            out: Any = model.generate(**given, **KEYWORDS)
            assert torch.equal(ids, out.sequences), name
            torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=1e-5)
    for other in others:
        torch.testing.assert_close(other, first, atol=0, rtol=0)


# ---- other families, by whole forwards

CASES: dict[str, dict[str, Any]] = {
    "idefics_case": families.IDEFICS,
    "moss_vl_case": code.ONE,
    "mplugowl3_case": code.OWL,
    "openflamingo_case": families.FLAMINGO,
}
OFTEN = ("resampled", "", "one softmax", "gated", "mpt")
"""Kinds that two ranks try; the attention to text of the others is that of these."""


def converse_family(name: str, kinds: dict[str, Any], sp_size: int) -> dict[str, Any]:
    case, results = import_module(f"tests.models.{name}"), {}
    make, given = FAMILIES[name]
    for kind, arguments in kinds.items():
        model = case.tiny_model(**arguments)
        config = case.ds_config(stage=0, sp_size=sp_size, cross=LVX, self_attn="ulysses")
        session = ds_lvx.apply(model, config)
        for kept, (keywords, limit) in KEPT.items():
            if sp_size > 2 or limit > 0 or kind == "mpt":  # whose keys get a bias then
                answers = converse(model, make(), {**given, **keywords}, limit=limit)
                results[f"{kind}, {kept}"] = answers
        session.close()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("idefics_case", marks=pytest.mark.exhaustive),
        "moss_vl_case",
        pytest.param("mplugowl3_case", marks=pytest.mark.exhaustive),
        pytest.param("openflamingo_case", marks=pytest.mark.exhaustive),
    ],
)
def test_families_split_long_texts_behind_a_cache(name: str, ranks: int) -> None:
    case, batch = import_module(f"tests.models.{name}"), FAMILIES[name][0]()
    kinds = {kind: each for kind, each in CASES[name].items() if ranks > 2 or kind in OFTEN}
    models = {kind: case.tiny_model(**given).eval() for kind, given in kinds.items()}
    for found in run_ranks(converse_family, ranks, name, kinds, ranks):
        for kind, answers in found.items():
            for ids, logits in answers:
                exact = forwards(models[kind.split(",")[0]], batch, ids)
                torch.testing.assert_close([*logits], exact, atol=1e-5, rtol=1e-5)


# ---- a call that fails


class Fail(LogitsProcessor):
    """Fails when it chooses the token of a number, on every rank."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.length:
            raise KeyError("a word")
        return scores


def try_again(batch: Batch, limit: int) -> list[Any]:
    """The same twice from the same cache, of which the first time fails at the third token."""
    model, cache, answers = tiny_model(), DynamicCache(), []
    session = ds_lvx.apply(model, ds_config(stage=0, sp_size=2, cross=LVX, self_attn="ulysses"))

    def twice(given: Batch) -> Any:
        words = {**KEYWORDS, "past_key_values": cache}
        fails = Fail(given["input_ids"].shape[1] + 2)
        with pytest.raises(KeyError):
            ds_lvx.generate(model, given, logits_processor=[fails], **words)
        if cache.get_seq_length() > 0:  # the images are there
            given = text_of(batch, given["input_ids"])
        answers.append(ds_lvx.generate(model, given, **words))
        return answers[-1].sequences

    with (
        mock.patch.object(limits, "SPLIT_TOKENS", SPLIT),
        mock.patch.object(limits, "SHARDED_BYTES", limit),
    ):
        twice(text_of(batch, behind(twice(batch), LONG)))
    session.close()
    return [(answer.sequences, answer.logits) for answer in answers]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_call_that_failed_can_be_tried_again(limit: int) -> None:
    batch, model = interleaved(), tiny_model().eval()
    for answers in run_ranks(try_again, 2, batch, limit):
        for ids, logits in answers:
            out: Any = model.generate(**whole(batch, ids[:, : -len(logits)]), **KEYWORDS)
            torch.testing.assert_close(ids, out.sequences)
            torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=1e-5)


# ---- what else may come with it


def converse_otherwise(batch: Batch) -> dict[str, Any]:
    engine = start_engine(ds_config(stage=3, sp_size=2, cross=LVX, self_attn="ulysses"))
    results: dict[str, Any] = {"zero": converse(engine, batch, {}, limit=0)}
    first = ds_lvx.generate(engine, batch, **KEYWORDS)
    given = text_of(batch, behind(first.sequences, LONG))
    given["attention_mask"][1, -5:-2] = 0
    with mock.patch.object(limits, "SPLIT_TOKENS", SPLIT):
        for name, keywords in (("gaps", {}), ("states", {"output_hidden_states": True})):
            cache = copy.deepcopy(first.past_key_values)
            out = ds_lvx.generate(engine, given, past_key_values=cache, **{**KEYWORDS, **keywords})
            results[name] = out.sequences, out.logits
        results["layers"] = out.hidden_states[0]
    end_engine(engine)
    return results


@pytest.mark.slow
def test_gaps_states_and_zero_3() -> None:
    batch, model = interleaved(), tiny_model().eval()
    first: Any = model.generate(**without_labels(batch), **KEYWORDS)
    given = whole(batch, behind(first.sequences, LONG))
    given["attention_mask"][1, -5:-2] = 0
    out: Any = model.generate(**given, output_hidden_states=True, **KEYWORDS)
    for found in run_ranks(converse_otherwise, 2, batch):
        for ids, logits in found["zero"]:
            with torch.no_grad():
                exact = model(**whole(batch, ids)).logits[:, -len(logits) - 1 : -1].unbind(1)
            torch.testing.assert_close([*logits], [*exact], atol=1e-5, rtol=1e-5)
        for name in ("gaps", "states"):
            torch.testing.assert_close(
                found[name], (out.sequences, out.logits), atol=1e-5, rtol=1e-5
            )
        new = [each[:, first.sequences.shape[1] - 1 :] for each in out.hidden_states[0]]
        torch.testing.assert_close([*found["layers"]], new, atol=1e-5, rtol=1e-5)
