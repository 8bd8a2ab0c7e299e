"""`ds-lvx parity` trains a model on data twice, and says whether that comes to the same."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from ds_lvx import cli
from ds_lvx.training import parity
from tests.data.media import chat, write_image, write_jsonl
from tests.forked import fork_fresh_ranks

SHARE = {"text_tokens": 8, "visual_tokens": 5, "kv_bytes": 1, "features_bytes": 1}


@pytest.mark.slow
def test_a_model_on_data_is_the_same_sharded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_fresh_ranks(monkeypatch)
    write_image(tmp_path / "a.png", (40, 40))
    data = write_jsonl(
        tmp_path / "train.jsonl",
        chat(("image", "a.png"), ("text", "What is it?"), answer="A tree."),
    )
    words = ["parity", "--model", "tiny", "--data", str(data), "--steps", "2"]
    assert cli.main([*words, "--", "--frames", "2", "--learning_rate", "1e-2"]) == 0
    printed = capsys.readouterr().out
    assert "one rank would hold" in printed
    assert [line.split()[:3] for line in printed.splitlines() if line.startswith("step")] == [
        ["step", str(step), value] for step in (1, 2) for value in ("loss", "grad_norm")
    ]
    assert "the same: they differ by" in printed


def told(loss: float) -> list[dict[str, Any]]:
    return [
        {"step": 1, "ranks": [SHARE, SHARE], "one_rank": SHARE},
        {"step": 1, "loss": loss, "grad_norm": 2.0},
    ]


@pytest.mark.parametrize(("loss", "code"), [(5.0004, 0), (5.01, 1)])
def test_a_difference_above_the_tolerance_is_exit_code_1(
    loss: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def train(
        options: Any, config: Any, *, ranks: int, apart: bool = False
    ) -> list[dict[str, Any]]:
        ran.append((ranks, config["ds_lvx"]["sequence_parallel_size"], apart))
        return told(loss if ranks == 2 else 5.0)

    monkeypatch.setattr(parity, "_train", train)
    assert cli.main(["parity", "--model", "tiny", "--data", "none", "--tolerance", "1e-3"]) == code
    assert ran == [(2, 2, False), (1, 1, True)]
    assert ("NOT the same" in capsys.readouterr().out) == bool(code)


def test_a_mistake_is_said_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "on_ranks", None)
    assert cli.main(["parity", "--model", "tiny", "--data", "none.jsonl"]) != 0
    assert "none.jsonl: got no such file" in capsys.readouterr().err


def test_trackers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parity", "--model", "tiny", "--data", "x", "--", "--report_to", "tensorboard"]
    assert cli.main(words) == 2
    assert "--report_to: got tensorboard for runs of which only" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bad_sample_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_fresh_ranks(monkeypatch)
    (tmp_path / "a.png").write_text("no picture")
    data = write_jsonl(
        tmp_path / "train.jsonl", chat(("image", "a.png"), ("text", "What?"), answer="A tree.")
    )
    assert cli.main(["parity", "--model", "tiny", "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert "train.jsonl:1" in said
    assert "Traceback" not in said


def test_one_process_takes_the_samples_of_all_replicas() -> None:
    config = {"train_batch_size": 24, "gradient_accumulation_steps": 3, "ds_lvx": {"layers": []}}
    alone = parity.alone_config(config, 4)
    assert alone["train_micro_batch_size_per_gpu"] == 2
    assert alone["gradient_accumulation_steps"] == 12
    assert alone["ds_lvx"] == {"sequence_parallel_size": 1}
    assert "train_batch_size" not in alone


def test_one_process_takes_samples_that_share_prefixes_in_their_order() -> None:
    config = {"train_micro_batch_size_per_gpu": 2, "ds_lvx": {"share_prefixes": True}}
    assert parity.alone_config(config, 1)["ds_lvx"]["share_prefixes"]


def test_a_number_that_is_none_is_refused() -> None:
    parser = ArgumentParser()
    parity.add_arguments(parser)
    options = parser.parse_args(["--model", "tiny", "--data", "x", "--steps", "0"])
    with pytest.raises(ValueError, match="--steps: got 0; expected more than 0"):
        parity.run(options)
