"""TRL's ``DPOTrainer``, its collator and reference model, trains sharded as it does alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import transformers
from PIL import Image

from ds_lvx.models.mllama.whole_masks import WholeMasks
from ds_lvx.trainer import TrainerMixin
from tests.models.mllama_case import trained, weights
from tests.ranks import run_ranks
from tests.test_trainer import Recorder, assert_same, config_of, forget_state

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tests.test_trl import write_tiny  # noqa: E402

# What TRL makes of log-probabilities, logits and counts of the whole text.
LOGGED = (
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
    *(f"{what}/{of}" for what in ("logps", "logits", "rewards") for of in ("chosen", "rejected")),
    "rewards/margins",
)


class DPO(TrainerMixin, trl.DPOTrainer):
    """All that a script changes."""


def rows() -> Any:
    """Preferences with one or two images, and answers of unequal length."""
    pairs = [("Red.", "It is green."), ("Green, I think.", "No."), ("Blue.", "Red, and blue.")]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Which colour?" + "?" * n}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "images": [
                    Image.new("RGB", (28, 28), (80 * n, 60 * i, 90)) for i in range(1 + n % 2)
                ],
            }
            for n, (chosen, rejected) in enumerate(pairs)
        ]
    )


def mllama(folder: Path) -> dict[str, Any]:
    """What a script gives the trainer beside its arguments."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    collator = trl.trainer.dpo_trainer.DataCollatorForVisionPreference(processor)
    return {
        "model": transformers.MllamaForConditionalGeneration.from_pretrained(folder),
        "data_collator": WholeMasks(collator, processor),
        "train_dataset": rows(),
        "eval_dataset": rows(),
        "processing_class": processor,
    }


def prefer(
    kind: type[Any],
    folder: Path,
    model: Path,
    config: dict[str, Any] | None = None,
    *,
    make: Callable[[Path], dict[str, Any]] = mllama,
) -> dict[str, Any]:
    """TRL's usual script; what was logged, and the weights."""
    forget_state()
    if config is not None:
        deepspeed.init_distributed("gloo")
    args = trl.DPOConfig(
        str(folder),
        use_cpu=True,
        deepspeed=copy.deepcopy(config),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=3,
        beta=0.5,
        learning_rate=0.02,
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
    trainer = kind(args=args, callbacks=[record], **make(model))
    trainer.train()
    logs = [log for log in record.logs if "loss" in log]
    alone = config is None
    found = {
        "losses": [log["loss"] for log in logs],
        "rates": [log["learning_rate"] for log in logs],
        "logged": [[log[name] for name in LOGGED] for log in logs],
        "metrics": next(log for log in record.logs if "eval_loss" in log),
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


def assert_same_preferences(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert len({round(loss, 3) for loss in alone["losses"]}) == 3
    assert_same(found, alone)
    for got, expected in zip(found["logged"], alone["logged"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name in ("eval_rewards/margins", "eval_logps/chosen"):
        expected = alone["metrics"][name]  # a margin is a difference of sums of logarithms
        assert found["metrics"][name] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("stage", "shares"),
    [
        (2, False),
        pytest.param(3, False, marks=pytest.mark.exhaustive),
        pytest.param(3, True, marks=pytest.mark.exhaustive),
    ],
)
def test_dpo_on_two_ranks_has_the_losses_of_one_process(
    stage: int, shares: bool, tiny: Path, tmp_path: Path
) -> None:
    alone, config = prefer(trl.DPOTrainer, tmp_path / "alone", tiny), config_of(stage)
    config["ds_lvx"]["share_prefixes"] = shares
    for found in run_ranks(prefer, 2, DPO, tmp_path, tiny, config):
        assert_same_preferences(found, alone)
