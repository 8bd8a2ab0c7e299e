"""`ds_lvx.trainer.Trainer` with LoRA, in bf16, and from a checkpoint of other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from ds_lvx.trainer import Trainer
from tests.models.mllama_case import tiny_model
from tests.ranks import RankError, run_ranks
from tests.test_trainer import STEPS, assert_same, config_of, run

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_lora_trains_as_alone_and_its_adapter_is_saved(tiny: Path, tmp_path: Path) -> None:
    alone = run(transformers.Trainer, tmp_path / "alone", tiny, lora=True)
    for found in run_ranks(run, 2, Trainer, tmp_path, tiny, config=config_of(2), lora=True):
        assert_same(found, alone)
    model = transformers.MllamaForConditionalGeneration.from_pretrained(tiny)
    loaded = dict(peft.PeftModel.from_pretrained(model, tmp_path / "model").named_parameters())
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(loaded[name].detach(), weight, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_bf16_is_as_near_to_fp32_as_one_process_is(tiny: Path, tmp_path: Path) -> None:
    exact = run(transformers.Trainer, tmp_path / "alone", tiny)
    config = config_of(2, bf16={"enabled": "auto"})
    theirs = {key: value for key, value in config.items() if key != "ds_lvx"}
    how = {"bf16": True}
    (alone,) = run_ranks(run, 1, transformers.Trainer, tmp_path, tiny, config=theirs, **how)

    def apart(found: dict[str, Any]) -> float:
        pairs = [(found["weights"][name], weight) for name, weight in exact["weights"].items()]
        return sum(float((got - weight).square().sum()) for got, weight in pairs)

    for found in run_ranks(run, 2, Trainer, tmp_path, tiny, config=config, **how):
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-2)
        assert found["losses"] != pytest.approx(exact["losses"], rel=1e-6), "it is fp32"
        assert apart(found) < 2**2 * apart(alone)
    saved = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert saved.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def written(tiny: Path) -> Any:
    """A run of two ranks by its ZeRO stage, and where it has saved its second step."""
    made: dict[int, tuple[dict[str, Any], Path]] = {}

    def of(stage: int) -> tuple[dict[str, Any], Path]:
        if stage not in made:
            out = tiny / f"written-{stage}"
            saving = {**ADAMW, "save_strategy": "steps", "save_steps": 2}
            found = run_ranks(run, 2, Trainer, out, tiny, config=config_of(stage), **saving)
            made[stage] = found[0], out / "checkpoint-2"
        return made[stage]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "ranks", "sp_size", "stage"),
    [
        (2, 2, 2, 2),
        (2, 1, 1, 3),
        pytest.param(2, 2, 1, 2, marks=pytest.mark.exhaustive),
        pytest.param(0, 2, 2, 2, marks=pytest.mark.exhaustive),
        pytest.param(3, 4, 2, 0, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_goes_on_with_these_or_other_ranks(
    before: int, ranks: int, sp_size: int, stage: int, written: Any, tiny: Path, tmp_path: Path
) -> None:
    expected, checkpoint = written(before)
    accumulation = 2 * sp_size // ranks
    how = {**ADAMW, "gradient_accumulation_steps": accumulation, "resume": str(checkpoint)}
    config = config_of(stage, sp_size)
    rest = {key: expected[key][2:] for key in ("losses", "rates")}
    for found in run_ranks(run, ranks, Trainer, tmp_path, tiny, config=config, **how):
        assert found["losses"] == pytest.approx(rest["losses"], abs=1e-5)
        assert found["rates"] == rest["rates"]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_other_samples_a_step_are_an_error(written: Any, tiny: Path, tmp_path: Path) -> None:
    how = {**ADAMW, "gradient_accumulation_steps": 3, "resume": str(written(2)[1])}
    message = "got 3 samples a step for a checkpoint with 2; expected as many"
    with pytest.raises(RankError, match=message):
        run_ranks(run, 1, Trainer, tmp_path, tiny, config=config_of(2, 1), **how)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_is_loaded_at_the_end(stage: int, tiny: Path, tmp_path: Path) -> None:
    """Here the one of the first step, whose evaluation loss is the largest."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    first = run(transformers.Trainer, tmp_path / "alone", tiny, max_steps=1, **evaluating)
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "save_total_limit": 1}
    saving = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    settings = {**evaluating, **best, **saving}
    for found in run_ranks(run, 2, Trainer, tmp_path, tiny, config=config_of(stage), **settings):
        assert len(found["losses"]) == STEPS
        assert_same({**found, "losses": found["losses"][:1], "rates": found["rates"][:1]}, first)
