"""Training on data in the formats of others: the losses are those of our own form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.formats_case import own, parts, turns, write_media
from tests.data.media import write_jsonl
from tests.data.test_opened import rows, write_shards
from tests.launch.finetune_runs import arguments, finetune, metrics, write_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def losses(
    folder: Path, name: str, data: Path, *, world_size: int = 2, **more: object
) -> list[float]:
    """Of three steps on some data, the longest way round the options."""
    out = folder / name
    options = {"model": "tiny", "data": data, "fps": 5, "learning_rate": 1e-2, **more}
    config = write_config(folder / "ds.json", stage=0)
    words = arguments(deepspeed_config=config, output_dir=out, max_steps=3, **options)
    run_ranks(finetune, world_size, *words)
    return [row["loss"] for row in metrics(out)[0]]


def test_a_converted_file_gives_the_same_losses(tmp_path: Path) -> None:
    folder = write_media(tmp_path)
    segment = {"type": "video", "video": "c.mp4", "video_start": 0.4, "video_end": 1.2}
    same = [own("<image>x"), parts(segment, {"type": "text", "text": "y"})]
    llava = [turns("<image>x", image="a.png"), turns("<video>y", video="c.mp4", start=0.4, end=1.2)]
    expected = losses(folder, "own", write_jsonl(folder / "own.jsonl", *same))
    assert losses(folder, "llava", write_jsonl(folder / "d.json", llava)) == expected


@pytest.mark.exhaustive
def test_converted_rows_give_the_same_losses(tmp_path: Path) -> None:
    folder = write_media(tmp_path)
    rows(folder).to_parquet(str(folder / "d.parquet"))
    same = [own("<image><image>x", images=["a.png", "b.png"]), own("x", images=[])]
    expected = losses(folder, "rows-own", write_jsonl(folder / "own.jsonl", *same))
    assert losses(folder, "rows", folder / "d.parquet", workers=1) == expected


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 0), *(pytest.param(ranks, 1, marks=pytest.mark.exhaustive) for ranks in (2, 4))],
)
def test_shards_are_gone_on_with_where_a_run_stood(
    tmp_path: Path, ranks: int, workers: int
) -> None:
    """Replicas of 2 ranks: what the replicas take are the samples of each epoch."""
    shards = write_shards(write_media(tmp_path), (4, 3))
    given = {"world_size": ranks, "save_steps": 1, "keep_checkpoints": 3}
    whole = losses(tmp_path, "whole", shards, **given)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000001"
    resumed = losses(tmp_path, "resumed", shards, resume=checkpoint, workers=workers, **given)
    assert resumed == whole[1:]
    assert len(set(whole)) == 3
