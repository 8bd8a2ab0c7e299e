"""`launch/finetune.py --pack`: the run that it would be without, and what cannot be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_lvx.training.inputs import read_inputs
from ds_lvx.training.options import parse
from tests.launch.finetune_runs import arguments, finetune, metrics, write_config
from tests.models.test_packing import write_samples
from tests.ranks import run_ranks

# Not Adam, which makes steps of one size of gradients of any.
SGD = {"type": "SGD", "params": {"lr": 0.05}}


def words(folder: Path, name: str, *, micro: int = 3, **options: Any) -> list[str]:
    """A run of 3 samples a step."""
    config = write_config(
        folder / f"{name}.json",
        stage=2,
        micro=micro,
        optimizer=SGD,
        zero_allow_untested_optimizer=True,
    )
    given = {
        "model": "tiny",
        "data": folder / "d.jsonl",
        "eval_data": folder / "d.jsonl",
        "frames": 3,
        "deepspeed_config": config,
        "output_dir": folder / name,
        "max_steps": 3,
        "lr_scheduler": "constant",
    }
    return [*arguments(**{**given, **options})]


@pytest.mark.slow
def test_a_packed_run_is_the_padded_one_and_goes_on_where_it_stood(tmp_path: Path) -> None:
    """A bad sample in it too, of which nothing is learnt."""
    data = write_samples(tmp_path)
    lines = data.read_text().splitlines()
    (tmp_path / "bad.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    data.write_text("\n".join([*lines[:4], lines[5].replace("b.png", "bad.png")]) + "\n")
    found = []
    for name, more in (
        ("padded", {}),
        ("packed", {"pack": 4096, "save_steps": 1, "keep_checkpoints": 3}),
        ("again", {"pack": 200, "resume": tmp_path / "packed/checkpoints/step-00000001"}),
    ):
        run_ranks(finetune, 2, *words(tmp_path, name, on_bad_sample="skip", **more))
        found.append(metrics(tmp_path / name))
    (padded, scored), (packed, scored_too), (again, _) = found
    assert [row["step"] for row in packed] == [1, 2, 3]
    for key in ("loss", "epoch", "grad_norm"):
        expected = pytest.approx([row[key] for row in padded], abs=1e-5)
        assert [row[key] for row in packed] == expected, key
        assert [row[key] for row in again] == pytest.approx(
            [row[key] for row in padded[1:]], abs=1e-5
        )
    assert scored_too[0]["eval_loss"] == pytest.approx(scored[0]["eval_loss"], abs=1e-5)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    write_samples(tmp_path)
    with pytest.raises(ValueError, match=r"--pack: got train_micro_batch_size_per_gpu 1"):
        read_inputs(parse(words(tmp_path, "one", micro=1, pack=4096)), 2)
    expected = r"--pack: got a model of the family 'qwen3_vl'.*one of mllama, moss_vl, idefics, mpl"
    with pytest.raises(NotImplementedError, match=expected):
        read_inputs(parse(words(tmp_path, "other", model="tiny:qwen3_vl", pack=4096)), 2)
    with pytest.raises(SystemExit):
        parse(words(tmp_path, "few", pack=1))
