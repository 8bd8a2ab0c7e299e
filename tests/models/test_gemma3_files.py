"""Gemma 3 from a checkpoint's folder: its text and pixels, and fine-tuning on them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from ds_lvx.data.chat import read_conversations
from ds_lvx.data.template import ChatTemplate
from ds_lvx.models.media import Medium, Shown
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny

NAME = "gemma3"
IMAGE = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(NAME), NAME)


def test_text_and_pixels_are_those_of_transformers_own_processor(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    tokenizer = processor.tokenizer
    for name, token in zip(("boi", "image", "eoi"), IMAGE.strip()[1:-1].split("><"), strict=True):
        setattr(tokenizer, f"{name}_token", f"<{token}>")
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<{token}>"))
    size = {"height": 16, "width": 16}
    own = Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, image_seq_length=4)
    picture = Image.effect_noise((60, 20), 90).convert("RGB")
    text = "<bos><start_of_turn>user\nLook<start_of_image>here<start_of_image><end_of_turn>\n"
    expected = own(images=[[picture] * 2], text=[text], return_tensors="pt")
    written = text.replace("<start_of_image>", processor.shown(Medium(None, (20, 60))).text)
    ids = tokenizer(written, add_special_tokens=False).input_ids
    ids = [x for each in ids for x in [each] * (4 if each == processor.image_token_id else 1)]
    assert expected["input_ids"][0].tolist() == ids
    made = FAMILIES.named(NAME).inputs(processor, ids, ids)
    assert expected["token_type_ids"][0].tolist() == made["token_type_ids"]
    pixels = processor.images(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(expected["pixel_values"][1:], pixels)


@pytest.mark.parametrize("settings", [{"resample": 0}, {"do_normalize": False}])
def test_settings_of_pixels_are_those_of_the_files(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    other, size = tmp_path / "model", {"size": {"height": 16, "width": 16}}
    shutil.copytree(folder, other)
    settings = {**size, "image_mean": None, **settings}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = Image.effect_noise((60, 20), 90).convert("RGB")
    del settings["image_mean"]
    expected = Gemma3ImageProcessorPil(**settings)(picture, return_tensors="pt")
    found = Source.of(str(other)).processor.images(picture, return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_a_frame_of_a_video_is_an_image(folder: Path) -> None:
    shown = Source.of(str(folder)).processor.shown(Medium((0.0, 0.5), (20, 60)))
    assert shown == Shown(IMAGE * 2, (1, 1), (4, 4))


def test_white_space_around_an_image_is_kept(folder: Path) -> None:
    """By a template that strips what it is given: processors write images behind it."""
    template = ChatTemplate.of(Source.of(str(folder)).processor)
    conversation = read_conversations(folder / "train.jsonl")[1]
    written, ((start, end),) = template.write(conversation, [IMAGE, IMAGE * 2])
    turn = f"<bos><start_of_turn>user\nLook{IMAGE * 3}<end_of_turn>\n"
    assert written.startswith(turn)
    assert written[start:end] == "Yes"


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("processor_config.json", {"image_seq_length": 256}, "256 tokens"),
        ("preprocessor_config.json", {"size": {"height": 8, "width": 8}}, "of .*8.* and 4 tokens"),
        ("preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan"),
    ],
)
def test_files_that_are_not_the_model_s(
    folder: Path, tmp_path: Path, name: str, settings: dict[str, object], error: str
) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    (other / name).write_text(json.dumps(settings))
    with pytest.raises((ValueError, NotImplementedError), match=error):
        Source.of(str(other))


def test_a_conversation_becomes_a_batch_of_the_model(folder: Path) -> None:
    batch = maker_of(folder, frames=5).batch(read_conversations(folder / "train.jsonl")).inputs
    assert batch["pixel_values"].shape == (5 + 1 + 5, 3, 16, 16)
    assert int(batch["token_type_ids"].sum()) == 4 * 11
    model = Source.of(str(folder)).load(torch.float32)
    shard_batch(batch, model=model)  # which checks text and pixels


def test_each_rank_decodes_its_own_images(folder: Path) -> None:
    conversations = read_conversations(folder / "train.jsonl")[1:]
    whole = maker_of(folder, frames=6).batch(conversations).inputs["pixel_values"]
    owned = FAMILIES.named(NAME).owned
    for rank in range(3):
        mine = owned([4] * 7, rank=rank, size=3)
        maker = maker_of(folder, frames=6, deal=partial(owned, rank=rank, size=3))
        part = maker.batch(conversations).inputs["pixel_values"]
        assert torch.equal(part, whole[mine])


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "lvx", 2, 3), frames=7)
    model = Source.of(str(folder)).load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=7)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
