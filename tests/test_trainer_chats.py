"""A Trainer takes chats as `launch/finetune.py` does: the loss of whole samples in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from ds_lvx.data.chat import Chats
from ds_lvx.data.chosen import FrameRate
from ds_lvx.data.collate import ChatCollator
from ds_lvx.trainer import Trainer
from tests.data.formats_case import own, turns, write_media
from tests.data.media import write_jsonl
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import one_process_loss, one_process_samples
from tests.models.test_packing import write_samples
from tests.ranks import run_ranks
from tests.test_trainer import Recorder, config_of, forget_state, token_accuracy


def first_loss(folder: Path, data: str) -> float:
    """The loss that is logged of one step of two samples, one after the other."""
    import deepspeed

    forget_state()
    deepspeed.init_distributed("gloo")
    args = transformers.TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        deepspeed=config_of(2),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = transformers.MllamaForConditionalGeneration.from_pretrained(folder / "checkpoint")
    processor = transformers.AutoProcessor.from_pretrained(folder / "checkpoint")
    record = Recorder()
    trainer: Any = Trainer(
        model=model,
        args=args,
        train_dataset=Chats(folder / data),
        data_collator=ChatCollator(processor, model, rate=FrameRate(count=5)),
        callbacks=[record],
    )
    trainer.train()
    trainer.accelerator.free_memory()
    forget_state()
    return next(log["loss"] for log in record.logs if "loss" in log)


def packed(folder: Path, pack: int | None) -> list[dict[str, float]]:
    """What is logged of two replicas of three samples each, whose rows are unequally many."""
    import deepspeed

    forget_state()
    deepspeed.init_distributed("gloo")
    args = transformers.TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        deepspeed=config_of(2, sp_size=1),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        max_steps=1,
        eval_strategy="steps",
        logging_steps=1,
        optim="sgd",
        learning_rate=0.05,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = transformers.MllamaForConditionalGeneration.from_pretrained(folder / "checkpoint")
    processor = transformers.AutoProcessor.from_pretrained(folder / "checkpoint")
    record, chats = Recorder(), Chats(folder / "d.jsonl")
    trainer: Any = Trainer(
        model=model,
        args=args,
        train_dataset=chats,
        eval_dataset=chats,
        data_collator=ChatCollator(processor, model, rate=FrameRate(count=3), pack=pack),
        compute_metrics=token_accuracy,
        callbacks=[record],
    )
    trainer.train()
    trainer.accelerator.free_memory()
    forget_state()
    names = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_size")
    return [{name: log[name] for name in names if name in log} for log in record.logs[:2]]


@pytest.mark.slow
def test_a_trainer_packs_and_evaluates_samples_apart(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    write_samples(tmp_path)
    (expected, _), found = (run_ranks(packed, 2, tmp_path, pack) for pack in (None, 150))
    assert {*expected[0]} == {"loss", "grad_norm"}
    assert len(expected[1]) == 3
    for each in found:
        assert each == [pytest.approx(log, abs=1e-5) for log in expected]


@pytest.mark.slow
def test_a_trainer_trains_on_chats(tmp_path: Path) -> None:
    folder = write_media(tmp_path)
    write_checkpoint(folder / "checkpoint")
    path = write_jsonl(
        folder / "own.jsonl", own(), own("<video>What animal is it?", videos=["c.mp4"])
    )
    llava = [turns(image="a.png"), turns("<video>What animal is it?", video="c.mp4")]
    write_jsonl(folder / "d.json", llava)
    samples = one_process_samples(folder / "checkpoint", path, frames=5)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    expected = one_process_loss(model, samples)
    assert run_ranks(first_loss, 2, folder, "d.json") == [pytest.approx(expected, abs=1e-5)] * 2
