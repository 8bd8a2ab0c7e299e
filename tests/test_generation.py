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
from ds_lvx.models.decoding import Decoding
from ds_lvx.models.patch import is_patched
from ds_lvx.sharding import mean_loss
from tests.models.mllama_case import (
    PATCHES,
    TILES,
    Batch,
    ds_config,
    end_engine,
    lora_model,
    make_batch,
    start_engine,
    tiny_model,
)
from tests.ranks import run_ranks

LVX = {"method": "lvx"}
SEED = 5
CROSS_LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 2, 4, 8


def config(sp_size: int, **settings: Any) -> dict[str, Any]:
    return {**ds_config(stage=0, sp_size=sp_size, cross=LVX, self_attn="ulysses"), **settings}


# --------------------------------------------------------------------------------------------
# The same as one process


def interleaved() -> Batch:
    """Two samples with three images and one, padded on the left, text before the first image."""
    batch = make_batch([[4, 5, 9], [8]], length=13, num_tiles=[[2, 1, 2], [1]])
    batch["attention_mask"][1, :5] = 0
    batch["input_ids"][1, :5] = 0
    return batch


def blind() -> Batch:
    """A sample without images beside one with two: its tokens see no image, new ones neither."""
    batch = make_batch([[2, 5], []], length=8, num_tiles=[[1, 2], []], seed=3)
    batch["attention_mask"][0, :2] = 0
    return batch


def one_image() -> Batch:
    return make_batch([[1]], length=5, num_tiles=[[2]], seed=4)


def text_alone() -> Batch:
    batch = interleaved()
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


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


def cases() -> dict[str, Case]:
    sampled = {"do_sample": True, "top_k": 0, "temperature": 1.5}
    return {
        "greedy": Case(interleaved()),
        "sampled": Case(interleaved(), sampled),
        "several": Case(blind(), {**sampled, "num_return_sequences": 2}),
        "beams": Case(interleaved(), {"num_beams": 3, "num_return_sequences": 2}),
        "blind": Case(blind(), {"repetition_penalty": 1.3}),
        "one image": Case(one_image(), {"generation_config": GenerationConfig(min_new_tokens=5)}),
        "text alone": Case(text_alone()),
        "one token": Case(one_image(), {"max_new_tokens": 1}),
        "sampled beams": Case(one_image(), {**sampled, "num_beams": 2}),
    }


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
    return {
        key: output[key]
        for key in ("sequences", "logits", "scores", "sequences_scores", "beam_indices")
        if key in output
    }


def generate_each(each: dict[str, Case], sp_size: int) -> dict[str, dict[str, Any]]:
    model = tiny_model()
    session = ds_lvx.apply(model, config(sp_size))
    rank = session.groups.sp_rank
    results = {}
    for name, case in each.items():
        torch.manual_seed(SEED + rank)  # those of the first rank count
        result = ds_lvx.generate(model, case.batch, **case.keywords())
        results[name] = plain(result)
        results[name]["next random number"] = torch.rand(())
    session.close()
    assert model.training, "the model's mode has changed"
    return results


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(1, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("stage", [1, 3])
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
        tensors = [t for each in found for kv in each.keys.values() for t in kv]
        self.kept.append(sum(t.untyped_storage().nbytes() for t in tensors))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def count_bytes(batch: Batch, beams: int) -> dict[str, Any]:
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
                stopping_criteria=[look],
            )
        sent[tokens] = traffic.calls, traffic.bytes_sent
    session.close()
    gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Decoding)]
    return {"kept": set(look.kept), "sent": sent, "left": len(left)}


@pytest.mark.parametrize("beams", [1, 3])
def test_a_rank_keeps_its_own_keys_and_sends_one_message_a_layer_and_token(beams: int) -> None:
    answers = run_ranks(count_bytes, 2, interleaved(), beams)
    samples, images = 2, (2, 1)
    for answer, mine in zip(answers, images, strict=True):
        tokens = mine * TILES * PATCHES
        # However many rows share them.
        assert answer["kept"] == {2 * CROSS_LAYERS * samples * tokens * KV_HEADS * HEAD_DIM * 4}
        (calls, sent), (more_calls, more) = answer["sent"][3], answer["sent"][5]
        assert more_calls - calls == 2 * CROSS_LAYERS
        rows = samples * beams
        part = rows * HEADS * (4 * HEAD_DIM + 4)
        numbers = -(-8 * (rows + 1) // 16) * 16
        assert more - sent == 2 * (CROSS_LAYERS * part + numbers)
        assert answer["left"] == 0


# --------------------------------------------------------------------------------------------
# Ranks that go apart


class On(LogitsProcessor):
    """Does something on one rank when it chooses the token of a number."""

    def __init__(self, rank: int, token: int, prompt: int, error: Exception | None = None) -> None:
        self.here = torch.distributed.get_rank() == rank
        self.length, self.error = prompt + token - 1, error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.here or input_ids.shape[1] != self.length:
            return scores
        if self.error is not None:
            raise self.error
        return scores.roll(1, dims=-1)


class StopOn(StoppingCriteria):
    """Ends the generation on one rank before the others."""

    def __init__(self, rank: int, length: int) -> None:
        self.here, self.length = torch.distributed.get_rank() == rank, length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ends = self.here and input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), ends)


class Broken:
    """A streamer that cannot write."""

    def put(self, value: Tensor) -> None:
        raise OSError("no space left")

    def end(self) -> None: ...


class Stream:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.got.append("end")


def go_apart() -> dict[str, str]:
    model, batch = tiny_model(), one_image()
    session = ds_lvx.apply(model, config(2))
    length = batch["input_ids"].shape[1]
    wrong: dict[str, dict[str, Any]] = {
        "token": {"logits_processor": [On(1, 3, length)]},
        "last token": {"logits_processor": [On(1, 5, length)]},
        "end": {"stopping_criteria": [StopOn(0, length + 2)]},
        "failure": {"logits_processor": [On(1, 2, length, KeyError("a word"))]},
        "memory": {"logits_processor": [On(1, 2, length, MemoryError())]},
        "streamer": {"streamer": Broken()},
        "prompt": {"max_new_tokens": None, "max_length": length},
    }
    messages = {}
    for name, arguments in wrong.items():
        with pytest.raises(Exception) as caught:
            ds_lvx.generate(model, batch, **{"max_new_tokens": 5, "min_new_tokens": 5, **arguments})
        messages[name] = f"{type(caught.value).__name__}: {caught.value}"
    stream = Stream()
    done = ds_lvx.generate(model, batch, max_new_tokens=5, streamer=stream)
    expected = [*done.flatten().tolist(), "end"] if session.groups.sp_rank == 0 else []
    assert stream.got == expected, (stream.got, expected)
    session.close()
    return messages


def test_ranks_that_go_apart_stop_with_the_token() -> None:
    first, second = run_ranks(go_apart, 2)
    for name, expected in {
        "token": "RuntimeError: ds_lvx.generate: the ranks disagree on new token 3 of each row: [",
        "last token": "RuntimeError: ds_lvx.generate: the ranks return different sequences;",
        "end": "RuntimeError: ds_lvx.generate: rank 0 ended where others went on from new token 2;",
        "streamer": "ValueError: rank 0: no space left",
        "prompt": "ValueError: all ranks: Input length of input_ids is 5, but `max_length`",
    }.items():
        assert first[name].startswith(expected), first[name]
        assert second[name] == first[name]
    assert first["failure"] == (
        "RuntimeError: ds_lvx.generate: rank 1 failed at new token 2, and so the others stop as "
        "well; its own error says why"
    )
    assert second["failure"] == "KeyError: 'a word'"
    assert second["memory"].startswith("RankOutOfMemoryError: rank 1 (rank 1 of the 2 that share")
    assert "ran out of memory in ds_lvx.generate: " in second["memory"]
    assert "rank 1 " in first["memory"]


# --------------------------------------------------------------------------------------------
# Mistakes


def mistakes() -> dict[str, str]:
    rank, batch = torch.distributed.get_rank(), one_image()
    model = tiny_model()
    session = ds_lvx.apply(model, config(2))
    other = tiny_model() if rank == 0 else model
    wrong: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "unpatched": (other, batch, {}),
        "no model": ("mllama" if rank == 0 else model, batch, {}),
        "another model": (torch.nn.Linear(1, 1) if rank == 0 else model, batch, {}),
        "no batch": (model, [batch], {}),
        "no cache": (model, batch, {"use_cache": False}),
        "cache": (model, batch, {"cache_implementation": "static"}),
        "config": (model, batch, {"generation_config": GenerationConfig(use_cache=False)}),
        "assisted": (model, batch, {"prompt_lookup_num_tokens": 3}),
        "input": (model, batch, {"pixel_values": batch["pixel_values"]}),
        "differ": (model, batch, {"max_new_tokens": 4 + rank}),
        "frames": (model, batch, {"frames": "own"}),
        "missing frame": (model, {**batch, "frame_times": 1} if rank else batch, {}),
        "text": (model, {**batch, "input_ids": batch["input_ids"] + rank}, {}),
        "local": (model, batch, {"frames": "local"}),
        "argument": (model, batch, {"max_new_token": 3}),
    }
    messages = {}
    for name, (asked, given, arguments) in wrong.items():
        with pytest.raises(Exception) as caught:
            ds_lvx.generate(asked, given, **{"max_new_tokens": 3, **arguments})
        messages[name] = f"{type(caught.value).__name__}: {caught.value}"
    session.close()
    return messages


def test_mistakes_are_named_on_every_rank() -> None:
    first, second = run_ranks(mistakes, 2)
    assert first == second
    for name, expected in {
        "unpatched": "ValueError: rank 0: got a model that ds_lvx has not patched; call ds_lvx.",
        "no model": "ValueError: rank 0: got a model of type str; expected a torch.nn.Module that",
        "another model": "NotImplementedError: rank 0: got a model of class Linear; expected one",
        "no batch": "ValueError: all ranks: got a batch of type list; expected what the processor",
        "no cache": "NotImplementedError: all ranks: got use_cache=False for generation",
        "cache": "NotImplementedError: all ranks: got cache_implementation='static' for",
        "config": "NotImplementedError: all ranks: got use_cache=False for generation",
        "assisted": "NotImplementedError: all ranks: got prompt_lookup_num_tokens=3 for",
        "input": "ValueError: all ranks: got pixel_values among the arguments of generate;",
        "differ": "ValueError: ds_lvx.generate: the ranks disagree on the arguments of generate: "
        "got max_new_tokens=4 on rank 0, max_new_tokens=5 on rank 1",
        "frames": "ValueError: all ranks: got frames='own'; expected",
        "missing frame": "ValueError: rank 1: got 'frame_times' in the batch; expected",
        "text": "ValueError: ds_lvx.generate: the ranks disagree on contents of the text",
        "local": "ValueError: got cross_attention_mask for 1 images a sample, and 2 images;",
        "argument": "ValueError: all ranks: The following `model_kwargs` are not used by the model",
    }.items():
        assert first[name].startswith(expected), first[name]


def apply_and_close() -> None:
    model = tiny_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="methodd"):
        ds_lvx.apply(model, config(2, ds_lvx={"layers": [{"match": "*", "methodd": "lvx"}]}))
    with pytest.raises(ValueError, match="model of type str"):
        ds_lvx.apply("model", config(2))  # type: ignore[arg-type]
    groups = ds_lvx.SequenceParallelGroups(1)
    with pytest.raises(ValueError, match=r"got groups of 1 ranks for .*size 2"):
        ds_lvx.apply(model, config(2), groups=groups)
    groups.close()
    groups = ds_lvx.SequenceParallelGroups(2)
    session = ds_lvx.apply(model, {"ds_lvx": config(2)["ds_lvx"]}, groups=groups)
    with pytest.raises(ValueError, match="patched already"):
        ds_lvx.apply(model, config(2), groups=groups)
    batch = one_image()
    loss = mean_loss(model(**ds_lvx.shard_batch(batch, model=model)).loss)
    torch.testing.assert_close(loss, tiny_model()(**batch).loss.detach(), atol=1e-5, rtol=1e-5)
    assert session.groups is groups
    session.close()
    session.close()
    assert ds_lvx.SequenceParallelGroups.current() is groups
    groups.close()
    assert not is_patched(model)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert after.keys() == before.keys()
    for name, values in before.items():
        assert after[name].keys() == values.keys(), name


def test_apply_patches_a_model_and_gives_it_back() -> None:
    run_ranks(apply_and_close, 2)
