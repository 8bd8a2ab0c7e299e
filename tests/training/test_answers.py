"""Scores of answers, and what `--eval_generate` asks for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ds_lvx.data.batch import FrameRate
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.registry import FAMILIES
from ds_lvx.training.answers import means, token_f1, words
from ds_lvx.training.asking import Prompts
from ds_lvx.training.inputs import check_samples, read_inputs
from ds_lvx.training.options import parse
from ds_lvx.training.progress import Progress
from tests.data.formats_case import own, write_media
from tests.data.media import write_jsonl
from tests.launch.finetune_runs import arguments, write_config
from tests.training.test_lengths import ALONE


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("A big rabbit.", "a BIG rabbit", 1.0),
        ("a rabbit", "A big rabbit.", 0.8),
        ("rabbit rabbit", "rabbit", 2 / 3),
        ("Rot, grün", "grün, rot", 1.0),
        ("", "a rabbit", 0.0),
        ("...", "!", 1.0),
    ],
)
def test_token_f1(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)


def test_the_order_of_words_counts_for_a_match_alone() -> None:
    assert words("Rot, grün!") == ["rot", "grün"]
    rows = [{"exact_match": 1.0, "token_f1": 1.0}, {"exact_match": 0.0, "token_f1": 0.5}]
    assert means(rows) == {"exact_match": 0.5, "token_f1": 0.75}


def test_answers_want_evaluation_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--data", "a", "--deepspeed_config", "b", "--output_dir", "c"]
    with pytest.raises(SystemExit):
        parse([*words, "--eval_generate", "2"])
    assert "--eval_generate: got no --eval_data" in capsys.readouterr().err
    assert parse([*words, "--eval_generate", "2", "--eval_data", "d"]).eval_new_tokens == 64


def test_a_run_that_resumes_forgets_answers_of_later_steps(tmp_path: Path) -> None:
    for step in (0, 2):
        progress = Progress(tmp_path, rank=0, total_steps=4)
        progress.start(step)
        for number in range(step + 1, 5):
            progress.answers(number, [{"answer": f"{step}"}])
        progress.close()
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [line[-3] for line in lines] == ["0", "0", "2", "2"]


def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    folder = write_media(tmp_path)
    late = own("x", images=[])
    late["messages"].append({"role": "user", "content": "<image>"})
    late["images"] = ["a.png"]
    data = write_jsonl(folder / "d.jsonl", own("x", images=[]), late)
    words = arguments(
        model="tiny",
        data=data,
        eval_data=data,
        deepspeed_config=write_config(folder / "ds.json", stage=0, sp_size=1),
        output_dir=folder / "out",
    )
    for count, refused in ((0, False), (1, False), (2, True)):
        options = parse([*words, "--eval_generate", str(count)])
        inputs = read_inputs(options, 1)
        with (
            pytest.raises(ValueError, match=r"d\.jsonl:2: .*after the last answer")
            if refused
            else nullcontext()
        ):
            check_samples(inputs, options, ALONE)


def test_an_answer_ends_where_the_model_or_its_tokenizer_says() -> None:
    family = FAMILIES.named("mllama")
    config, processor = family.tiny()
    model = family.build(config, gate=1.0, dtype=torch.float32)
    prompts = Prompts(TextEncoder(processor, 64, family=family), FrameRate(fps=1), owned=range)
    model.generation_config.eos_token_id = None
    assert prompts.ending(model) == {"eos_token_id": processor.tokenizer.eos_token_id}
    model.generation_config.eos_token_id = 7
    assert prompts.ending(model) == {}
