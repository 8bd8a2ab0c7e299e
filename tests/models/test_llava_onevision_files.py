"""LLaVA-OneVision from a checkpoint's folder: its text and pixels, and fine-tuning on them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from ds_lvx.data.chat import read_conversations
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.data.media import chat, write_image
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny

NAME = "llava_onevision"
PIXELS, FRAMES = "pixel_values", "pixel_values_videos"


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint, and three samples: a video, a video and an image, two images."""
    write_image(folder / "b.png", (30, 30))
    return write_tiny(
        folder,
        NAME,
        chat(("image", "a.png"), ("image", "b.png"), ("text", "And?"), answer="No"),
        sides=(60, 20),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(NAME))


def test_an_image_is_a_token_of_the_text_and_a_video_one_a_frame(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    shown = processor.shown(Medium(None, (20, 60)))  # two tiles, and lines without the padding
    assert (shown.text, shown.frames, shown.tokens) == ("<image>", (1,), (16 + 2 * (8 + 1),))
    shown = processor.shown(Medium(None, (20, 60), alone=False))
    assert shown.tokens == (16 + 1,)
    shown = processor.shown(Medium((0.0, 0.5, 1.0), (20, 60)))
    assert (shown.text, shown.frames, shown.tokens) == ("<video>" * 3, (1,) * 3, (4, 4, 5))


def test_a_conversation_becomes_a_batch_of_the_model(folder: Path) -> None:
    """An image that is alone in its sample is tiled, two are not."""
    batch = maker_of(folder, frames=5).batch(read_conversations(folder / "train.jsonl")).inputs
    assert batch["batch_num_images"].tolist() == [1, 2]
    assert batch["image_sizes"].tolist() == [[20, 60], [20, 60], [30, 30]]
    assert batch[PIXELS].shape[0] == 3
    assert batch[PIXELS][0].flatten(1).any(1).all()
    assert not batch[PIXELS][1:, 1:].any()
    assert batch[FRAMES].shape == (10, 3, 16, 16)
    assert batch["frames_per_video"].tolist() == [5, 5]
    model = Source.of(str(folder)).load(torch.float32)
    shard_batch(batch, model=model)  # which checks text and pixels


def test_each_rank_decodes_its_own_images_and_frames(folder: Path) -> None:
    conversations = read_conversations(folder / "train.jsonl")[1:2]
    maker = maker_of(folder, frames=6)
    whole = maker.batch(conversations).inputs
    tokens = [n for shown in maker.sample(conversations[0]).shown for n in shown.tokens]
    owned, held = FAMILIES.named(NAME).owned, []
    for rank in range(3):
        mine = owned(tokens, rank=rank, size=3)
        deal = partial(owned, rank=rank, size=3)
        part = maker_of(folder, frames=6, deal=deal).batch(conversations).inputs
        frames = [unit - 1 for unit in mine if unit > 0]
        assert torch.equal(part[FRAMES], whole[FRAMES][frames]) if frames else FRAMES not in part
        assert torch.equal(part[PIXELS], whole[PIXELS]) if 0 in mine else PIXELS not in part
        assert torch.equal(part["image_sizes"], whole["image_sizes"])
        held += mine
    assert sorted(held) == [*range(7)]


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "lvx", 2, 3), frames=7)
    model, start = Source.of(str(folder)).load(torch.float32), []
    for batch in whole_batches(folder, frames=7):
        if FRAMES in batch:  # transformers' own has a dimension of videos
            batch[FRAMES] = batch[FRAMES][None]
        start.append(model(**batch).loss.item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
