"""What `launch/finetune.py` leaves is read as its base is: by merging, by `ds-lvx parity`, by
`launch/generate.py`, by transformers."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ds_lvx.cli import main
from ds_lvx.compare.harness import Ranks
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.training import parity
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import arguments, finetune
from tests.launch.test_generate import run
from tests.ranks import run_ranks

METHODS = {"local": "none", "cross": "lvx", "self": "ulysses"}
MODULES = {"qwen": "qwen_vl", "blip-2": "blip", "instructblip": "blip", "instructblipvideo": "blip"}
OWN_CODE = ("moss_vl", "mplugowl3", "qwen")
OTHERS = [name for name in FAMILIES if name not in ("mllama", "mplugowl3")]
# What a repository has beside what is read here.
BESIDE = {
    "LICENSE": "terms",
    "processing_own.py": "# a processor",
    "preprocessor_own.json": "{}",
    "notes.jsonl": "{}",
    "model.safetensors.index.json": "{}",
}


def write_base(name: str, folder: Path) -> Path:
    """A checkpoint of a family, and two samples."""
    write = import_module(f"tests.models.test_{MODULES.get(name, name)}_files").write_checkpoint
    base: Path = write(folder, name) if MODULES.get(name) == "blip" else write(folder)
    for file, text in BESIDE.items():
        (base / file).write_text(text)
    return base


def write_config(name: str, path: Path) -> Path:
    """A ds_config for a family."""
    rules = [
        {"match": pattern, "method": METHODS[kind]}
        for kind, pattern in FAMILIES.named(name).patterns.items()
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "ds_lvx": {"sequence_parallel_size": 2, "layers": rules},
    }
    path.write_text(json.dumps(config))
    return path


def files(folder: Path) -> set[str]:
    """Names of all files, those of folders inside included."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if "__pycache__" not in path.parts}


def first_batch(folder: Path, base: Path, trusts: bool) -> Any:
    """A sample as a checkpoint's processor makes it."""
    source = Source.of(str(folder), trust_remote_code=trusts)
    encoder = TextEncoder(source.processor, source.max_length(None), family=source.family)
    maker = BatchMaker(encoder, FrameRate(count=3), owned=range)
    return dict(maker.batch(read_conversations(base / "train.jsonl")[:1]).inputs)


def in_the_pool(function: Any, request: Any, ranks: Ranks) -> list[Any]:
    """In place of processes of its own."""
    return run_ranks(function, ranks.count, request)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mplugowl3", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in OTHERS)]
)
def test_a_trained_folder_serves_as_its_base_does(name: str, tmp_path: Path) -> None:
    base, config = write_base(name, tmp_path / "base"), write_config(name, tmp_path / "ds.json")
    media = {"a.mp4", "a.png", "b.png", "train.jsonl", "notes.jsonl"}
    kept = files(base) - media - {"model.safetensors.index.json"}
    trusts = ["--trust_remote_code"] if name in OWN_CODE else []
    given = {"model": base, "data": base / "train.jsonl", "frames": 3, "max_steps": 1}
    given |= {"deepspeed_config": config, "learning_rate": 1e-2}
    lora = {"lora_r": 4, "lora_target_modules": "all-linear"}
    for kind, more in (("full", {}), ("lora", lora)):
        out = {"output_dir": tmp_path / kind, **more}
        run_ranks(finetune, 2, *arguments(**given, **out), *trusts)
    full, adapter, merged = tmp_path / "full" / "model", tmp_path / "lora" / "model", tmp_path / "m"
    words = ["merge", "--adapter", str(adapter), "--output", str(merged), *trusts]
    assert main(words) == 0

    for folder in (full, merged):
        assert files(folder) - {"chat_template.jinja"} == kept - {"chat_template.jinja"}
        if name != "qwen":  # whose tokenizer is code of its repository, which the base here lacks
            assert AutoTokenizer.from_pretrained(folder).chat_template
        # A family of this package's own classes has a config that transformers does not know.
        if FAMILIES.named(name).config_class() is None:
            AutoConfig.from_pretrained(folder, trust_remote_code=bool(trusts))
        batches = [first_batch(each, base, bool(trusts)) for each in (base, folder)]
        torch.testing.assert_close(*batches)
    assert {"model.safetensors", "config.json"}.isdisjoint(files(adapter))

    answers = []
    for where in (["--model", full], ["--model", adapter], ["--model", merged]):
        out = tmp_path / "answers.jsonl"
        words = [*where, *trusts, "--deepspeed_config", config, "--frames", 3, "--output", out]
        words += ["--max_new_tokens", 6, "--video", base / "a.mp4", "--prompt", "What animal?"]
        assert run_ranks(run, 2, *map(str, words), "--traceback") == [0, 0]
        answers.append(json.loads(out.read_text())["answer"])
    assert answers[1] == answers[2]

    words = ["parity", "--model", str(full), "--data", str(base / "train.jsonl"), "--steps", "1"]
    with mock.patch.object(parity, "on_ranks", in_the_pool):
        assert main([*words, "--", "--frames", "3", *trusts]) == 0
