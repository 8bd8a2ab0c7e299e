"""MOSS-VL and mPLUG-Owl3 generate what whole forwards of the model, without a cache, say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ds_lvx
from ds_lvx.models import FAMILIES
from tests.models import moss_vl_case, mplugowl3_case
from tests.models.test_generating_families import (
    KEYWORDS,
    Batch,
    check,
    generate_each,
    without_labels,
)
from tests.models.test_moss_vl import local_frames
from tests.models.test_mplugowl3 import local_images
from tests.ranks import run_ranks

Cases = dict[str, tuple[Batch, dict[str, Any]]]
NEW: int = KEYWORDS["max_new_tokens"]
SEED, TEMPERATURE = 7, 1.5
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": TEMPERATURE}
BEAMS = {"num_beams": 2, "num_return_sequences": 2}


def extended(batch: Batch, ids: torch.Tensor) -> Batch:
    """A batch whose texts are longer; new tokens see what the last one saw."""
    more = ids.shape[1] - batch["input_ids"].shape[1]
    longer = {**without_labels(batch), "input_ids": ids}
    if "attention_mask" in batch:
        longer["attention_mask"] = F.pad(batch["attention_mask"], (0, more), value=1)
    if "cross_attention_mask" in batch:
        mask = batch["cross_attention_mask"]
        longer["cross_attention_mask"] = torch.cat([mask, mask[:, :, -1:].repeat(1, 1, more, 1)], 2)
    return longer


@torch.no_grad()
def forwards(model: Any, batch: Batch, *, suppress_tokens: list[int], sampled: bool = False) -> Any:
    """By whole forwards of the model; sampled as transformers does it, from the seed."""
    ids, logits = batch["input_ids"], []
    torch.manual_seed(SEED)
    for _ in range(NEW):
        logits.append(model(**extended(batch, ids)).logits[:, -1])
        allowed = logits[-1].index_fill(1, torch.tensor(suppress_tokens).long(), -torch.inf)
        chosen = allowed.argmax(dim=1, keepdim=True)
        if sampled:
            chosen = torch.multinomial((allowed / TEMPERATURE).softmax(dim=-1), num_samples=1)
        ids = torch.cat([ids, chosen], dim=1)
    return ids, tuple(logits)


def reference(case_name: str, models: Mapping[str, Any], cases: Cases) -> dict[str, Any]:
    case, results = import_module(f"tests.models.{case_name}"), {}
    for kind, arguments in models.items():
        model = case.tiny_model(**arguments).eval()
        for name, (batch, keywords) in cases.items():
            suppressed = keywords.get("suppress_tokens", [])
            results[f"{kind} {name}"] = forwards(model, batch, suppress_tokens=suppressed)
    return results


# ---- MOSS-VL

ONE: dict[str, dict[str, Any]] = {"": {}}


def moss_cases() -> Cases:
    """No token that is chosen stands for a frame, of which there is none more."""
    hard = moss_vl_case.make_batch(
        [
            [3, (3, 4, 6), 2, (1, 2, 2), 4],
            [(1, 4, 2), 2, (2, 2, 4), 3, (-2, 4, 4)],
            [9, (-1, 4, 4)],
        ],
        left=True,
    )
    text = {key: hard[key] for key in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].masked_fill(hard["input_ids"] == moss_vl_case.IMAGE, 7)
    keywords = {"suppress_tokens": [moss_vl_case.IMAGE]}
    return {"hard": (hard, keywords), "one": (moss_vl_case.one_image(), keywords)} | {
        "text": (text, keywords)
    }


@functools.cache
def moss_reference() -> dict[str, Any]:
    return reference("moss_vl_case", ONE, moss_cases())


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_moss_vl_generates_what_whole_forwards_do(ranks: int) -> None:
    answers = run_ranks(generate_each, ranks, "moss_vl_case", ONE, moss_cases(), sp_size=ranks)
    check(answers, moss_reference())


# ---- mPLUG-Owl3

OWL: dict[str, dict[str, Any]] = {"one softmax": {}, "gated": {"gated": True}}


def owl_cases() -> Cases:
    left = mplugowl3_case.make_batch(["..ii...i.i..", "i....", "......."], left=True)
    return {
        "left": (left, {}),
        "one": (mplugowl3_case.one_image(), {}),
        "text": (mplugowl3_case.text_only(), {}),
    }


@functools.cache
def owl_reference() -> dict[str, Any]:
    return reference("mplugowl3_case", OWL, owl_cases())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_mplugowl3_generates_what_whole_forwards_do(ranks: int) -> None:
    answers = run_ranks(generate_each, ranks, "mplugowl3_case", OWL, owl_cases(), sp_size=ranks)
    check(answers, owl_reference())


def end_with_an_image() -> None:
    with pytest.raises(ValueError, match=r"prompt of sample 0 that ends with an image"):
        generate_each("mplugowl3_case", OWL, {"": (mplugowl3_case.seen_by_nobody(), {})})


def test_a_prompt_that_ends_with_an_image_is_for_one_softmax_only() -> None:
    run_ranks(end_with_an_image, 2)


# ---- both


@torch.no_grad()
def mean_log_probability(model: Any, batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    """Of the new tokens of each sample, by one whole forward."""
    log = model(**extended(batch, ids)).logits.log_softmax(dim=-1)[:, -NEW - 1 : -1]
    return log.gather(2, ids[:, -NEW:, None]).mean(dim=(1, 2))


def beams(case_name: str, batch: Batch, keywords: dict[str, Any]) -> Any:
    each = {"beams": (batch, {**keywords, **BEAMS, "output_scores": True})}
    return generate_each(case_name, ONE, each, names=("sequences", "sequences_scores"))


@pytest.mark.parametrize("case_name", ["moss_vl_case", "mplugowl3_case"])
def test_beams_have_the_scores_of_whole_forwards(case_name: str) -> None:
    """The rows of a sample share its images, and its positions."""
    case: Any = import_module(f"tests.models.{case_name}")
    cases = moss_cases() if case is moss_vl_case else owl_cases()
    batch, keywords = next(iter(cases.values()))
    check_beams(case_name, batch, run_ranks(beams, 2, case_name, batch, keywords))


def check_beams(case_name: str, batch: Batch, answers: list[Any]) -> None:
    case: Any = import_module(f"tests.models.{case_name}")
    model = case.tiny_model().eval()
    for answer in answers:
        sequences, scores = answer[" beams"]
        for row in range(2):
            expected = mean_log_probability(model, batch, sequences[row::2])
            torch.testing.assert_close(scores[row::2], expected, atol=1e-5, rtol=1e-5)


Cut = Callable[[Batch, list[list[int]], int], Batch]
CUT: dict[str, tuple[Cut, list[list[int]]]] = {
    "moss_vl_case": (local_frames, [[0, 1, 4], [0, 4, 5], [0, 0, 1]]),
    "mplugowl3_case": (local_images, [[0, 1, 4], [0, 1, 1], [0, 0, 0]]),
}


def sample_local_frames(case_name: str, batch: Batch, keywords: dict[str, Any]) -> list[Any]:
    """Sampled with the frames of all ranks, and with this rank's; the first rank's seed counts."""
    case: Any = import_module(f"tests.models.{case_name}")
    rank, found = torch.distributed.get_rank(), []
    cut, cuts = CUT[case_name]
    model = case.tiny_model()
    given = case.ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ulysses")
    session = ds_lvx.apply(model, given)
    for frames, part in (("all", batch), ("local", cut(batch, cuts, rank))):
        torch.manual_seed(SEED + rank)
        out = ds_lvx.generate(model, part, frames=frames, **{**KEYWORDS, **keywords, **SAMPLED})
        found.append((out.sequences, out.logits))
    session.close()
    return found


@pytest.mark.parametrize("case_name", [*CUT])
def test_sampling_and_frames_that_are_on_their_ranks(case_name: str) -> None:
    case: Any = import_module(f"tests.models.{case_name}")
    cases = moss_cases() if case is moss_vl_case else owl_cases()
    batch, keywords = next(iter(cases.values()))
    suppressed, model = keywords.get("suppress_tokens", []), case.tiny_model().eval()
    expected = forwards(model, batch, suppress_tokens=suppressed, sampled=True)
    likeliest = forwards(model, batch, suppress_tokens=suppressed)
    assert not torch.equal(expected[0], likeliest[0]), "nothing is sampled"
    for answers in run_ranks(sample_local_frames, 2, case_name, batch, keywords):
        for found in answers:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["moss_vl", "mplugowl3"])
def test_code_without_transformers_generation_is_named(name: str) -> None:
    model: Any = torch.nn.Linear(1, 1)
    given = SimpleNamespace(language_model=model) if name == "mplugowl3" else model
    with pytest.raises(NotImplementedError, match=r"a Linear that is no GenerationMixin"):
        FAMILIES.named(name).generator(given)
