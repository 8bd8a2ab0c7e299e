"""Schedules are transformers' own, and end where `--min_lr` says."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ds_lvx.training.options import Options, parse
from ds_lvx.training.schedule import SCHEDULERS, check_section, make_schedule, warmup_steps

GIVEN = ("--model", "tiny", "--data", "d", "--deepspeed_config", "c", "--output_dir", "o")
HIGH, STEPS, WARM = 2e-3, 40, 8
NEEDS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 10, "decay_type": "linear"},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 20},
}


def options(*words: str) -> Options:
    return parse([*GIVEN, "--learning_rate", str(HIGH), "--warmup_steps", str(WARM), *words])


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=HIGH)


def rates(scheduler: Any) -> list[float]:
    return [HIGH * scheduler.lr_lambdas[0](step) for step in range(STEPS + 1)]


def ours(*words: str) -> list[float]:
    return rates(make_schedule(options(*words), optimizer(), total=STEPS))


def theirs(name: str, words: dict[str, Any] | None = None) -> list[float]:
    return rates(get_scheduler(name, optimizer(), WARM, STEPS, words))


def test_every_schedule_of_transformers_that_is_a_function_of_the_step_is_there() -> None:
    makers = {kind.value: maker for kind, maker in TYPE_TO_SCHEDULER_FUNCTION.items()}
    told = {name for name, maker in makers.items() if "last_epoch" in parameters(maker)}
    assert set(SCHEDULERS) == told
    for name in SCHEDULERS:
        words = NEEDS.get(name, {})
        given = ["--lr_scheduler_kwargs", json.dumps(words)] if words else []
        assert ours("--lr_scheduler", name, *given) == theirs(name, words), name


def parameters(maker: Any) -> Sequence[str]:
    return list(inspect.signature(maker).parameters)


def test_it_ends_at_the_least_learning_rate() -> None:
    low = 5e-5
    for name in ("cosine", "cosine_with_min_lr", "linear", "polynomial"):
        found = ours("--lr_scheduler", name, "--min_lr", str(low))
        assert found[STEPS] == pytest.approx(low, rel=1e-6), name
        assert max(found) == found[WARM] == pytest.approx(HIGH)
        assert found == sorted(found[: WARM + 1]) + sorted(found[WARM + 1 :], reverse=True)
    assert ours("--min_lr", str(low)) == theirs("cosine_with_min_lr", {"min_lr": low})
    line = [low + (HIGH - low) * (STEPS - step) / (STEPS - WARM) for step in range(WARM, STEPS + 1)]
    assert ours("--lr_scheduler", "linear", "--min_lr", str(low))[WARM:] == pytest.approx(line)
    words = ["--lr_scheduler_kwargs", '{"num_decay_steps": 10}', "--min_lr", str(low)]
    found = ours("--lr_scheduler", "warmup_stable_decay", *words)
    assert found[-1] == pytest.approx(low)
    found = ours("--lr_scheduler", "cosine_warmup_with_min_lr", "--min_lr", str(low))
    assert found[STEPS - 1] == pytest.approx(low)
    assert isinstance(make_schedule(options(), optimizer(), total=STEPS), LambdaLR)


def test_a_warm_up_is_steps_or_a_share_of_all() -> None:
    assert [warmup_steps(wanted, 250) for wanted in (0, 0.03, 1, 40)] == [0, 8, 1, 40]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min_lr", "1"], "--min_lr: got 1.0; expected less than --learning_rate, 0.002"),
        (
            ["--lr_scheduler", "constant", "--min_lr", "1e-5"],
            "has no such end; expected one of cos",
        ),
        (
            ["--lr_scheduler_kwargs", '{"cycles": 3}'],
            "got 'cycles' for cosine; expected num_cycles",
        ),
        (
            ["--lr_scheduler", "constant", "--lr_scheduler_kwargs", '{"a": 3}'],
            "got 'a' for constant; expected no words",
        ),
        (["--lr_scheduler_kwargs", "[1]"], "invalid json_object value"),
        (["--lr_scheduler_kwargs", "{"], "invalid json_object value"),
        (
            ["--lr_scheduler", "cosine_with_min_lr"],
            "--lr_scheduler cosine_with_min_lr: One of min_",
        ),
        (["--lr_scheduler", "warmup_stable_decay"], "missing 1 required positional argument"),
        (["--lr_scheduler_kwargs", '{"num_cycles": "a"}'], "--lr_scheduler cosine: "),
        (
            ["--lr_scheduler=polynomial", "--min_lr=1e-5", '--lr_scheduler_kwargs={"lr_end": 0}'],
            "--min_lr: got it beside",
        ),
        (["--lr_scheduler", "reduce_lr_on_plateau"], "invalid choice"),
    ],
)
def test_what_makes_no_schedule(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(*words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_words_for_a_schedule_beside_one_of_the_ds_config() -> None:
    check_section(options(), {"scheduler": {}})
    check_section(options("--min_lr", "1e-5"), {})
    with pytest.raises(ValueError, match=r"--min_lr: got a ds_config with a scheduler of its own"):
        check_section(options("--min_lr", "1e-5"), {"scheduler": {}})
