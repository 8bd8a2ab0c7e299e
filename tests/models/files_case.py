"""A family's checkpoint in a folder, two samples beside it, and a step of fine-tuning on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.registry import FAMILIES
from ds_lvx.training.model import Source
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.finetune_runs import arguments, finetune, metrics
from tests.ranks import run_ranks


def write_tiny(folder: Path, name: str, *further: Any, sides: tuple[int, int] = (40, 24)) -> Path:
    """The family's own tiny model with random weights, its processor, and samples."""
    family = FAMILIES.named(name)
    config, processor = family.tiny()
    torch.manual_seed(2)
    family.build(config, gate=1.0, dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return write_samples(folder, *further, sides=sides)


def write_samples(
    folder: Path, *further: Any, sides: tuple[int, int] = (40, 24), answer: str = "Yes"
) -> Path:
    """`train.jsonl`: a video, a video behind an image of these sides, and further samples."""
    write_video(folder / "a.mp4")
    write_image(folder / "a.png", sides)
    write_jsonl(
        folder / "train.jsonl",
        chat(("video", "a.mp4"), ("text", "What animal?"), answer="A big rabbit."),
        chat(("text", "Look"), ("image", "a.png"), ("video", "a.mp4"), answer=answer),
        *further,
    )
    return folder


def maker_of(
    folder: Path, *, frames: int, trust_remote_code: bool = False, **how: Any
) -> BatchMaker:
    """What makes batches of the samples; all frames are this process's, unless it is told how."""
    source = Source.of(str(folder), trust_remote_code=trust_remote_code)
    encoder = TextEncoder(source.processor, 4096, family=source.family)
    return BatchMaker(encoder, FrameRate(count=frames), owned=range, **how)


def whole_batches(folder: Path, *, frames: int, **how: Any) -> list[dict[str, Any]]:
    """Every sample with all its frames, as one process takes it."""
    maker = maker_of(folder, frames=frames, **how)
    conversations = read_conversations(folder / "train.jsonl")
    return [dict(maker.batch([each]).inputs) for each in conversations]


def first_loss(
    folder: Path,
    tmp_path: Path,
    config: Mapping[str, Any],
    *words: str,
    frames: int,
    ranks: int = 2,
    **further: Any,
) -> float:
    """Fine-tune for one step on one of the samples; its loss. The rest is in `tmp_path` / out."""
    (tmp_path / "ds.json").write_text(json.dumps(config))
    given = {
        "model": folder,
        "data": folder / "train.jsonl",
        "frames": frames,
        "deepspeed_config": tmp_path / "ds.json",
        "output_dir": tmp_path / "out",
        "learning_rate": 1e-2,
        "max_steps": 1,
        "lr_scheduler": "constant",
    }
    run_ranks(finetune, ranks, *arguments(**given, **further), *words)
    (row,) = metrics(tmp_path / "out")[0]
    return row["loss"]
