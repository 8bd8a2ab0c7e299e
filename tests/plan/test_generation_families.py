"""What the planner says of families without cross-attention, against what a generation does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import pytest

import ds_lvx
from ds_lvx.models import FAMILIES
from ds_lvx.models.generating import limits
from ds_lvx.models.generating.decoding import Decoding
from ds_lvx.plan.cards import card
from ds_lvx.plan.cluster import from_card
from ds_lvx.plan.generation import generation
from ds_lvx.plan.scenario import Scenario
from tests.generation_case import one_image
from tests.models import (
    blip_case,
    concatenated_case,
    mllama_case,
    qwen_vl_case,
    t5gemma2_case,
)
from tests.models.test_generating_families import without_labels
from tests.ranks import run_ranks

Case = tuple[Any, dict[str, Any], dict[str, Any]]
NAMES = ("llava_onevision", "qwen3_5", "t5gemma2", "blip_2", "qwen")
FURTHER = (
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "glm4v",
    "glm4v_moe",
    "gemma3",
    "internvl",
    "qwen3_5_moe",
)
IMAGE: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys((*FURTHER, *NAMES[:2]), lambda model: model.config.image_token_id),
    "t5gemma2": lambda model: model.config.image_token_index,
}
"""The token that stands for a part of an image."""
TOKENS = 3  # as many as fit into a window of T5Gemma 2's tiny model
WORDS = {"return_dict_in_generate": True, "do_sample": False}


def case_of(name: str) -> Case:
    """A tiny model, its rules for two ranks, and a sample with an image."""
    if name in (*FURTHER, *NAMES[:2]):
        module = import_module(f"tests.models.{name}_case")
        return module.tiny_model(), concatenated_case.rules(name, "lvx", 2), module.one_image()
    if name == "t5gemma2":
        rules = {"cross": {"method": "lvx"}, "self_attn": {"method": "ring"}}
        config = t5gemma2_case.ds_config(stage=0, sp_size=2, **rules)
        batch = t5gemma2_case.one_image()
        del batch["decoder_position_ids"]  # of an answer that is not given
        return t5gemma2_case.tiny_model(), config, batch
    module = {"blip_2": blip_case, "qwen": qwen_vl_case}[name]
    config = module.ds_config(stage=0, sp_size=2, self_attn="ring")
    return module.tiny_model(), config, module.one_image()


def nbytes(pairs: Any) -> int:
    return sum(k.nbytes + v.nbytes for k, v in pairs if k is not None)


def generate_each(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: generate_one(*case_of(name)) for name in names}


def generate_one(model: Any, config: dict[str, Any], batch: dict[str, Any]) -> dict[str, int]:
    """Bytes of K and V that are sharded, of those in the cache, of states, and of what a token
    sends."""
    kept: list[tuple[int, int]] = []
    sent = []

    def release(decoding: Decoding) -> None:
        held = decoding.keys.by_layer.items()
        behind = [pair for (kind, _), pair in held if kind == "recurrent"]
        keys = [pair for (kind, _), pair in held if kind != "recurrent"]
        kept.append((nbytes(keys), nbytes(behind)))

    session = ds_lvx.apply(model, config)
    for tokens in (TOKENS - 1, TOKENS):
        words = {**WORDS, "max_new_tokens": tokens, "min_new_tokens": tokens}
        with mock.patch.object(Decoding, "release", release), ds_lvx.traffic() as traffic:
            out = ds_lvx.generate(model, without_labels(batch), **words)
        sent.append(traffic.bytes_sent)
    session.close()
    cache = out.past_key_values
    layers = getattr(cache, "self_attention_cache", cache).layers
    text = nbytes((each.keys, each.values) for each in layers if hasattr(each, "keys"))
    states = nbytes(
        (each.conv_states[0], each.recurrent_states[0])
        for each in layers
        if hasattr(each, "conv_states")
    )
    keys, behind = kept[-1]
    return {"keys": keys, "text": text, "states": states + behind, "sent": sent[1] - sent[0]}


def scenario_of(name: str) -> Scenario:
    """The sample of `case_of`, with one image."""
    model, _, batch = case_of(name)
    config, ids = model.config.to_dict(), batch["input_ids"]
    found = FAMILIES.named(model.config.model_type).dimensions(config, name, "its config")
    visual = int((ids == IMAGE[name](model)).sum()) if name in IMAGE else found.frame_tokens
    return Scenario(
        replace(found, frame_tokens=visual),
        text_tokens=ids.shape[1] - visual,
        frames=1,
        zero_stage=0,
        element_bytes=4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [NAMES, pytest.param(FURTHER, marks=pytest.mark.exhaustive)], ids=" ".join
)
def test_bytes_are_those_of_a_tiny_generation(names: tuple[str, ...]) -> None:
    answers = run_ranks(generate_each, 2, names)
    cluster = from_card(card("H100"), gpus=2)
    for name in names:
        asked = scenario_of(name)
        # The last token is chosen, but nobody has its keys; an answer of its own has a start.
        fed = TOKENS if name == "t5gemma2" else TOKENS - 1
        found = generation(asked, cluster, ranks=2, new_tokens=fed)
        most = max(answer[name]["keys"] for answer in answers)
        if name == "t5gemma2":  # whose rows are cut in order, and never through an image
            a_token = found.held.text // fed
            assert found.held.keys <= most < found.held.keys + asked.visual_tokens * a_token
        else:
            assert found.held.keys == most, name
        for answer in answers:
            assert found.held.text == answer[name]["text"], name
            assert found.held.carried == answer[name]["states"], name
            assert found.bytes_sent == answer[name]["sent"], name
        assert found.held.peak >= found.held.weights + found.held.kept


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Texts of so few tokens are split, and their keys stay where they are more than this."""
    with (
        mock.patch.object(limits, "SPLIT_TOKENS", 5),
        mock.patch.object(limits, "SHARDED_BYTES", nbytes),
    ):
        yield


def generate_split(nbytes: int) -> dict[str, int]:
    config = mllama_case.ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ring")
    with limited(nbytes):
        return generate_one(mllama_case.tiny_model(), config, one_image())


@pytest.mark.parametrize("nbytes", [0, 1 << 30])
def test_bytes_of_a_prompt_that_is_split(nbytes: int) -> None:
    config = mllama_case.tiny_model().config.to_dict()
    found = FAMILIES.named("mllama").dimensions(config, "tiny", "its config")
    found = replace(found, frame_tokens=mllama_case.TILES * mllama_case.PATCHES)
    asked = Scenario(found, text_tokens=5, frames=1, zero_stage=0, element_bytes=4)
    with limited(nbytes):
        said = generation(asked, from_card(card("H100"), gpus=2), ranks=2, new_tokens=TOKENS - 1)
    answers = run_ranks(generate_split, 2, nbytes)
    assert said.held.kept == max(answer["keys"] + answer["text"] for answer in answers)
    assert {answer["sent"] for answer in answers} == {said.bytes_sent}
