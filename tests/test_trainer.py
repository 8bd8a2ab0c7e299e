"""`ds_lvx.trainer.Trainer` trains, evaluates, saves and resumes as transformers' does alone."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ds_lvx.trainer import Trainer, TrainerMixin
from tests.models.mllama_case import (
    ds_config,
    make_batch,
    tiny_model,
    trained,
    weights,
    with_lora,
)
from tests.ranks import run_ranks

STEPS = 3
SLOW = pytest.mark.slow
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


@functools.cache
def samples(count: int = 6) -> list[dict[str, Tensor]]:
    """Of one shape, with as many labels as the sample's number says."""
    made = []
    for seed in range(count):
        batch = make_batch([[4, 9]], length=17, num_tiles=[[2, 1]], seed=seed)
        batch["labels"][:, 12 - 2 * seed :] = -100
        made.append({key: value[0] for key, value in batch.items()})
    return made


def config_of(stage: int, sp_size: int = 2, **more: Any) -> dict[str, Any]:
    """With everything "auto" that Trainer fills in."""
    config = ds_config(
        stage=stage, sp_size=sp_size, cross={"method": "lvx", "schedule": "auto"}, self_attn="ring"
    )
    del config["zero_allow_untested_optimizer"]
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    keys = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **config,
        **dict.fromkeys((*keys, "train_micro_batch_size_per_gpu"), "auto"),
        **more,
    }


def token_accuracy(prediction: Any) -> dict[str, float]:
    """From whole logits; a sum of them too, which no shard has."""
    labels = prediction.label_ids[:, 1:]
    right = prediction.predictions[:, :-1].argmax(-1) == labels
    return {
        "accuracy": float(right[labels != -100].mean()),
        "size": float(np.abs(prediction.predictions).mean()),
    }


class Recorder(transformers.TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


SETTINGS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.5,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def run(
    kind: type[Any],
    folder: Path,
    tiny: Path,
    *,
    config: dict[str, Any] | None = None,
    resume: str | None = None,
    lora: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train the model in the folder ``tiny``, and tell what was logged, and what came of it."""
    forget_state()
    if config is not None:
        deepspeed.init_distributed("gloo")  # accelerate does not where torch.distributed runs
    args = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        deepspeed=copy.deepcopy(config),
        **{**SETTINGS, **arguments},
    )
    record = Recorder()
    # Under ZeRO-3 it partitions as it loads.
    model = transformers.MllamaForConditionalGeneration.from_pretrained(tiny)
    trainer = kind(
        model=with_lora(model) if lora else model,
        args=args,
        train_dataset=samples(),
        eval_dataset=samples()[:5],
        compute_metrics=token_accuracy,
        callbacks=[record],
    )
    trainer.train(resume_from_checkpoint=resume)
    found = {
        "losses": [log["loss"] for log in record.logs if "loss" in log],
        "rates": [log["learning_rate"] for log in record.logs if "loss" in log],
        "metrics": trainer.evaluate() if args.eval_strategy != "no" else {},
        "batch": trainer.get_total_train_batch_size(args),
        "weights": (
            {name: p.detach().clone() for name, p in trained(trainer.model)}
            if config is None
            else weights(trainer.model_wrapped)
        ),
    }
    if config is not None:
        trainer.save_model(str(Path(folder) / "model"))
        trainer.accelerator.free_memory()
    forget_state()
    return found


def forget_state() -> None:
    """Of accelerate and transformers, which keep it in the process."""
    for each in (AcceleratorState, PartialState):
        each._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["rates"] == expected["rates"]
    for key, value in expected["metrics"].items():
        if key in ("eval_loss", "eval_accuracy", "eval_size"):
            assert found["metrics"][key] == pytest.approx(value, abs=1e-5), key
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tiny: Path) -> dict[str, Any]:
    return run(transformers.Trainer, tiny / "alone", tiny, **EVALUATING)


@SLOW
@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (0, 2))]
)
def test_losses_weights_and_evaluation_are_those_of_one_process(
    stage: int, alone: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    config = config_of(stage)
    for found in run_ranks(run, 2, Trainer, tmp_path, tiny, config=config, **EVALUATING):
        assert_same(found, alone)
        assert found["batch"] == 2
    saved = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path / "model")
    for name, weight in saved.named_parameters():
        torch.testing.assert_close(weight.detach(), alone["weights"][name], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_two_replicas_of_two_ranks_train_on_the_samples_of_one_process(
    alone: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """One sample a replica, where one process takes two, one after the other."""
    settings = {**EVALUATING, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 1}
    config = config_of(2, train_batch_size=2)
    for found in run_ranks(run, 4, Trainer, tmp_path, tiny, config=config, **settings):
        assert_same(found, {**alone, "metrics": {}})
        assert found["batch"] == 2
        assert found["metrics"]["eval_accuracy"] == alone["metrics"]["eval_accuracy"]
        assert found["metrics"]["eval_size"] == pytest.approx(alone["metrics"]["eval_size"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resuming_goes_on_as_if_nothing_had_been(
    stage: int, alone: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    saving = {**EVALUATING, "save_strategy": "steps", "save_steps": 2}
    config = config_of(stage)
    run_ranks(run, 2, Trainer, tmp_path, tiny, config=config, **saving)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run_ranks(
        run, 2, Trainer, tmp_path, tiny, config=config, resume=str(checkpoint), **EVALUATING
    )
    for found in resumed:
        rest = {key: alone[key][2:] for key in ("losses", "rates")}
        assert_same(found, {**alone, **rest})


@SLOW
def test_gradients_are_divided_once_where_nobody_multiplies_the_loss(
    tiny: Path, tmp_path: Path
) -> None:
    """Clipping would hide a factor."""
    how = {"max_steps": 1, "max_grad_norm": 0.0, "average_tokens_across_devices": False}
    expected = run(transformers.Trainer, tmp_path / "alone", tiny, **how)
    for found in run_ranks(run, 2, Trainer, tmp_path, tiny, config=config_of(0), **how):
        assert_same(found, expected)


class OwnLoss(transformers.Trainer):
    """A Trainer of a user's own: its loss is made from the logits and the labels of the batch."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        out = model(**inputs)
        logits, labels = out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
        loss = 0.5 * smoothed + 0.1 * out.loss
        return (loss, out) if return_outputs else loss


class ShardedOwnLoss(TrainerMixin, OwnLoss):
    pass


@SLOW
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_trainer_with_a_loss_of_its_own_finds_whole_logits(
    stage: int, tiny: Path, tmp_path: Path
) -> None:
    more = {**EVALUATING, "activation_checkpointing": True}
    expected = run(OwnLoss, tmp_path / "alone", tiny, **more)
    for found in run_ranks(run, 2, ShardedOwnLoss, tmp_path, tiny, config=config_of(stage), **more):
        assert_same(found, expected)


def test_a_config_without_our_section_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no DeepSpeed; expected a ds_config with a section"):
        run(Trainer, tmp_path, tiny)
    for name in ("use_liger_kernel", "enable_jit_checkpoint"):
        with pytest.raises(NotImplementedError, match=f"got {name} in the training arguments"):
            run(Trainer, tmp_path, tiny, **{name: True})
    forget_state()


def refused(tiny: Path, folder: Path) -> list[str]:
    said = []
    for arguments in ({"neftune_noise_alpha": 5.0}, {"torch_compile": True}):
        with pytest.raises(NotImplementedError) as caught:
            run(Trainer, folder, tiny, config=config_of(2), **arguments)
        said.append(str(caught.value))
        forget_state()
    return said


def test_what_would_not_be_acted_on_is_an_error_on_all_ranks(tiny: Path, tmp_path: Path) -> None:
    for said in run_ranks(refused, 2, tiny, tmp_path):
        assert "got neftune_noise_alpha in the training arguments" in said[0]
        assert "got torch_compile (or a dynamo_backend" in said[1]
