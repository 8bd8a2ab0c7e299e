"""TRL's ``SFTTrainer``, its vision collator and all, trains sharded as it does alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers
from PIL import Image

from ds_lvx.models.mllama.tiny import build, tiny_config, tiny_processor
from ds_lvx.trainer import TrainerMixin
from tests.models.mllama_case import trained, weights
from tests.ranks import run_ranks
from tests.test_trainer import Recorder, assert_same, config_of, forget_state

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
# As `tiny_processor`'s, with what the assistant says marked for `assistant_only_loss`.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|eot_id|>{% endgeneration %}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class SFT(TrainerMixin, trl.SFTTrainer):
    """All that a script changes."""


def rows() -> Any:
    """Chats with one to three images, and answers of unequal length."""
    answers = ["Red.", "It is green now.", "Blue, and then red again.", "No."]
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "Which colour?"},
                    {"role": "assistant", "content": answer},
                ],
                "images": [
                    Image.new("RGB", (28, 28), (80 * n, 60 * i, 90)) for i in range(1 + n % 3)
                ],
            }
            for n, answer in enumerate(answers)
        ]
    )


def fine_tune(
    kind: type[Any],
    folder: Path,
    tiny: Path,
    config: dict[str, Any] | None = None,
    *,
    answers_only: bool,
) -> dict[str, Any]:
    """TRL's usual script; what was logged, and the weights."""
    forget_state()
    if config is not None:
        deepspeed.init_distributed("gloo")
    args = trl.SFTConfig(
        str(folder),
        use_cpu=True,
        deepspeed=copy.deepcopy(config),
        assistant_only_loss=answers_only,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=0.05,
        max_grad_norm=0.5,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    record = Recorder()
    trainer = kind(
        model=transformers.MllamaForConditionalGeneration.from_pretrained(tiny),
        args=args,
        train_dataset=rows(),
        processing_class=transformers.AutoProcessor.from_pretrained(tiny),
        callbacks=[record],
    )
    trainer.train()
    logs = [log for log in record.logs if "loss" in log]
    alone = config is None
    found = {
        "losses": [log["loss"] for log in logs],
        "rates": [log["learning_rate"] for log in logs],
        "logged": [[log[name] for name in LOGGED] for log in logs],
        "metrics": {},
        "weights": (
            {name: p.detach().clone() for name, p in trained(trainer.model)}
            if alone
            else weights(trainer.model_wrapped)
        ),
    }
    if not alone:
        trainer.accelerator.free_memory()
    forget_state()
    return found


def write_tiny(folder: Path) -> Path:
    """A checkpoint of the tiny model, with `TEMPLATE`."""
    processor = tiny_processor()
    processor.chat_template = TEMPLATE
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    model = build(tiny_config(len(processor.tokenizer) - 1), gate=0.5, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("stage", "answers_only"), [(2, False), pytest.param(3, True, marks=pytest.mark.exhaustive)]
)
def test_sft_on_two_ranks_has_the_losses_of_one_process(
    stage: int, answers_only: bool, tiny: Path, tmp_path: Path
) -> None:
    how = {"answers_only": answers_only}
    alone = fine_tune(trl.SFTTrainer, tmp_path / "alone", tiny, **how)
    assert len({round(loss, 3) for loss in alone["losses"]}) == 3
    for found in run_ranks(fine_tune, 2, SFT, tmp_path, tiny, config_of(stage), **how):
        assert_same(found, alone)
        for got, expected in zip(found["logged"], alone["logged"], strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
