"""What a user can get wrong: an error with file and line, on every rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data.limits import Limits
from ds_lvx.data.order import SampleOrder
from ds_lvx.distributed.channel import Channel
from ds_lvx.training.inputs import check_samples, read_inputs
from ds_lvx.training.options import parse
from tests.data.media import (
    BUNNY,
    chat,
    write_image,
    write_jsonl,
    write_video,
)
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import arguments, finetune, metrics, write_config
from tests.ranks import RankError, run_ranks


def _damaged_video(path: Path) -> str:
    """A video whose first frames can be decoded, and whose last cannot."""
    data = bytearray(BUNNY.read_bytes())
    data[800_000:1_000_000] = bytes(7 * n % 256 for n in range(200_000))
    path.write_bytes(data)
    return path.name


def _fails(ranks: int, *given: str, expected: str) -> RankError:
    """Every rank raises a ValueError with the expected text; none waits for another."""
    with pytest.raises(RankError) as caught:
        run_ranks(finetune, ranks, *given)
    errors = caught.value.errors
    assert sorted(errors) == list(range(ranks)), caught.value
    for rank, text in errors.items():
        assert re.search(expected, text), f"rank {rank} says:\n{text}"
    return caught.value


Write = Callable[[Path], Any]


def _missing(folder: Path) -> Any:
    return chat(("video", "none.mp4"))


def _damaged(folder: Path) -> Any:
    return chat(("video", _damaged_video(folder / "damaged.mp4")))


def _long_text(folder: Path) -> Any:
    write_image(folder / "a.png")
    return chat(("image", "a.png"), ("text", "x?" * 3000))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (_missing, r"train\.jsonl:2: got no such file: .*none\.mp4"),
        (lambda folder: '{"messages": ', r"train\.jsonl:2: got .* expected one JSON object"),
        pytest.param(
            _damaged, r"rank 1.*train\.jsonl:2: .*damaged\.mp4: got", marks=pytest.mark.slow
        ),
        (_long_text, r"train\.jsonl:2: got \d+ tokens \(1 of them frames\); expected at most 4096"),
    ],
    ids=["missing", "no json", "damaged", "long text"],
)
def test_a_bad_sample_is_named_on_all_ranks(tmp_path: Path, line: Write, expected: str) -> None:
    write_image(tmp_path / "good.png")
    data = write_jsonl(tmp_path / "train.jsonl", chat(("image", "good.png")), line(tmp_path))
    config = write_config(tmp_path / "ds.json", stage=2)
    out = tmp_path / "out"
    options = {"frames": 132, "deepspeed_config": config, "output_dir": out, "epochs": 2}
    _fails(2, *arguments(model="tiny", data=data, **options), expected=expected)


@pytest.mark.slow
def test_skipped_samples_are_named_and_nothing_of_them_is_learnt(tmp_path: Path) -> None:
    """One that the check finds, and one whose frames only rank 1 decodes, in training. It is all
    that there is to evaluate on: the run has no loss of it, and ends well."""
    write_image(tmp_path / "a.png")
    good = [chat(("image", "a.png"), ("text", f"{n}?")) for n in range(2)]
    bad = (_missing(tmp_path), _damaged(tmp_path))
    data = write_jsonl(tmp_path / "train.jsonl", *good, *bad)
    config = write_config(tmp_path / "ds.json", stage=2)
    out = tmp_path / "out"
    given = {"model": "tiny", "data": data, "deepspeed_config": config, "output_dir": out}
    given["eval_data"] = write_jsonl(tmp_path / "eval.jsonl", bad[1])
    run_ranks(finetune, 2, *arguments(frames=132, on_bad_sample="skip", **given))
    rows, evaluation = metrics(out)
    assert evaluation == []
    assert [row["step"] for row in rows] == [1, 2, 3], "an epoch of the samples that are left"
    assert sorted(row["loss"] == 0 for row in rows) == [False, False, True], "none is learnt"
    missing, damaged, evaluated = (out / "skipped.txt").read_text().splitlines()
    assert re.search(r"train\.jsonl:3: got no such file: .*none\.mp4", missing)
    assert re.search(r"train\.jsonl:4: .*damaged\.mp4: got", damaged)
    assert re.search(r"eval\.jsonl:1: .*damaged\.mp4: got", evaluated)


def test_an_empty_file_and_a_typo_in_the_config(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", "")
    config = write_config(tmp_path / "ds.json", stage=2)
    out = tmp_path / "out"
    given = {"model": "tiny", "data": data, "output_dir": out}
    _fails(2, *arguments(deepspeed_config=config, **given), expected="got an empty file")
    wrong = Path(config)
    right = wrong.read_text()
    wrong.write_text(right.replace('"gradient_clipping": 0.0', '"gradient_clipping": "auto"'))
    _fails(2, *arguments(deepspeed_config=config, **given), expected='clipping: got "auto"')
    wrong.write_text(right)
    wrong.write_text(wrong.read_text().replace("ulysses", "ulises"))
    _fails(2, *arguments(deepspeed_config=config, **given), expected='"ulises".*"ulysses"')


def _differences(cases: list[list[Sequence[str]]]) -> list[str]:
    """What a rank is told of each case: the words of every rank, as nodes may be given them."""
    world, found = Channel.world(), []
    for words in cases:
        options = parse(words[world.rank])
        with pytest.raises(ValueError, match="expected the same on every rank") as caught:
            check_samples(read_inputs(options, world.size), options, world)
        found.append(str(caught.value))
    return found


def test_nodes_that_are_given_different_runs(tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{n}.jsonl", *[chat(answer="a")] * n) for n in (1, 2))
    config = write_config(tmp_path / "ds.json", stage=2)
    other = write_config(tmp_path / "other.json", stage=3)
    given = {"model": "tiny", "data": one, "deepspeed_config": config, "output_dir": tmp_path}
    changes = {
        "--max_steps: got None on rank 0, 7 on rank 1": {"max_steps": 7},
        "zero_optimization.stage: got 2 on rank 0, 3 on rank 1": {"deepspeed_config": other},
        "contents of --data": {"data": two},
        "contents of --eval_data: got None on rank 0": {"eval_data": one},
    }
    elsewhere = {"output_dir": tmp_path / "out", "workers": 2}  # which may differ
    cases = [
        [arguments(**given), arguments(**{**given, **elsewhere, **change})]
        for change in changes.values()
    ]
    for texts in run_ranks(_differences, 2, cases):
        for text, expected in zip(texts, changes, strict=True):
            assert f"finetune.py: the ranks disagree on {expected}" in text


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    """Heads that ulysses cannot split, and fewer tokens than ranks."""
    write_image(tmp_path / "a.png")
    data = write_jsonl(tmp_path / "train.jsonl", chat(("image", "a.png"), answer="a"))
    one_head = write_checkpoint(tmp_path / "one_head", num_heads=1)
    config = write_config(tmp_path / "ds.json", stage=0, cross="ulysses")
    given = {"data": data, "output_dir": tmp_path / "out"}
    words = arguments(model=one_head, deepspeed_config=config, **given)
    _fails(2, *words, expected="got ulysses on 2 ranks for .* attention with 1 heads")
    nothing = arguments(model=tmp_path / "nothing", deepspeed_config=config, **given)
    _fails(2, *nothing, expected="--model: got .*nothing.*, which cannot be read")

    short = "<|image|>{{ messages[1].content[0].text }}"
    brief = write_checkpoint(tmp_path / "brief", template=short)
    config = write_config(tmp_path / "ds4.json", stage=0, sp_size=4)
    words = arguments(model=brief, deepspeed_config=config, **given)
    _fails(4, *words, expected=r"train\.jsonl:1: got 3 text tokens; expected at least 4")


@pytest.mark.exhaustive
def test_the_last_checkpoint_survives_bad_data_and_serves(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    samples = [chat(("video", "a.mp4"), ("text", f"{n}?")) for n in range(3)]
    data = write_jsonl(tmp_path / "train.jsonl", *samples, chat(("video", "later.mp4")))
    _damaged_video(tmp_path / "later.mp4")
    config = write_config(tmp_path / "ds.json", stage=3)
    out = tmp_path / "out"
    given = {"data": data, "deepspeed_config": config, "output_dir": out}
    seed = next(n for n in range(99) if SampleOrder(4, n).sample(3) == 3)  # the damaged one last
    words = arguments(model="tiny", frames=132, save_steps=1, seed=seed, **given)
    _fails(2, *words, expected=r"rank 1.*train\.jsonl:4: .*later\.mp4")
    checkpoints = out / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-00000003\n"
    folders = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert folders == ["step-00000002", "step-00000003"]  # the newest two are kept
    assert not (out / "model").exists()

    (tmp_path / "later.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    _fails(2, *words, expected="holds checkpoints of a run")
    other = rf"seed: got 99 for a checkpoint with {seed}; pass it as --seed"
    _fails(2, *words, "--resume", "--seed", "99", expected=other)
    run_ranks(finetune, 2, *words, "--resume")
    assert [row["step"] for row in metrics(out)[0]] == [1, 2, 3, 4]
    assert (out / "model" / "config.json").is_file()


@pytest.mark.slow
def test_other_steps_cannot_resume(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    data = write_jsonl(tmp_path / "train.jsonl", chat(("image", "a.png")))
    config = write_config(tmp_path / "ds.json", stage=1)
    given = {"data": data, "output_dir": tmp_path / "out", "save_steps": 1, "max_steps": 1}
    words = arguments(model="tiny", **given)
    run_ranks(finetune, 2, *words, "--deepspeed_config", config)
    more = write_config(tmp_path / "more.json", stage=1, sp_size=1, accumulation=3)
    _fails(
        1,
        *words,
        *("--resume", "--seed", "5", "--deepspeed_config", more),
        expected=r"samples_per_step: got 3 for a checkpoint with 1; set the batch size"
        r"(.|\n)*seed: got 5",
    )
    nowhere = tmp_path / "nowhere"
    words = arguments(model="tiny", deepspeed_config=config, **{**given, "output_dir": nowhere})
    _fails(2, *words, "--resume", expected="nowhere without a checkpoint")
    _fails(2, *words, "--resume", str(nowhere), expected="is no checkpoint of this script")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--fps", "0"],
        ["--fps", "inf"],
        ["--fps", "1", "--frames", "3"],
        ["--max_frames", "4", "--frames", "3"],
        ["--max_frames", "0"],
        ["--max_pixels", "0"],
        ["--max_film_frames", "many"],
        ["--max_lead_in_frames", "-1"],
        ["--max_gap_s", "nan"],
        ["--max_steps", "0"],
        ["--learning_rate", "fast"],
        ["--lr_scheduler", "cosin"],
        ["--warmup_steps", "1.5"],
        ["--lora_r", "-1"],
        ["--val_size", "0"],
        ["--val_size", "1.5"],
        ["--val_size", "2", "--eval_data", "d"],
        ["--on_bad_sample", "skip", "--check_data", "lines"],
    ],
)
def test_impossible_options_end_with_usage(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = arguments(model="tiny", data="a", deepspeed_config="b", output_dir="c")
    assert parse(good).lr_scheduler == "cosine"
    # What torch.distributed.launch and DeepSpeed's launcher add.
    assert parse([*good, "--local-rank=0"]) == parse([*good, "--local_rank=0"]) == parse(good)
    assert parse(good).limits == Limits()
    limited = ["--max_pixels", "1", "--max_film_frames", "2", "--max_lead_in_frames", "3"]
    limited += ["--max_gap_s", "4.5", "--max_line_bytes", "6"]
    assert parse([*good, *limited]).limits == Limits(1, 2, 3, 4.5, 6)
    with pytest.raises(SystemExit):
        parse([*good, *wrong])
    assert wrong[0] in capsys.readouterr().err
