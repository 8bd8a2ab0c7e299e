"""`launch/generate.py` answers what transformers answers in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from ds_lvx.models import FAMILIES
from ds_lvx.training import asking
from ds_lvx.training.asking import parse
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import (
    ROOT,
    one_process_answers,
    one_process_samples,
    write_config,
)
from tests.ranks import RankError, run_ranks

FRAMES, TOKENS = 3, 6


def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "launch" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> int:
    """The script's own main, on a rank of `tests.ranks`."""
    code: int = script().main(arguments)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_checkpoint(folder / "checkpoint")
    write_video(folder / "a.mp4", frames=9)
    write_image(folder / "a.png", (100, 40))
    samples = [
        chat(("video", "a.mp4"), ("text", "What animal?"), answer="A big rabbit."),
        chat(("image", "a.png"), ("text", "Where is it?"), answer="In a green meadow."),
    ]
    samples[1]["messages"] += chat(("text", "And now?"), answer="Gone.")["messages"]
    write_jsonl(folder / "chats.jsonl", *samples)
    write_config(folder / "ds.json", stage=0)
    return folder


def given(folder: Path, *more: object) -> list[str]:
    words: list[object] = ["--model", folder / "checkpoint", "--deepspeed_config"]
    words += [folder / "ds.json", "--frames", FRAMES, "--max_new_tokens", TOKENS]
    return [str(word) for word in (*words, *more, "--traceback")]


def expected(folder: Path, *, adapter: Path | None = None, data: str = "chats.jsonl") -> list[str]:
    """Of each line, what one process answers in the place of its last answer."""
    checkpoint = folder / "checkpoint"
    samples = one_process_samples(checkpoint, folder / data, frames=FRAMES)
    return one_process_answers(checkpoint, samples, tokens=TOKENS, adapter=adapter)


@pytest.mark.slow
def test_the_lines_of_a_file_are_answered(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    data = folder / "chats.jsonl"
    assert run_ranks(run, 2, *given(folder, "--data", data, "--output", out)) == [0, 0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["answer"] for record in records] == expected(folder)
    assert all(record["answer"] for record in records)
    assert [record["reference"] for record in records] == ["A big rabbit.", "Gone."]
    assert [record["question"] for record in records] == ["What animal?", "And now?"]
    assert records[1]["source"] == f"{data}:2"
    assert all(record["new_tokens"] <= TOKENS and record["seconds"] > 0 for record in records)


def run_with_a_bar(*arguments: str) -> tuple[int, list[Any]]:
    """The script, and what it tells a terminal of frames: how many, and whether it is silent."""
    bars = []

    def bar(pictures: Any, *, total: int, disable: bool | None, **_words: Any) -> Any:
        bars.append((total, disable))
        return pictures

    with mock.patch.object(asking, "tqdm", bar):
        return run(*arguments), bars


@pytest.mark.slow
def test_a_question_of_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answer.jsonl"
    words = ["--video", folder / "a.mp4", "--prompt", "What animal?", "--output", out]
    answers = run_ranks(run_with_a_bar, 2, *given(folder, *words))
    assert answers == [(0, [(2, None)]), (0, [(1, True)])]
    record = json.loads(out.read_text())
    assert record["answer"] == expected(folder)[0]
    assert record["reference"] is None


@pytest.mark.slow
def test_a_model_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    targets = FAMILIES.default().lora_targets
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "answer.jsonl"
    words = ["--video", folder / "a.mp4", "--prompt", "What animal?", "--output", out]
    assert run_ranks(run, 2, *given(folder, *words, "--adapter", tmp_path / "adapter")) == [0, 0]
    answer = json.loads(out.read_text())["answer"]
    assert answer == expected(folder, adapter=tmp_path / "adapter")[0]
    assert answer != expected(folder)[0], "the adapter does nothing"


def test_what_is_wrong_is_said_on_every_rank(folder: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(run, 2, *given(folder, "--video", "no.mp4", "--prompt", "What?"))
    assert all("--prompt:1: " in text for text in caught.value.errors.values())
    assert len(caught.value.errors) == 2
    for asked in (["--chat"], ["--prompt", "What?"]):  # before the model is loaded
        with pytest.raises(ValueError, match="no such file"):
            script().read(parse(given(folder, "--video", "no.mp4", *asked)), 2)
    with pytest.raises(ValueError, match=r"got 3 ranks and ds_lvx\.sequence_parallel_size 2"):
        script().read(parse(given(folder, "--prompt", "What?")), 3)
    for words in (
        *(["--prompt", "a", "--data", "b"], ["--image", "a"], ["--data", "b", "--video"]),
        ["--prompt", "a", "--frames", "2", "--max_frames", "2"],
        *(["--prompt", "a", f"--{name}", "0"] for name in ("fps", "frames", "max_new_tokens")),
    ):
        with pytest.raises(SystemExit):
            parse(["--model", "tiny", "--deepspeed_config", "c", *words])


# ---- several questions


def run_chat(typed: str, *arguments: str) -> int:
    """The script on a rank whose standard input has some lines."""
    reading, writing = os.pipe()
    os.write(writing, typed.encode())
    os.close(writing)
    with open(reading) as lines, mock.patch.object(sys, "stdin", lines):
        return run(*arguments)


def fresh(folder: Path, turns: list[tuple[str, str]]) -> str:
    """What one process answers to the whole conversation, everything encoded anew."""
    first, *others = turns
    sample = chat(("video", "a.mp4"), ("text", first[0]), answer=first[1])
    for asked, answer in others:
        sample["messages"] += chat(("text", asked), answer=answer)["messages"]
    sample["messages"][-1]["content"] = "?"
    write_jsonl(folder / "chat.jsonl", sample)
    return expected(folder, data="chat.jsonl")[0]


@pytest.mark.slow
def test_a_chat_answers_as_whole_conversations_do(folder: Path, tmp_path: Path) -> None:
    out, asked = (
        tmp_path / "answers.jsonl",
        ["What animal?\nHow many?", "Where is it?", "And now?"],
    )
    typed = f"{asked[1]}\n\n{'too long ' * 300}\n{asked[2]}"
    words = ["--video", folder / "a.mp4", "--chat", "--prompt", asked[0], "--output", out]
    assert run_ranks(run_chat, 2, typed, *given(folder, *words)) == [0, 0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question"] for record in records] == asked
    turns: list[tuple[str, str]] = []
    for record in records:
        turns.append((record["question"], "?"))
        assert record["answer"] == fresh(folder, turns), turns
        turns[-1] = record["question"], record["answer"]
