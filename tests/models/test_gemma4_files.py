"""Gemma 4 from a checkpoint's folder: its text and pixels, and fine-tuning on them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from ds_lvx.data.chat import read_conversations
from ds_lvx.models.gemma4.processor import VIDEO_TOKEN, Pictures
from ds_lvx.models.media import Medium, Shown
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny

NAME = "gemma4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(NAME), NAME)


@pytest.mark.parametrize("sides", [(60, 20), (333, 1000), (16, 16)])
def test_pixels_are_those_of_transformers_own_processor(sides: tuple[int, int]) -> None:
    picture = Image.effect_noise(sides, 90).convert("RGB")
    expected = Gemma4ImageProcessorPil(max_soft_tokens=70)(picture, return_tensors="pt")
    ours = Pictures(16, 3, 70)
    found = ours.patches(picture, ours.grid(*sides[::-1]))
    there = (expected["image_position_ids"][0] >= 0).all(dim=-1)
    torch.testing.assert_close(found, expected["pixel_values"][0, there], atol=1e-6, rtol=0)
    assert len(found) == 9 * expected["num_soft_tokens_per_image"][0]


def test_a_frame_of_a_video_stands_behind_its_time(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    frame = "<|image><|video|><image|>"
    shown = processor.shown(Medium((0.0, 61.5), (20, 60)))
    assert shown == Shown(f"00:00 {frame} 01:01 {frame}", (1, 1), (3, 3))
    assert processor.shown(Medium(None, (20, 60))).text == "<|image><|image|><image|>"


def test_a_template_says_what_is_around_an_image(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    processor = Source.of(str(folder)).processor
    written = r"{% if false %}{{ '\n\n<|image|>\n\n' }}{% endif %}" + processor.chat_template
    (other / "chat_template.jinja").write_text(written)
    shown = Source.of(str(other)).processor.shown(Medium(None, (20, 60)))
    assert shown.text == "\n\n<|image><|image|><image|>\n\n"


def test_the_token_of_a_video_may_be_in_the_vocabulary_alone(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    written = json.loads((other / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in written["added_tokens"]}
    written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] != VIDEO_TOKEN]
    written["model"]["vocab"] |= added
    (other / "tokenizer.json").write_text(json.dumps(written))
    tokenizer = Source.of(str(other)).processor.tokenizer
    assert tokenizer(VIDEO_TOKEN, add_special_tokens=False)["input_ids"] == [added[VIDEO_TOKEN]]


def test_files_that_are_not_the_model_s(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    settings = {"image_processor": {"patch_size": 16}}
    (other / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"got patch_size and pooling_kernel_size \(16, 2\)"):
        Source.of(str(other))


def test_a_conversation_becomes_a_batch_of_the_model(folder: Path) -> None:
    batch = maker_of(folder, frames=5).batch(read_conversations(folder / "train.jsonl")).inputs
    types = batch["mm_token_type_ids"]
    model = Source.of(str(folder)).load(torch.float32)
    assert batch["num_frames_per_video"].tolist() == [5, 5]
    assert torch.equal(types == 1, batch["input_ids"] == model.config.image_token_id)
    assert int((types == 2).sum()) == 2 * 10
    shard_batch(batch, model=model)  # which checks text and pixels
    assert model(**batch).loss.isfinite()


def test_each_rank_decodes_its_own_images(folder: Path) -> None:
    conversations = read_conversations(folder / "train.jsonl")[1:]
    whole = maker_of(folder, frames=6).batch(conversations).inputs
    owned = FAMILIES.named(NAME).owned
    tokens = [int((whole["mm_token_type_ids"] == 1).sum()), *[2] * 6]
    for rank in range(3):
        mine = owned(tokens, rank=rank, size=3)
        maker = maker_of(folder, frames=6, deal=partial(owned, rank=rank, size=3))
        part = maker.batch(conversations).inputs
        frames = [unit - 1 for unit in mine if unit > 0]
        if frames:
            assert torch.equal(part["pixel_values_videos"], whole["pixel_values_videos"][frames])
        assert ("pixel_values" in part) == (0 in mine)
        assert torch.equal(part["video_position_ids"], whole["video_position_ids"])


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "ulysses", 2, 3), frames=5)
    model = Source.of(str(folder)).load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=5)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
