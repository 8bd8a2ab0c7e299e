"""`ds_lvx.trainer.Seq2SeqTrainer` evaluates the answers that transformers' generates alone."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import transformers

from ds_lvx.trainer import Seq2SeqTrainer, Trainer
from tests.models.mllama_case import tiny_model
from tests.ranks import run_ranks
from tests.test_trainer import Recorder, config_of, forget_state, samples


def checksum(prediction: Any) -> dict[str, float]:
    """Of tokens: one that is another shows."""
    tokens = np.ascontiguousarray(prediction.predictions, dtype=np.int64)
    return {"tokens": float(zlib.crc32(tokens.tobytes())), "length": tokens.shape[1]}


def evaluate(
    kind: type[Any], folder: Path, tiny: Path, config: dict[str, Any] | None = None, batch: int = 2
) -> dict[str, Any]:
    """Train for two steps with an evaluation after each; then ask for other tokens."""
    forget_state()
    if config is not None:
        deepspeed.init_distributed("gloo")
    args = transformers.Seq2SeqTrainingArguments(
        str(folder),
        use_cpu=True,
        deepspeed=copy.deepcopy(config),
        predict_with_generate=True,
        generation_max_length=22,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=1,  # the mean loss is then that of replicas, too
        max_steps=2,
        learning_rate=0.05,
        optim="sgd",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = transformers.MllamaForConditionalGeneration.from_pretrained(tiny)
    model.config.pad_token_id = 0
    record = Recorder()
    trainer = kind(
        model=model,
        args=args,
        train_dataset=samples(),
        eval_dataset=samples()[:4],
        compute_metrics=checksum,
        callbacks=[record],
    )
    trainer.train()
    asked = trainer.predict(samples()[:4], max_new_tokens=3, num_beams=2)
    found = {
        "logs": [log for log in record.logs if "eval_loss" in log],
        "predictions": asked.predictions,
        "labels": asked.label_ids,
        "loss": asked.metrics["test_loss"],
    }
    if config is not None:
        trainer.accelerator.free_memory()
    forget_state()
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tiny: Path) -> dict[str, Any]:
    return evaluate(transformers.Seq2SeqTrainer, tiny / "alone", tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (2, 2),
        pytest.param(2, 3, marks=pytest.mark.exhaustive),
        pytest.param(4, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_answers_are_those_of_one_process(
    ranks: int, stage: int, alone: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    assert len({log["eval_tokens"] for log in alone["logs"]}) == 2, "training changes nothing"
    config, batch = config_of(stage), 4 // ranks
    for found in run_ranks(evaluate, ranks, Seq2SeqTrainer, tmp_path, tiny, config, batch):
        for got, expected in zip(found["logs"], alone["logs"], strict=True):
            assert got["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
            for name in ("eval_tokens", "eval_length"):
                assert got[name] == expected[name]
        np.testing.assert_array_equal(found["predictions"], alone["predictions"])
        np.testing.assert_array_equal(found["labels"], alone["labels"])
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_a_trainer_that_does_not_generate_says_so(tmp_path: Path) -> None:
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, predict_with_generate=True, report_to=[]
    )
    with pytest.raises(NotImplementedError, match=r"use ds_lvx\.trainer\.Seq2SeqTrainer"):
        Trainer(model=tiny_model(), args=args)
    forget_state()
