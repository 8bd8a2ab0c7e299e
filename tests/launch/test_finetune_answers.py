"""The answers of `launch/finetune.py --eval_generate` are those of the model that it saves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import (
    arguments,
    finetune,
    metrics,
    one_process_answers,
    one_process_samples,
    write_config,
)
from tests.ranks import run_ranks

FRAMES, TOKENS, COUNT = 3, 5, 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "micro"), [(2, 2, 2), pytest.param(4, 3, 1, marks=pytest.mark.exhaustive)]
)
def test_answers_of_the_evaluation(tmp_path: Path, ranks: int, stage: int, micro: int) -> None:
    """Prompts of several lengths in a batch, or two replicas, one with a sample less."""
    write_checkpoint(tmp_path / "checkpoint")
    write_video(tmp_path / "a.mp4", frames=9)
    write_image(tmp_path / "a.png", (100, 40))
    samples = [
        chat(("video", "a.mp4"), ("text", "What animal?"), answer="A big rabbit."),
        chat(("image", "a.png"), ("text", "Where?"), answer="In a green meadow."),
        chat(("video", "a.mp4"), ("text", "And then what?"), answer="Gone."),
        chat(("image", "a.png"), ("text", "Nobody asks this."), answer="No."),
    ]
    data, out = tmp_path / "chats.jsonl", tmp_path / "out"
    write_jsonl(data, *samples)
    words = arguments(
        model=tmp_path / "checkpoint",
        data=data,
        eval_data=data,
        frames=FRAMES,
        deepspeed_config=write_config(tmp_path / "ds.json", stage=stage, micro=micro),
        output_dir=out,
        learning_rate=1e-2,
        max_steps=2,
        eval_steps=1,
        eval_generate=COUNT,
        eval_new_tokens=TOKENS,
    )
    run_ranks(finetune, ranks, *words)

    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * COUNT + [2] * COUNT
    final, made = rows[COUNT:], one_process_samples(out / "model", data, frames=FRAMES)
    assert [row["answer"] for row in final] == one_process_answers(
        out / "model", made[:COUNT], tokens=TOKENS
    )
    assert [row["source"] for row in final] == [f"{data}:{n}" for n in range(1, COUNT + 1)]
    assert [row["reference"] for row in final] == ["A big rabbit.", "In a green meadow.", "Gone."]
    assert final[0]["question"] == "What animal?"
    evaluation = metrics(out)[1]
    assert [row["step"] for row in evaluation] == [1, 2]
    for key in ("exact_match", "token_f1"):
        assert evaluation[1][key] == pytest.approx(sum(row[key] for row in final) / COUNT)
