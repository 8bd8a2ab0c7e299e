"""Long prompts, whose text is split over the ranks, generate what one process does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import ds_lvx
from ds_lvx.models.generating import limits
from ds_lvx.models.generating.decoding import Decoding
from tests.generation_case import LVX, blind, config, interleaved, one_image, text_alone
from tests.models import idefics_case
from tests.models import test_generating_checkpoint_code as code
from tests.models import test_generating_families as families
from tests.models.mllama_case import Batch, ds_config, end_engine, start_engine, tiny_model
from tests.ranks import run_ranks
from tests.test_generation_past import KEYWORDS, SECOND, behind, text_of, whole

SHARDED = {"text_keys": "sharded"}
BY_KEYS = pytest.mark.parametrize(
    ("text_keys", "ranks"),
    [
        ("auto", 2),
        ("sharded", 2),
        pytest.param("auto", 3, marks=pytest.mark.exhaustive),
        pytest.param("sharded", 3, marks=pytest.mark.exhaustive),
    ],
)


def without_mask() -> Batch:
    """Padding is told by the tokens alone."""
    return {key: value for key, value in interleaved().items() if key != "attention_mask"}


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": (interleaved, {}),
    "blind": (blind, {}),
    "one": (one_image, {}),
    "text": (text_alone, {}),
    "beams": (interleaved, {"num_beams": 2}),
    "no mask": (without_mask, {"pad_token_id": 0}),
    "sampled": (blind, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}),
}


def generate_long(sp_size: int, text_keys: str) -> dict[str, Any]:
    model, found, lengths = tiny_model(), {}, []
    session = ds_lvx.apply(model, config(sp_size))
    text: Any = model.model.language_model
    seen = text.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    with mock.patch.object(limits, "SPLIT_TOKENS", 5 if text_keys == "auto" else 100):
        for name, (make, keywords) in CASES.items():
            torch.manual_seed(0)
            out = ds_lvx.generate(model, make(), text_keys=text_keys, **KEYWORDS, **keywords)
            tokens = make()["input_ids"].shape[1]
            share = -(-tokens // sp_size) if session.groups.sp_rank == 0 else tokens // sp_size
            assert lengths[0] == share or tokens % sp_size, (name, lengths)
            assert lengths[0] < tokens, (name, lengths)
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
        torch.manual_seed(0)
        out: Any = model.generate(**given, **KEYWORDS, **keywords)
        found[name] = out.sequences, out.logits
        if name == "one":
            longer = whole(make(), behind(out.sequences, SECOND))
            out = model.generate(**longer, **KEYWORDS)
            found["second"] = out.sequences, out.logits
    return found


@pytest.mark.slow
@BY_KEYS
def test_split_prompts_generate_what_one_process_does(text_keys: str, ranks: int) -> None:
    expected = reference()
    for answer in run_ranks(generate_long, ranks, ranks, text_keys):
        for name, each in expected.items():
            torch.testing.assert_close(
                answer[name], each, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


SELF = ("ring", {"method": "lvx", "recompute_kv": True})
IDEFICS = (idefics_case.left_padded, idefics_case.text_only, idefics_case.all_before)


def generate_idefics(self_attn: Any) -> list[Any]:
    model, found, lengths = idefics_case.tiny_model(), [], []
    given = idefics_case.ds_config(stage=0, sp_size=2, cross=LVX, self_attn=self_attn)
    session = ds_lvx.apply(model, given)
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    with mock.patch.object(limits, "SPLIT_TOKENS", 5):
        for make in IDEFICS:
            for text_keys in ("whole", "sharded"):
                out = ds_lvx.generate(model, make(), text_keys=text_keys, **KEYWORDS)
                assert lengths[0] < make()["input_ids"].shape[1], lengths
                lengths.clear()
                found.append((out.sequences, out.logits))
    session.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "self_attn", [SELF[0], pytest.param(SELF[1], marks=pytest.mark.exhaustive)]
)
def test_idefics_splits_its_prompts(self_attn: Any) -> None:
    model, expected = idefics_case.tiny_model().eval(), []
    for make in IDEFICS:
        given = {key: value for key, value in make().items() if key != "labels"}
        out: Any = model.generate(**given, **KEYWORDS)
        expected += [(out.sequences, out.logits)] * 2
    for answer in run_ranks(generate_idefics, 2, self_attn):
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


# ---- others, by whole forwards

OTHERS: dict[str, tuple[Any, Any, Any]] = {
    "openflamingo_case": (families.FLAMINGO, families.flamingo_cases, families.flamingo_reference),
    "moss_vl_case": (code.ONE, code.moss_cases, code.moss_reference),
    "mplugowl3_case": (code.OWL, code.owl_cases, code.owl_reference),
}


@contextmanager
def all_split() -> Iterator[None]:
    """Every prompt is split."""
    begin, split = Decoding.begin, []

    def begun(self: Decoding, given: Any) -> Any:
        more = begin(self, given)
        if self.step == 0:
            split.append(
                "input_ids" in more and len(more["input_ids"][0]) < given["input_ids"].shape[1]
            )
        return more

    with mock.patch.object(limits, "SPLIT_TOKENS", 5), mock.patch.object(Decoding, "begin", begun):
        yield
    assert split
    assert all(split), split


def generate_split(*arguments: Any, **keywords: Any) -> Any:
    with all_split():
        return families.generate_each(*arguments, **keywords)


@pytest.mark.slow
@BY_KEYS
@pytest.mark.parametrize(
    "case_name",
    [
        "moss_vl_case",
        pytest.param("mplugowl3_case", marks=pytest.mark.exhaustive),
        pytest.param("openflamingo_case", marks=pytest.mark.exhaustive),
    ],
)
def test_families_split_their_prompts(case_name: str, text_keys: str, ranks: int) -> None:
    models, cases, expected = OTHERS[case_name]
    given = {
        name: (batch, {**keywords, "text_keys": text_keys})
        for name, (batch, keywords) in cases().items()
    }
    answers = run_ranks(generate_split, ranks, case_name, models, given, sp_size=ranks)
    families.check(answers, expected())


def split_beams(*arguments: Any) -> Any:
    with all_split():
        return code.beams(*arguments)


@pytest.mark.parametrize(
    "text_keys", ["sharded", pytest.param("auto", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("case_name", OTHERS)
def test_beams_of_split_prompts(case_name: str, text_keys: str) -> None:
    batch, keywords = next(iter(OTHERS[case_name][1]().values()))
    keywords = {**keywords, "text_keys": text_keys}
    code.check_beams(case_name, batch, run_ranks(split_beams, 2, case_name, batch, keywords))


def generate_with_an_engine(batch: Batch, self_attn: Any) -> list[Any]:
    engine = start_engine(ds_config(stage=3, sp_size=2, cross=LVX, self_attn=self_attn))
    with mock.patch.object(limits, "SPLIT_TOKENS", 5):
        found = [ds_lvx.generate(engine, batch, max_new_tokens=4)]
    found.append(ds_lvx.generate(engine, batch, max_new_tokens=4, **SHARDED))
    end_engine(engine)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "self_attn", [SELF[0], pytest.param(SELF[1], marks=pytest.mark.exhaustive)]
)
def test_a_split_prompt_under_zero_3(self_attn: Any) -> None:
    batch = interleaved()
    given = {key: value for key, value in batch.items() if key != "labels"}
    expected = tiny_model().eval().generate(**given, max_new_tokens=4)
    for answer in run_ranks(generate_with_an_engine, 2, batch, self_attn):
        for found in answer:
            assert torch.equal(found, expected)


# ---- when keys of the text stay on their rank


def held_with(limit: int) -> list[list[int]]:
    model, kept = tiny_model(), []
    session = ds_lvx.apply(model, config(2))
    release = Decoding.release

    def released(self: Decoding) -> None:
        kept.append([k.shape[1] for key, (k, _) in self.keys.by_layer.items() if key[0] == "self"])
        release(self)

    with (
        mock.patch.object(Decoding, "release", released),
        mock.patch.object(limits, "SPLIT_TOKENS", 5),
        mock.patch.object(limits, "SHARDED_BYTES", limit),
    ):
        for keywords in ({}, {"num_beams": 2}, {"text_keys": "whole"}, SHARDED):
            ds_lvx.generate(model, interleaved(), max_new_tokens=2, **keywords)
    with mock.patch.object(Decoding, "release", released):
        ds_lvx.generate(model, interleaved(), max_new_tokens=2)
    session.close()
    return kept


@pytest.mark.slow
def test_keys_stay_where_all_of_them_would_take_too_much() -> None:
    # Of both samples and of two layers, K and V of two heads of 8.
    whole = 2 * 13 * 2 * 2 * 2 * 8 * 4
    for rank, answer in enumerate(run_ranks(held_with, 2, whole)):
        mine = [7 - rank] * 2
        # With beams they would be there for each row. What runs whole has all keys everywhere.
        assert answer == [[], mine, [], mine, []]
    for answer in run_ranks(held_with, 2, whole - 1):
        assert answer[0]
