"""Models whose images stand among the text generate what they generate in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ds_lvx
from tests.models import blip_case, video_llama_case
from tests.models.mllama_case import end_engine, start_engine
from tests.models.test_generating_families import KEYWORDS, check, without_labels
from tests.ranks import run_ranks

Batch = dict[str, Any]
SEED = 11
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 1.5}
BEAMS = {"num_beams": 2, "num_return_sequences": 2}
Case = tuple[Batch, dict[str, Any]]


def blip_models() -> dict[str, Callable[[], Any]]:
    tiny = blip_case.tiny_model
    return {
        "opt": tiny,
        "llama": functools.partial(tiny, text=blip_case.llama()),
        "instructed": functools.partial(tiny, "instructblip"),
        "video": functools.partial(tiny, "instructblipvideo"),
    }


def blip_cases(kind: str) -> dict[str, Case]:
    if kind == "video":
        return {"videos": (blip_case.videos(), {}), "beams": (blip_case.videos(), BEAMS)}
    if kind == "instructed":
        return {"hard": (blip_case.instructed(), BEAMS)}
    return {
        "left": (blip_case.left_padded(), {}),
        "one": (blip_case.one_image(), {**SAMPLED, "num_return_sequences": 2}),
        "hard": (blip_case.hard_batch(), BEAMS),
        "text": (blip_case.text_only(), {}),
    }


def video_cases() -> dict[str, Case]:
    return {
        "unequal": (video_llama_case.hard_batch(), {}),
        "collated": (video_llama_case.collated(), BEAMS),
        "one frame": (video_llama_case.one_frame(), SAMPLED),
        "text": (video_llama_case.text_only(), {}),
    }


def ask(model: Any, batch: Batch, keywords: dict[str, Any]) -> Any:
    torch.manual_seed(SEED)
    out = ds_lvx.generate(model, batch, **{**KEYWORDS, **keywords})
    return out.sequences, out.logits


def generate_blip(kind: str, sp_size: int) -> dict[str, Any]:
    model = blip_models()[kind]()
    config = blip_case.ds_config(stage=0, sp_size=sp_size, self_attn="ulysses")
    session = ds_lvx.apply(model, config)
    found = {name: ask(model, *case) for name, case in blip_cases(kind).items()}
    session.close()
    return found


@pytest.mark.parametrize("kind", [*blip_models()])
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_blip_generates_what_transformers_does(kind: str, ranks: int) -> None:
    model, expected = blip_models()[kind]().eval(), {}
    for name, (batch, keywords) in blip_cases(kind).items():
        torch.manual_seed(SEED)
        given = without_labels(batch)
        # Its own generate insists on images.
        alone = model if batch["pixel_values"].numel() else model.language_model
        given = given if alone is model else {k: given[k] for k in ("input_ids", "attention_mask")}
        out: Any = alone.generate(**given, **{**KEYWORDS, **keywords})
        expected[name] = out.sequences, out.logits
    check(run_ranks(generate_blip, ranks, kind, ranks), expected)


def generate_video() -> dict[str, Any]:
    model = video_llama_case.tiny_model()
    config = video_llama_case.ds_config(stage=0, sp_size=2, self_attn="ulysses")
    session = ds_lvx.apply(model, config)
    found = {name: ask(model, *case) for name, case in video_cases().items()}
    session.close()
    return found


@torch.no_grad()
def embedded(model: Any, batch: Batch) -> torch.Tensor:
    """What the language model is given in one process."""
    found: list[Any] = []
    hook = model.llama_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**{**batch, "labels": None})
    hook.remove()
    return found[0]


def test_video_llama_generates_what_its_language_model_does() -> None:
    model, expected = video_llama_case.tiny_model().eval(), {}
    for name, (batch, keywords) in video_cases().items():
        torch.manual_seed(SEED)
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        rows = embedded(model, batch)
        out: Any = model.llama_model.generate(
            **given, inputs_embeds=rows, **{**KEYWORDS, **keywords}
        )
        expected[name] = out.sequences, out.logits
    check(run_ranks(generate_video, 2), expected)


def generate_with_an_engine() -> Any:
    """Query tokens are the model's own, and no module that runs has them."""
    config = blip_case.ds_config(stage=3, sp_size=2, self_attn="ulysses")
    engine = start_engine(config, model=blip_case.tiny_model())
    batch = blip_case.one_image()
    first = ds_lvx.generate(engine, batch, max_new_tokens=4, return_dict_in_generate=True)
    text = torch.cat([first.sequences, torch.tensor([[7, 9]])], dim=1)
    mask = torch.ones_like(text)
    given = {"input_ids": text, "attention_mask": mask}
    past = first.past_key_values
    second = ds_lvx.generate(engine, given, max_new_tokens=4, past_key_values=past)
    end_engine(engine)
    return first.sequences, second


@pytest.mark.slow
def test_query_tokens_under_zero_3_and_a_second_question() -> None:
    model, batch = blip_case.tiny_model().eval(), without_labels(blip_case.one_image())
    for first, second in run_ranks(generate_with_an_engine, 2):
        assert torch.equal(first, model.generate(**batch, max_new_tokens=4))
        text = second[:, : first.shape[1] + 2]
        assert torch.equal(text[:, :-2], first)
        longer = {**batch, "input_ids": text, "attention_mask": torch.ones_like(text)}
        assert torch.equal(second, model.generate(**longer, max_new_tokens=4))


def test_a_text_model_with_an_encoder_is_refused() -> None:
    model = blip_case.tiny_model(text=blip_case.t5())
    family, inside = ds_lvx.models.family_of(model)
    with pytest.raises(NotImplementedError, match="got a text model with an encoder, t5, which"):
        family.generator(inside)
