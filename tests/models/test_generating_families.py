"""Families beside mllama generate what they generate in one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch

import ds_lvx
from ds_lvx.models.contract import Family
from ds_lvx.models.idefics.family import Idefics
from tests.models import idefics_case, openflamingo_case
from tests.ranks import run_ranks

Batch = dict[str, Any]
KEYWORDS = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 5}


def without_labels(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


def generate_each(
    case_name: str,
    models: Mapping[str, Any],
    each: Mapping[str, tuple[Batch, dict[str, Any]]],
    *,
    sp_size: int = 2,
    names: tuple[str, ...] = ("sequences", "logits"),
) -> dict[str, Any]:
    case, results = import_module(f"tests.models.{case_name}"), {}
    for kind, arguments in models.items():
        model = case.tiny_model(**arguments)
        config = case.ds_config(
            stage=0, sp_size=sp_size, cross={"method": "lvx"}, self_attn="ulysses"
        )
        session = ds_lvx.apply(model, config)
        for name, (batch, keywords) in each.items():
            result = ds_lvx.generate(model, batch, **{**KEYWORDS, **keywords})
            results[f"{kind} {name}"] = tuple(result[key] for key in names)
        session.close()
    return results


def check(answers: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for answer in answers:
        assert answer.keys() == reference.keys()
        for name, expected in reference.items():
            torch.testing.assert_close(
                answer[name],
                expected,
                atol=1e-5,
                rtol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# ---- idefics

IDEFICS: dict[str, dict[str, Any]] = {"resampled": {}, "patches": {"use_resampler": False}}


def idefics_cases() -> dict[str, tuple[Batch, dict[str, Any]]]:
    return {
        "left": (idefics_case.left_padded(), {}),
        "beams": (idefics_case.one_image(), {"num_beams": 2, "num_return_sequences": 2}),
        "before": (idefics_case.all_before(), {}),
        "text": (idefics_case.text_only(), {}),
    }


@functools.cache
def idefics_reference() -> dict[str, Any]:
    results = {}
    for kind, arguments in IDEFICS.items():
        model = idefics_case.tiny_model(**arguments).eval()
        for name, (batch, keywords) in idefics_cases().items():
            out: Any = model.generate(**without_labels(batch), **{**KEYWORDS, **keywords})
            results[f"{kind} {name}"] = (out.sequences, out.logits)
    return results


@pytest.mark.slow
def test_idefics_generates_what_one_process_does() -> None:
    check(
        run_ranks(generate_each, 2, "idefics_case", IDEFICS, idefics_cases()), idefics_reference()
    )


# ---- OpenFlamingo, whose own generate is that of its package

FLAMINGO: dict[str, dict[str, Any]] = {
    "latest": {},
    "all before": {"latest": False},
    "neox": {"language": "neox"},
    "mpt": {"language": "mpt"},
}


def flamingo_cases() -> dict[str, tuple[Batch, dict[str, Any]]]:
    keywords = {"suppress_tokens": [openflamingo_case.IMAGE]}
    return {
        "left": (openflamingo_case.left_padded(), keywords),
        "one image": (openflamingo_case.one_image(), {**keywords, "num_return_sequences": 1}),
    }


@functools.cache
def flamingo_reference() -> dict[str, Any]:
    """Greedy, by whole forwards of the model."""
    results = {}
    for kind, arguments in FLAMINGO.items():
        model = openflamingo_case.tiny_model(**arguments).eval()
        for name, (batch, _) in flamingo_cases().items():
            results[f"{kind} {name}"] = greedy(model, dict(without_labels(batch)))
    return results


@torch.no_grad()
def greedy(model: Any, batch: Batch) -> Any:
    logits = []
    for _ in range(KEYWORDS["max_new_tokens"]):
        logits.append(model(**batch).logits[:, -1])
        allowed = logits[-1].index_fill(1, torch.tensor([openflamingo_case.IMAGE]), -torch.inf)
        chosen = allowed.argmax(dim=1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], chosen], dim=1)
        ones = torch.ones_like(chosen)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], ones], dim=1)
    return batch["input_ids"], tuple(logits)


@pytest.mark.slow
def test_openflamingo_generates_what_whole_forwards_do() -> None:
    answers = run_ranks(generate_each, 2, "openflamingo_case", FLAMINGO, flamingo_cases())
    check(answers, flamingo_reference())


# ---- others


def ask_another() -> None:
    model = idefics_case.tiny_model()
    config = idefics_case.ds_config(
        stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses"
    )
    session = ds_lvx.apply(model, config)
    wrong = pytest.raises(
        NotImplementedError, match=r"all ranks: .*'idefics' .* has no generator\(\)"
    )
    with mock.patch.object(Idefics, "generator", Family.generator), wrong:
        ds_lvx.generate(model, idefics_case.one_image())
    session.close()


def test_a_family_that_cannot_generate_says_so() -> None:
    run_ranks(ask_another, 2)
