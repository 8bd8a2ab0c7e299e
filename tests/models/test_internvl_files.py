"""InternVL from a checkpoint's folder: its text and pixels, and fine-tuning on them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_lvx.data.chat import read_conversations
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny

NAME = "internvl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(NAME), NAME, sides=(60, 20))


def test_an_image_has_tiles_and_a_frame_is_one(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    shown = processor.shown(Medium(None, (20, 60)))
    assert shown.text == f"<img>{'<IMG_CONTEXT>' * 4}</img>"  # three, and the whole
    assert (shown.frames, shown.tokens) == ((1, 0, 0, 0), (4,) * 4)
    shown = processor.shown(Medium((0.0, 0.5), (20, 60)))
    tile = "<img><IMG_CONTEXT></img>"
    assert (shown.text, shown.frames) == (f"Frame1: {tile}\nFrame2: {tile}", (1, 1))
    made = processor.images(Image.effect_noise((60, 20), 90).convert("RGB"))
    assert len(made["pixel_values"]) == 4


def test_a_tile_has_the_tokens_that_the_model_makes_of_it(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    (other / "processor_config.json").unlink()
    assert Source.of(str(other)).processor.shown(Medium((0.0,), (20, 60))).tokens == (4,)
    (other / "processor_config.json").write_text(json.dumps({"image_seq_length": 256}))
    with pytest.raises(ValueError, match=r"image_seq_length 256 in processor_config\.json, .* 4 t"):
        Source.of(str(other))


def test_a_template_in_a_file_of_its_own_is_taken(folder: Path, tmp_path: Path) -> None:
    """As older checkpoints have it, whose tokenizer has none."""
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    (other / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert Source.of(str(other)).processor.chat_template == "{{ messages }}"


def test_a_conversation_becomes_a_batch_of_the_model(folder: Path) -> None:
    maker = maker_of(folder, frames=5)
    batch = maker.batch(read_conversations(folder / "train.jsonl")).inputs
    assert batch["pixel_values"].shape == (5 + 4 + 5, 3, 16, 16)
    model = Source.of(str(folder)).load(torch.float32)
    shard_batch(batch, model=model)  # which checks text and pixels


def test_each_rank_decodes_its_own_tiles(folder: Path) -> None:
    """Also where it holds some of an image's; together they are all."""
    conversations = read_conversations(folder / "train.jsonl")[1:]
    whole = maker_of(folder, frames=6).batch(conversations).inputs["pixel_values"]
    owned = FAMILIES.named(NAME).owned
    for rank in range(3):
        mine = owned([4] * 10, rank=rank, size=3)
        maker = maker_of(folder, frames=6, deal=partial(owned, rank=rank, size=3))
        part = maker.batch(conversations).inputs["pixel_values"]
        assert torch.equal(part, whole[mine])


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "lvx", 2, 3), frames=7)
    model = Source.of(str(folder)).load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=7)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
