"""Generation when ranks go apart, and what users get wrong: every rank says it, none hangs."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation import LogitsProcessor, StoppingCriteria

import ds_lvx
from ds_lvx.models.mllama.tiny import tiny_processor
from ds_lvx.models.patch import is_patched
from ds_lvx.sharding import mean_loss
from tests.generation_case import config, one_image
from tests.models.mllama_case import tiny_model
from tests.ranks import RankError, run_ranks

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
        "first token": {
            "logits_processor": [On(1, 1, length, KeyError("a word"))],
            "text_keys": "sharded",
        },
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
    expected = [*done.flatten().tolist(), "end"] if session.groups.sp_rank == 0 else ["end"]
    assert stream.got == expected, (stream.got, expected)
    session.close()
    return messages


@pytest.mark.slow
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
    assert second["failure"] == second["first token"] == "KeyError: 'a word'"
    assert first["first token"] == first["failure"].replace("token 2", "token 1")
    assert second["memory"].startswith("RankOutOfMemoryError: rank 1 (rank 1 of the 2 that share")
    assert "ran out of memory in ds_lvx.generate: " in second["memory"]
    assert "rank 1 " in first["memory"]


def read_streams() -> dict[str, tuple[str, str]]:
    """What another thread reads on every rank, and the error of the call."""
    model, batch, found = tiny_model(), one_image(), {}
    session, tokenizer = ds_lvx.apply(model, config(2)), tiny_processor().tokenizer
    fails = On(session.groups.sp_rank, 3, batch["input_ids"].shape[1], KeyError("a word"))
    wrong: dict[str, dict[str, Any]] = {
        "done": {},
        "refused": {"prefill_chunk_size": 2},
        "failed": {"logits_processor": [fails]},
    }
    for name, arguments in wrong.items():
        streamer, errors = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60), [""]

        def run(arguments: dict[str, Any], streamer: Any, errors: list[str]) -> None:
            try:
                ds_lvx.generate(model, batch, max_new_tokens=5, streamer=streamer, **arguments)
            except Exception as error:  # noqa: BLE001
                errors[0] = type(error).__name__

        thread = threading.Thread(target=run, args=(arguments, streamer, errors))
        thread.start()
        text = "".join(streamer)
        thread.join()
        found[name] = text, errors[0]
    session.close()
    return found


def test_who_reads_a_stream_hears_of_its_end() -> None:
    first, second = run_ranks(read_streams, 2)
    batch, tokenizer = one_image(), tiny_processor().tokenizer
    given = {key: value for key, value in batch.items() if key != "labels"}
    answer = tiny_model().eval().generate(**given, max_new_tokens=5)
    new = answer[0, batch["input_ids"].shape[1] :]
    assert first["done"] == (tokenizer.decode(new), "")
    assert second["done"] == ("", "")
    assert first["refused"] == second["refused"] == ("", "NotImplementedError")
    assert first["failed"] == (tokenizer.decode(new[:2]), "KeyError")
    assert second["failed"] == ("", "KeyError")


class Die(LogitsProcessor):
    """Kills the process of the second rank when it chooses its third token."""

    def __init__(self, prompt: int) -> None:
        self.length = prompt + 2

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.distributed.get_rank() == 1 and input_ids.shape[1] == self.length:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores


def generate_without_one() -> None:
    model, batch = tiny_model(), one_image()
    ds_lvx.apply(model, config(3))
    processor = Die(batch["input_ids"].shape[1])
    ds_lvx.generate(
        model, batch, min_new_tokens=60, max_new_tokens=60, logits_processor=[processor]
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(generate_without_one, 3)
    errors = caught.value.errors
    assert "exit code -9" in errors.pop(1)
    assert sorted(errors) == [0, 2]
    assert all("RuntimeError: " in error for error in errors.values()), errors


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
        "keys differ": (model, batch, {"text_keys": ("auto", "sharded")[rank]}),
        "keys": (model, batch, {"text_keys": "split"}),
        "states": (model, batch, {"text_keys": "sharded", "output_hidden_states": True}),
        "frames": (model, batch, {"frames": "own"}),
        "missing frame": (model, {**batch, "frame_times": 1} if rank else batch, {}),
        "text": (model, {**batch, "input_ids": batch["input_ids"] + rank}, {}),
        "local": (model, batch, {"frames": "local"}),
        "argument": (model, batch, {"max_new_token": 3}),
        "no sample": (model, {"input_ids": batch["input_ids"][:0]}, {}),
    }
    messages = {}
    for name, (asked, given, arguments) in wrong.items():
        with pytest.raises(Exception) as caught:
            ds_lvx.generate(asked, given, **{"max_new_tokens": 3, **arguments})
        messages[name] = f"{type(caught.value).__name__}: {caught.value}"
    model.generation_config.top_k = 3 + rank
    with pytest.raises(ValueError, match="generation_config") as caught:
        ds_lvx.generate(model, batch, max_new_tokens=3)
    messages["settings"] = f"{type(caught.value).__name__}: {caught.value}"
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
        "keys differ": "ValueError: ds_lvx.generate: the ranks disagree on the arguments of "
        "generate: got max_new_tokens=3, text_keys='auto' on rank 0, max_new_tokens=3, text_keys",
        "keys": "ValueError: all ranks: got text_keys='split'; expected one of auto,",
        "states": "NotImplementedError: all ranks: got output_hidden_states=True for a prompt",
        "frames": "ValueError: all ranks: got frames='own'; expected",
        "missing frame": "ValueError: rank 1: got 'frame_times' in the batch; expected",
        "text": "ValueError: ds_lvx.generate: the ranks disagree on contents of the text",
        "local": "ValueError: got cross_attention_mask for 1 images a sample, and 2 images;",
        "argument": "ValueError: all ranks: The following `model_kwargs` are not used by the model",
        "no sample": "ValueError: all ranks: got input_ids (0, 5); expected a sample at least,",
        "settings": "ValueError: ds_lvx.generate: the ranks disagree on the model's generation_con",
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
    with pytest.raises(ValueError, match=r"got groups of 1 rank for .*size 2"):
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
