"""A checkpoint goes on with other ranks, groups and ZeRO stages, at the losses of its own run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from tests.data.media import chat, write_image, write_jsonl
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import arguments, finetune, metrics, write_config
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    write_checkpoint(folder / "checkpoint")
    for number in range(3):
        write_image(folder / f"{number}.png", (40, 40), colour=80 * number)
    write_jsonl(
        folder / "train.jsonl",
        chat(("image", "0.png"), ("image", "1.png"), ("text", "Which?"), answer="The first."),
        chat(("image", "2.png"), ("text", "And this?"), answer="It is grey, I think."),
        chat(("image", "1.png"), ("text", "What?"), answer="Dark."),
    )
    return folder


def words(folder: Path, out: Path, config: str, **options: Any) -> list[str]:
    given = {
        # What does not train is not in a checkpoint, and random weights go by the ZeRO stage.
        "model": folder / "checkpoint",
        "data": folder / "train.jsonl",
        "deepspeed_config": config,
        "output_dir": out,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_steps": 2,
        **options,
    }
    return list(arguments(**given))


def config_of(path: Path, *, ranks: int, sp_size: int, stage: int) -> str:
    """Two samples a step, whatever the ranks."""
    accumulation = 2 * sp_size // ranks
    return write_config(path, stage=stage, sp_size=sp_size, accumulation=accumulation)


@pytest.fixture(scope="module")
def written(folder: Path) -> Any:
    """Runs of two ranks by their ZeRO stage, each made once."""
    made: dict[tuple[int, int], Path] = {}

    def run(stage: int, lora_r: int) -> Path:
        if (stage, lora_r) not in made:
            out = folder / f"written-{stage}-{lora_r}"
            config = config_of(folder / f"ds-{stage}.json", ranks=2, sp_size=2, stage=stage)
            run_ranks(finetune, 2, *words(folder, out, config, lora_r=lora_r))
            made[stage, lora_r] = out
        return made[stage, lora_r]

    return run


@pytest.mark.parametrize(
    ("before", "ranks", "sp_size", "stage", "lora_r"),
    [
        pytest.param(0, 2, 2, 3, 0, marks=pytest.mark.exhaustive),
        pytest.param(2, 1, 1, 0, 0, marks=pytest.mark.exhaustive),
        pytest.param(2, 2, 1, 2, 0, marks=pytest.mark.exhaustive),
        pytest.param(2, 4, 2, 3, 0, marks=pytest.mark.exhaustive),
        pytest.param(3, 2, 1, 1, 0, marks=pytest.mark.exhaustive),
        (3, 1, 1, 3, 0),
        pytest.param(3, 2, 2, 2, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_goes_on_elsewhere_at_its_own_losses(
    folder: Path,
    tmp_path: Path,
    written: Any,
    before: int,
    ranks: int,
    sp_size: int,
    stage: int,
    lora_r: int,
) -> None:
    first = written(before, lora_r)
    out = tmp_path / "out"
    shutil.copytree(first, out)
    config = config_of(tmp_path / "ds.json", ranks=ranks, sp_size=sp_size, stage=stage)
    resume = out / "checkpoints" / "step-00000002"
    run_ranks(finetune, ranks, *words(folder, out, config, resume=resume, lora_r=lora_r))
    expected, found = metrics(first)[0], metrics(out)[0]
    assert len({round(row["loss"], 4) for row in expected}) == STEPS
    for key in ("loss", "learning_rate"):
        assert [row[key] for row in found] == pytest.approx(
            [row[key] for row in expected], abs=1e-5
        )
    if not lora_r:
        weights, others = (
            AutoModelForImageTextToText.from_pretrained(each / "model").state_dict()
            for each in (out, first)
        )
        worst = max(float((weights[name] - others[name]).abs().max()) for name in weights)
        assert worst < 1e-4


def test_states_of_another_optimizer_are_refused(folder: Path, tmp_path: Path) -> None:
    """At stage 0 in 16 bits DeepSpeed has an optimizer of its own."""
    out = tmp_path / "out"
    settings = {"sp_size": 1, "bf16": {"enabled": True}}
    config = write_config(tmp_path / "ds.json", stage=0, **settings)
    run_ranks(finetune, 1, *words(folder, out, config, max_steps=2))
    other = write_config(tmp_path / "other.json", stage=2, **settings)
    with pytest.raises(RankError, match="not of a kind that moves to other ranks or to another"):
        run_ranks(finetune, 1, *words(folder, out, other, resume="latest"))
