"""Models whose visual tokens stand among the text's generate what they generate in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ds_lvx
from ds_lvx.models.generating import limits
from ds_lvx.models.generating.past import media_tokens
from tests.elsewhere import ElsewhereByDefault
from tests.models import concatenated_case
from tests.models.mllama_case import LEARNING_RATE, end_engine, start_engine
from tests.models.qwen3_vl_case import left_padded, make_batch, one_image, one_video, tiny_model
from tests.models.test_generating_families import KEYWORDS, check, without_labels
from tests.ranks import run_ranks
from tests.test_generation import Look
from tests.test_generation_further import LONG, converse
from tests.test_generation_past import SECOND, THIRD, TOKENS, ask, behind, text_of

Batch = dict[str, Any]
FAMILIES = (
    *("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "qwen3_5", "gemma3"),
    "gemma4",
    "video_llama_3",  # whose forward has no logits_to_keep
)
SEED = 5
WORDS = {**KEYWORDS, "max_new_tokens": TOKENS}


def cases(name: str) -> dict[str, tuple[Batch, dict[str, Any]]]:
    case = import_module(f"tests.models.{name}_case")
    one = case.one_image()
    return {
        "left": (case.left_padded(), {}),
        "beams": (case.left_padded(), {"num_beams": 3, "num_return_sequences": 2}),
        "sampled": (case.left_padded(), {"do_sample": True, "top_k": 0, "num_return_sequences": 2}),
        "one image": (one, {}),
        "one token": (one, {"max_new_tokens": 1}),
        "no mask": (without_mask(case.left_padded()), {"pad_token_id": 0, "eos_token_id": 1}),
        "text": (case.make_batch([[12], [9]], left=True), {}),
    }


def without_mask(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "attention_mask"}


def run_each(generate: Callable[..., Any], name: str) -> dict[str, Any]:
    results = {}
    for kind, (batch, keywords) in cases(name).items():
        torch.manual_seed(SEED)
        out = generate(without_labels(batch), **{**KEYWORDS, **keywords})
        results[kind] = out.sequences, out.logits
    return results


@functools.cache
def expected(name: str) -> dict[str, Any]:
    case = import_module(f"tests.models.{name}_case")
    own = getattr(case, "generate", generate_alone)
    return run_each(functools.partial(own, case.tiny_model().eval()), name)


def generate_alone(model: Any, batch: Batch, **keywords: Any) -> Any:
    return model.generate(**batch, **keywords)


def generate_each(names: tuple[str, ...], ranks: int) -> dict[str, Any]:
    results = {}
    for number, name in enumerate(names):
        model = import_module(f"tests.models.{name}_case").tiny_model()
        method = concatenated_case.METHODS[number % 3]
        session = ds_lvx.apply(model, concatenated_case.rules(name, method, ranks))
        with ElsewhereByDefault():
            results[name] = run_each(functools.partial(ds_lvx.generate, model), name)
        session.close()
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, FAMILIES),
        pytest.param(
            3,
            (
                *(*FAMILIES, "smolvlm", "qwen2_vl", "qwen3_vl_moe", "qwen3_5_moe"),
                *("glm4v", "glm4v_moe"),
            ),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_generating_equals_one_process(ranks: int, names: tuple[str, ...]) -> None:
    for answer in run_ranks(generate_each, ranks, names, ranks):
        for name in names:
            check([answer[name]], expected(name))


# ---- an engine, and frames that only their rank has


def generate_with_an_engine(stage: int) -> dict[str, Any]:
    """Qwen3-VL at a ZeRO stage, between two steps; then with more ranks than images."""
    engine = start_engine(concatenated_case.rules("qwen3_vl", "ulysses", 2, stage), tiny_model())
    batch, short = left_padded(), {"max_new_tokens": 4}
    engine.backward(engine(**ds_lvx.shard_batch(batch, model=engine.module)).loss)
    engine.step()
    mine = local_units(one_video())
    result = {
        "left": ds_lvx.generate(engine, batch, num_beams=2, **short),
        "local": ds_lvx.generate(engine, mine, frames="local", **short),
        "one image": ds_lvx.generate(engine, one_image(), **short),
    }
    end_engine(engine)
    return result


def local_units(batch: Batch) -> Batch:
    """This rank's temporal patches of one video."""
    frames, height, width = batch["video_grid_thw"][0].tolist()
    mine = ds_lvx.owned([height * width // 4] * frames, model=tiny_model())
    pixels = batch["pixel_values_videos"].unflatten(0, (frames, -1))
    return {**batch, "pixel_values_videos": pixels[list(mine)].flatten(0, 1)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", range(4))
def test_an_engine_generates_between_steps(stage: int) -> None:
    model, short = tiny_model(), {"max_new_tokens": 4}
    model(**left_padded(), use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    expected = {
        "left": model.generate(**without_labels(left_padded()), num_beams=2, **short),
        "local": model.generate(**without_labels(one_video()), **short),
        "one image": model.generate(**without_labels(one_image()), **short),
    }
    for found in run_ranks(generate_with_an_engine, 2, stage):
        torch.testing.assert_close(found, expected)


def generate_in_replicas() -> Tensor:
    """One replica has no image and ends first: under ZeRO-3 it takes part to the other's end."""
    engine = start_engine(concatenated_case.rules("qwen3_vl", "lvx", 2, 3), tiny_model())
    batch, tokens = replicas()[engine.ds_lvx.groups.dp_rank]
    found: Tensor = ds_lvx.generate(engine, batch, max_new_tokens=tokens)
    end_engine(engine)
    return found


def replicas() -> list[tuple[Batch, int]]:
    return [(text_only(), 2), (left_padded(), 5)]


def text_only() -> Batch:
    return make_batch([[12], [9]], left=True)


@pytest.mark.exhaustive
def test_replicas_generate_side_by_side() -> None:
    model = tiny_model().eval()
    for rank, found in enumerate(run_ranks(generate_in_replicas, 4)):
        batch, tokens = replicas()[rank // 2]
        assert torch.equal(found, model.generate(**without_labels(batch), max_new_tokens=tokens))


# ---- going on from a cache


def longer(batch: Batch, ids: Tensor) -> Batch:
    """What a processor would say of a longer text."""
    more = ids.shape[1] - batch["input_ids"].shape[1]
    given = {**without_labels(batch), **text_of(batch, ids)}
    kinds = [key for key in given if key.endswith("token_type_ids")]
    return given | {key: F.pad(batch[key], (0, more)) for key in kinds}


def fail(*_: Any) -> None:
    raise KeyError("mine")


def go_on(name: str, ranks: int) -> Any:
    case = import_module(f"tests.models.{name}_case")
    model, batch = case.tiny_model(), case.left_padded()
    session = ds_lvx.apply(model, concatenated_case.rules(name, "lvx", ranks))
    no_media = {"suppress_tokens": media_tokens(model)}
    answers, words = ask(model, batch, no_media), {**WORDS, **no_media}
    first = ds_lvx.generate(model, batch, **words)
    more = with_gaps(batch, first.sequences)
    hook = model.model.language_model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        ds_lvx.generate(model, more, past_key_values=first.past_key_values, **words)
    hook.remove()
    last = ds_lvx.generate(model, more, past_key_values=first.past_key_values, **words)
    session.close()
    return [*answers, (last.sequences, last.logits)]


def with_gaps(batch: Batch, first: Tensor) -> Batch:
    """A second question, of which a sample has a shorter one."""
    text = text_of(batch, behind(first, SECOND))
    text["attention_mask"][1, first.shape[1] - 1 : first.shape[1] + 1] = 0
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "gemma3", "gemma4"])
def test_answers_are_those_of_whole_conversations(name: str) -> None:
    """Also where one in between fails in its last layer."""
    case = import_module(f"tests.models.{name}_case")
    model, batch = case.tiny_model().eval(), case.left_padded()
    words = {**WORDS, "suppress_tokens": media_tokens(model)}
    length = batch["input_ids"].shape[1]
    first = model.generate(**without_labels(batch), **words).sequences
    second = behind(first, SECOND)
    expected = []
    third, last = (behind(first, THIRD, keep=length + more) for more in (2, 0))
    for ids in (batch["input_ids"], second, third, second, last):
        out: Any = model.generate(**longer(batch, ids), **words)
        expected.append((out.sequences, out.logits))
    out = model.generate(**{**longer(batch, second), **with_gaps(batch, first)}, **words)
    expected.append((out.sequences, out.logits))
    for answers in run_ranks(go_on, 2, name, 2):
        torch.testing.assert_close(answers, expected, atol=1e-5, rtol=1e-5)


# ---- long texts behind a cache


def further(name: str, ranks: int) -> Any:
    case = import_module(f"tests.models.{name}_case")
    model, batch = case.tiny_model(), case.left_padded()
    session = ds_lvx.apply(model, concatenated_case.rules(name, "ulysses", ranks))
    words = {**WORDS, "suppress_tokens": media_tokens(model)}
    answers = converse(model, batch, words, limit=1 << 30)
    first = ds_lvx.generate(model, batch, **words)
    more = text_of(batch, behind(first.sequences, LONG))
    more["attention_mask"][1, -4:-2] = 0
    with mock.patch.object(limits, "SPLIT_TOKENS", len(LONG)):
        last = ds_lvx.generate(model, more, past_key_values=first.past_key_values, **words)
    session.close()
    return answers, more, (last.sequences, last.logits)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("qwen2_5_vl", 2),
        ("qwen3_5", 3),
        ("gemma3", 3),
        ("gemma4", 2),
        *(pytest.param(n, 2, marks=pytest.mark.exhaustive) for n in (*FAMILIES[1:], "glm4v")),
        pytest.param("qwen3_vl", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_long_texts_behind_a_cache_are_split(name: str, ranks: int) -> None:
    case = import_module(f"tests.models.{name}_case")
    model, batch = case.tiny_model().eval(), case.left_padded()
    for answers, more, last in run_ranks(further, ranks, name, ranks):
        for ids, logits in answers:
            with torch.no_grad():
                out: Any = model(**longer(batch, ids)).logits
            exact = out[:, -len(logits) - 1 : -1].unbind(1)
            torch.testing.assert_close([*logits], [*exact], atol=1e-5, rtol=1e-5)
        words = {**WORDS, "suppress_tokens": media_tokens(model)}
        out = model.generate(**{**longer(batch, more["input_ids"]), **more}, **words)
        torch.testing.assert_close(last, (out.sequences, out.logits), atol=1e-5, rtol=1e-5)


# ---- what is kept, what travels, and what is refused


def own_choice(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Of each rank another token."""
    place = torch.full((len(scores), 1), 7 + torch.distributed.get_rank())
    return scores.scatter(1, place, 1e4)


def look_inside() -> dict[str, Any]:
    model, batch = tiny_model(), left_padded()
    session = ds_lvx.apply(model, concatenated_case.rules("qwen3_vl", "ring", 2))
    look, calls = Look(), []
    for tokens in (3, 5):
        with ds_lvx.traffic() as traffic:
            words = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": 2}
            ds_lvx.generate(model, batch, stopping_criteria=[look], **words)
        calls.append(traffic.calls)
    wrong, ends_padded = [], batch["attention_mask"].clone()
    ends_padded[:, -1] = 0
    for given, words in (
        ({**batch, "attention_mask": ends_padded}, {}),
        (batch, {"output_hidden_states": True, "return_dict_in_generate": True}),
    ):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            ds_lvx.generate(model, given, max_new_tokens=2, **words)
        wrong.append(str(caught.value))
    with pytest.raises(RuntimeError) as drifted:
        ds_lvx.generate(model, batch, max_new_tokens=4, logits_processor=[own_choice])
    wrong.append(str(drifted.value))
    held = ds_lvx.shard_batch(batch, model=model)["input_ids"].shape
    session.close()
    return {"kept": set(look.kept), "held": held, "calls": calls[1] - calls[0], "wrong": wrong}


@pytest.mark.slow
def test_a_rank_keeps_its_own_keys_and_sends_one_message_a_layer_and_token() -> None:
    config = tiny_model().config.text_config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for answer in run_ranks(look_inside, 2):
        rows, tokens = answer["held"]
        assert answer["kept"] == {rows * tokens * numbers * 4}  # however many beams share them
        assert tokens <= left_padded()["input_ids"].shape[1] // 2 + 1
        assert answer["calls"] == 2 * config.num_hidden_layers
        assert "got padding at the end of sample 0" in answer["wrong"][0]
        assert "got output_hidden_states=True" in answer["wrong"][1]
        assert "the ranks disagree on new token 1 of each row" in answer["wrong"][2]
