"""Generating on several ranks is transformers' generate in one process: tokens and logits."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, StoppingCriteria

import ds_lvx
from ds_lvx.models.generating.decoding import Decoding
from ds_lvx.sharding import mean_loss
from tests.elsewhere import ElsewhereByDefault
from tests.generation_case import LVX, blind, config, interleaved, one_image, text_alone
from tests.models.mllama_case import (
    PATCHES,
    TILES,
    Batch,
    ds_config,
    end_engine,
    lora_model,
    start_engine,
    tiny_model,
)
from tests.ranks import DEVICE, run_ranks

SEED = 5
CROSS_LAYERS, SELF_LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 2, 2, 4, 8


# --------------------------------------------------------------------------------------------
# The same as one process


@dataclass(frozen=True)
class Case:
    """A batch, and arguments of generate."""

    batch: Batch
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self) -> Batch:
        return {key: value for key, value in self.batch.items() if key != "labels"}

    def keywords(self) -> dict[str, Any]:
        return {
            "max_new_tokens": 5,
            "return_dict_in_generate": True,
            "output_logits": True,
            "output_scores": True,
            **self.arguments,
        }


class Next(LogitsProcessor):
    """Every token takes the score of the one before."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(1, dims=-1)


class Unequally(StoppingCriteria):
    """Each row ends a token before the row above."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.arange(len(input_ids), device=input_ids.device) + input_ids.shape[1] >= 17


def cases() -> dict[str, Case]:
    sampled = {"do_sample": True, "top_k": 0, "temperature": 1.5}
    made = {
        "greedy": Case(interleaved()),
        "sampled": Case(interleaved(), sampled),
        "several": Case(blind(), {**sampled, "num_return_sequences": 2}),
        "beams": Case(interleaved(), {"num_beams": 3, "num_return_sequences": 2}),
        "blind": Case(blind(), {"no_repeat_ngram_size": 2}),
        "one image": Case(one_image(), {"generation_config": GenerationConfig(min_new_tokens=5)}),
        "text alone": Case(text_alone()),
        "one token": Case(one_image(), {"max_new_tokens": 1}),
        "own": Case(
            interleaved(),
            {
                "logits_processor": [Next()],
                "stopping_criteria": [Unequally()],
                "pad_token_id": 0,
                "output_hidden_states": True,
            },
        ),
        "sampled beams": Case(one_image(), {**sampled, "num_beams": 2}),
    }
    # Each kind of device has random numbers of its own.
    return {n: c for n, c in made.items() if DEVICE == "cpu" or "do_sample" not in c.arguments}


@functools.cache
def reference() -> dict[str, dict[str, Any]]:
    model = tiny_model().eval()
    results = {}
    for name, case in cases().items():
        torch.manual_seed(SEED)
        results[name] = plain(model.generate(**case.inputs(), **case.keywords()))
        results[name]["next random number"] = torch.rand(())
    return results


def plain(output: Any) -> dict[str, Any]:
    names = ("sequences", "logits", "scores", "sequences_scores", "beam_indices", "hidden_states")
    return {key: output[key] for key in names if key in output}


def generate_each(each: dict[str, Case], sp_size: int) -> dict[str, dict[str, Any]]:
    model = tiny_model()
    session = ds_lvx.apply(model, config(sp_size))
    rank = session.groups.sp_rank
    results = {}
    for name, case in each.items():
        torch.manual_seed(SEED + rank)  # those of the first rank count
        with ElsewhereByDefault():
            result = ds_lvx.generate(model, case.batch, **case.keywords())
        results[name] = plain(result)
        results[name]["next random number"] = torch.rand(())
    session.close()
    assert model.training, "the model's mode has changed"
    return results


@pytest.mark.parametrize(
    "ranks",
    [2, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (1, 3))],
)
@pytest.mark.slow
def test_generating_equals_one_process(ranks: int) -> None:
    answers = run_ranks(generate_each, ranks, cases(), ranks)
    for name, expected in reference().items():
        for rank, answer in enumerate(answers):
            found = dict(answer[name])
            number, exact = found.pop("next random number"), dict(expected)
            if rank == 0:  # as it is after transformers' own
                assert number == exact["next random number"], name
            elif "do_sample" in cases()[name].arguments:  # as if it had not been called
                assert number == torch.rand((), generator=torch.manual_seed(SEED + rank)), name
            del exact["next random number"]
            torch.testing.assert_close(
                found, exact, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_reference_depends_on_the_images() -> None:
    """Else the comparisons above compare nothing."""
    case = cases()["greedy"]
    inputs = {**case.inputs(), "pixel_values": case.batch["pixel_values"].flip(1)}
    other = tiny_model().eval().generate(**inputs, **case.keywords())
    assert (other.logits[0] - reference()["greedy"]["logits"][0]).abs().max() > 1e-2


def own_frames(batch: Batch) -> Batch:
    mine = ds_lvx.owned(batch["pixel_values"].shape[1])
    keys = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return {**batch, **{key: batch[key][:, mine.start : mine.stop] for key in keys}}


def generate_with_an_engine(stage: int) -> dict[str, Any]:
    """Between two steps of training, with each rank's own frames."""
    engine = start_engine(ds_config(stage=stage, sp_size=2, cross=LVX, self_attn="ulysses"))
    batch = interleaved()
    result = {"before": ds_lvx.generate(engine, batch, max_new_tokens=5)}
    out = engine(**ds_lvx.shard_batch(batch, model=engine.module))
    engine.backward(out.loss)
    result["loss"] = mean_loss(out.loss).item()
    result["between"] = ds_lvx.generate(engine, batch, max_new_tokens=5, num_beams=2)
    engine.step()
    local = own_frames(batch)
    result["after"] = ds_lvx.generate(engine, local, frames="local", max_new_tokens=5)
    end_engine(engine)
    return result


@functools.cache
def trained_reference() -> dict[str, Any]:
    model, batch = tiny_model(), interleaved()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result: dict[str, Any] = {"before": model.generate(**inputs, max_new_tokens=5)}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    result["loss"] = loss.item()
    result["between"] = model.generate(**inputs, max_new_tokens=5, num_beams=2)
    optimizer.step()
    result["after"] = model.generate(**inputs, max_new_tokens=5)
    return result


@pytest.mark.parametrize(
    "stage",
    [
        1,
        pytest.param(3, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 2)),
    ],
)
def test_an_engine_generates_between_steps(stage: int) -> None:
    for answer in run_ranks(generate_with_an_engine, 2, stage):
        torch.testing.assert_close(answer, trained_reference(), atol=1e-5, rtol=1e-5)


RULES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # of cross-attention and of the text: how they train is no matter
    ({"method": "ring"}, {"method": "ring"}),
    ({"method": "lvx", "recompute_kv": True}, {"method": "lvx", "recompute_kv": True}),
    ({**LVX, "recompute_kv": True, "features": "offload"}, {"method": "ulysses"}),
]


def generate_by_rules(batch: Batch) -> list[Tensor]:
    found = []
    for cross, text in RULES:
        rules = config(2)
        rules["ds_lvx"]["layers"][1] |= cross
        rules["ds_lvx"]["layers"][2] |= text
        model = lora_model()
        session = ds_lvx.apply(model, rules)
        found.append(ds_lvx.generate(model, batch, max_new_tokens=5))
        session.close()
    return found


@pytest.mark.slow
def test_methods_of_training_and_adapters_change_nothing() -> None:
    case = Case(interleaved())
    expected = lora_model().eval().generate(**case.inputs(), max_new_tokens=5)
    plain_model = tiny_model().eval().generate(**case.inputs(), max_new_tokens=5)
    assert not torch.equal(expected, plain_model), "the adapters do nothing"
    for answer in run_ranks(generate_by_rules, 2, case.batch):
        for found in answer:
            assert torch.equal(found, expected), (found, expected)


def generate_in_replicas() -> Tensor:
    """One replica has no image and ends first: under ZeRO-3 it takes part to the other's end."""
    engine = start_engine(ds_config(stage=3, sp_size=2, cross=LVX, self_attn="ulysses"))
    first = engine.ds_lvx.groups.dp_rank == 0
    batch, tokens = (text_alone(), 3) if first else (interleaved(), 6)
    found: Tensor = ds_lvx.generate(engine, batch, max_new_tokens=tokens)
    end_engine(engine)
    return found


@pytest.mark.slow
def test_replicas_generate_side_by_side() -> None:
    model = tiny_model().eval()
    for rank, found in enumerate(run_ranks(generate_in_replicas, 4)):
        case, tokens = (Case(text_alone()), 3) if rank < 2 else (Case(interleaved()), 6)
        assert torch.equal(found, model.generate(**case.inputs(), max_new_tokens=tokens)), rank


# --------------------------------------------------------------------------------------------
# What is kept, and what travels


class Look(StoppingCriteria):
    """Counts the bytes that the generation holds; never stops."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        found = [each for each in gc.get_objects() if isinstance(each, Decoding)]
        tensors = [t for each in found for kv in each.keys.by_layer.values() for t in kv]
        self.kept.append(sum(t.untyped_storage().nbytes() for t in tensors))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def count_bytes(batch: Batch, beams: int, text_keys: str) -> dict[str, Any]:
    model = tiny_model()
    session = ds_lvx.apply(model, config(2))
    look, sent = Look(), {}
    for tokens in (3, 5):
        with ds_lvx.traffic() as traffic:
            ds_lvx.generate(
                model,
                batch,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                num_beams=beams,
                text_keys=text_keys,
                stopping_criteria=[look],
            )
        sent[tokens] = traffic.calls, traffic.bytes_sent
    session.close()
    gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Decoding)]
    return {"kept": set(look.kept), "sent": sent, "left": len(left)}


@pytest.mark.parametrize(("beams", "text_keys"), [(1, "auto"), (3, "auto"), (3, "sharded")])
def test_a_rank_keeps_its_own_keys_and_sends_one_message_a_layer_and_token(
    beams: int, text_keys: str
) -> None:
    answers = run_ranks(count_bytes, 2, interleaved(), beams, text_keys)
    samples, images, text = 2, (2, 1), (7, 6)
    sharded = text_keys == "sharded"
    layers = CROSS_LAYERS + SELF_LAYERS * sharded
    for answer, mine, words in zip(answers, images, text, strict=True):
        tokens = CROSS_LAYERS * mine * TILES * PATCHES + SELF_LAYERS * words * sharded
        # However many rows share them.
        assert answer["kept"] == {2 * samples * tokens * KV_HEADS * HEAD_DIM * 4}
        (calls, sent), (more_calls, more) = answer["sent"][3], answer["sent"][5]
        assert more_calls - calls == 2 * layers
        rows = samples * beams
        part = rows * HEADS * (4 * HEAD_DIM + 4)
        numbers = -(-8 * (rows + 1) // 16) * 16
        assert more - sent == 2 * (layers * part + numbers)
        assert answer["left"] == 0
