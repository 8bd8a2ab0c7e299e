"""The best evaluation and the patience are those that transformers' Trainer finds."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from ds_lvx.training.best import Watch
from ds_lvx.training.options import parse

GIVEN = ("--model", "tiny", "--data", "d", "--deepspeed_config", "c", "--output_dir", "o")
EVALUATES = ("--eval_data", "e", "--eval_steps", "1")


def watch(*words: str) -> Watch:
    return Watch(parse([*GIVEN, *EVALUATES, *words]))


def by_transformers(
    values: list[float], *, greater: bool, patience: int, threshold: float
) -> tuple[int | None, int]:
    """The step of the best evaluation, and the one after which training stops."""
    arguments: Any = SimpleNamespace(
        metric_for_best_model="eval_loss",
        greater_is_better=greater,
        load_best_model_at_end=True,
        save_strategy="steps",
        output_dir="o",
    )
    state, control = TrainerState(), TrainerControl()
    trainer: Any = SimpleNamespace(args=arguments, state=state)
    callback = EarlyStoppingCallback(patience, threshold)
    for step, value in enumerate(values, 1):
        state.global_step, metrics = step, {"eval_loss": value}
        callback.on_evaluate(arguments, state, control, metrics)
        transformers.Trainer._determine_best_metric(trainer, metrics, None)
        if control.should_training_stop:
            break
    return state.best_global_step, step


@pytest.mark.slow
def test_random_runs_have_the_best_and_the_end_that_transformers_finds() -> None:
    rng = random.Random(0)
    ends = set()
    for case in range(100):
        values = [rng.choice((1.0, 2.0, 2.5, 3.0, 3.2, 4.0)) for _ in range(12)]
        if case % 3 == 0:
            values[rng.randrange(1, 12)] = math.nan
        greater, patience = rng.random() < 0.5, rng.randint(1, 4)
        threshold = rng.choice((0.0, 0.6))
        words = ["--load_best_model_at_end", "--greater_is_better", str(greater)]
        words += ["--early_stopping_patience", str(patience)]
        ours = watch(*words, "--early_stopping_threshold", str(threshold))
        step = 0
        for step, value in enumerate(values, 1):
            ours.take(step, {"eval_loss": value})
            resumed = watch(*words, "--early_stopping_threshold", str(threshold))
            assert resumed.resume(ours.record()) is None
            ours = resumed
            if ours.stops:
                break
        expected = by_transformers(values, greater=greater, patience=patience, threshold=threshold)
        assert (ours.best.step, step) == expected, (values, words, threshold)
        ends.add(step)
    assert len(ends) > 5


def test_a_first_evaluation_without_a_number_is_not_the_best() -> None:
    ours = watch("--load_best_model_at_end")
    assert not ours.take(1, {"eval_loss": math.nan})
    assert ours.take(2, {"eval_loss": 5.0})
    assert ours.best.step == 2
    assert not ours.stops


def test_another_metric_forgets_the_best() -> None:
    before = watch("--load_best_model_at_end")
    before.take(1, {"eval_loss": 1.0})
    after = watch("--load_best_model_at_end", "--metric_for_best_model", "token_f1", *ANSWERS)
    assert "was found by eval_loss, and is forgotten" in str(after.resume(before.record()))
    assert after.take(2, {"eval_loss": 9.0, "token_f1": 0.1})
    assert after.take(3, {"eval_loss": 9.0, "token_f1": 0.2})
    assert after.resume(None) is None


ANSWERS = ("--eval_generate", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load_best_model_at_end"], "--load_best_model_at_end: got no --eval_data"),
        (["--early_stopping_patience", "2", "--eval_data", "e"], "got no --eval_steps; expected"),
        ([*EVALUATES, "--metric_for_best_model", "loss"], "--metric_for_best_model: got it alone"),
        ([*EVALUATES, "--greater_is_better", "true"], "--greater_is_better: got it alone"),
        (
            [*EVALUATES, "--load_best_model_at_end", "--early_stopping_threshold", "1"],
            "--early_stopping_threshold: got it alone",
        ),
        (
            [*EVALUATES, "--load_best_model_at_end", "--metric_for_best_model", "token_f1"],
            "got token_f1 without answers; expected --eval_generate",
        ),
        (["--load_best_model_at_end", "--metric_for_best_model", "bleu"], "invalid choice"),
        (["--greater_is_better", "yes"], "got 'yes'; expected true or false"),
        (["--early_stopping_patience", "0"], "expected a number, more than 0"),
    ],
)
def test_what_decides_nothing_or_cannot_be_compared(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*GIVEN, *words])
    assert message in capsys.readouterr().err
