"""Qwen3-VL from a checkpoint's folder: its text and pixels, and fine-tuning on them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from ds_lvx.compare.case import (
    cut,
    random_case,
)
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.data.media import chat, write_jsonl
from tests.models.compare_case import compared, parts_of
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny
from tests.models.qwen2_5_vl_case import types_by

NAME = "qwen3_vl"
IMAGE_SETTINGS: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""What every published checkpoint's files say."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(NAME), NAME)


def test_pixels_are_those_of_the_model_s_processor(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    theirs = Qwen2VLImageProcessorPil(**settings, **IMAGE_SETTINGS)
    for size in ((40, 24), (200, 90), (16, 16)):
        image = Image.effect_noise(size, 90).convert("RGB")
        expected = theirs([image], return_tensors="pt")
        grid = processor.images.grid(size[1], size[0])
        assert [1, *grid] == expected["image_grid_thw"][0].tolist()
        made = processor.images.rows([image], grid, dtype=torch.float32)
        torch.testing.assert_close(made, expected["pixel_values"], atol=1e-5, rtol=1e-5)


def test_a_video_s_text_and_sizes_are_those_of_the_model_s_processor(folder: Path) -> None:
    """transformers' own needs torchvision; what it does with numbers does not."""
    processor = Source.of(str(folder)).processor
    theirs = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
    )
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    sizes = SimpleNamespace(
        **settings, temporal_patch_size=2, cap_pixels_per_frame=False, max_video_tokens=768
    )
    count_patches: Any = Qwen3VLVideoProcessor.get_num_of_video_patches
    replace: Any = Qwen3VLProcessor.replace_video_token
    for frames, sides in ((5, (40, 24)), (2, (64, 64)), (8, (200, 90)), (16, (100, 300))):
        times = tuple(3 * n / 25 for n in range(frames))
        shown = processor.shown(Medium(times, sides))
        patches = count_patches(sizes, frames, *sides)
        assert sum(shown.tokens) * 4 == patches
        metadata = SimpleNamespace(fps=25, frames_indices=[3 * n for n in range(frames)])
        grid = processor.grid(Medium(times, sides))
        given = {
            "video_grid_thw": torch.tensor([[len(shown.tokens), *grid]]),
            "video_metadata": [metadata],
        }
        expanded = shown.text.replace("<|video_pad|>", "<|video_pad|>" * shown.tokens[0])
        assert expanded == f"<|vision_start|>{replace(theirs, given, 0)}<|vision_end|>"


def test_a_cap_on_a_frame_s_pixels_counts(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    medium = Medium((0.0, 0.5), (160, 160))
    assert processor.grid(medium) == (20, 20)
    processor.of_videos.update(cap_pixels_per_frame=True, max_video_tokens=16)
    assert processor.grid(medium) == (8, 8)


def test_a_conversation_becomes_a_batch_of_the_model(folder: Path) -> None:
    maker = maker_of(folder, frames=5)
    batch = maker.batch(read_conversations(folder / "train.jsonl")).inputs
    decode = maker.encoder.tokenizer.decode
    assert decode(batch["labels"][1][batch["labels"][1] >= 0]) == "Yes<|im_end|>"
    assert batch["video_grid_thw"][:, 0].tolist() == [3, 3]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert len(batch["pixel_values"]) == 16
    assert len(batch["pixel_values_videos"]) == int(batch["video_grid_thw"].prod(dim=1).sum())
    model = Source.of(str(folder)).load(torch.float32)
    shard_batch(batch, model=model)  # which checks text, grids and pixels


def test_each_rank_decodes_its_own_frames(folder: Path) -> None:
    """Early ones and late ones, whole temporal patches; together they are all."""
    conversations = read_conversations(folder / "train.jsonl")[:1]
    whole = maker_of(folder, frames=16).batch(conversations).inputs
    each = len(whole["pixel_values_videos"]) // 8
    patches = whole["pixel_values_videos"].split(each)
    for rank, units in enumerate(([0, 1, 6, 7], [2, 3, 4, 5])):
        deal = partial(FAMILIES.named(NAME).owned, rank=rank, size=2)
        maker = maker_of(folder, frames=16, deal=deal)
        part = maker.batch(conversations).inputs
        assert torch.equal(
            part["pixel_values_videos"], torch.cat([patches[unit] for unit in units])
        )
        assert torch.equal(part["input_ids"], whole["input_ids"])


def test_a_text_that_says_a_placeholder_is_refused(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "bad.jsonl", chat(("text", "<|video_pad|>?"), answer="Yes"))
    (conversation,) = read_conversations(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"got 1 <\|image_pad\|> or <\|video_pad\|> in the text"):
        maker_of(folder, frames=2).sample(conversation)


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    case = cut(random_case(NAME), hidden=256, cross_layers=2, vision_layers=2)
    assert (case.heads, case.kv_heads, case.self_layers, case.frame_tokens) == (2, 2, 0, 576)
    sizes = {
        "vision_hidden": 32,
        "vision_heads": 2,
        "vision_mlp": 64,
        "image_size": 16,
        "patch_size": 2,
    }
    case = replace(case, **sizes, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(case, frames=2, method="ring")
    assert layout.text_lengths == (2 * (16 + 2) + 8,)
    silent = {name for name, each in model.named_parameters() if not each.grad.any()}
    assert silent == set()
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    assert published.video_token_id == 151_656


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path, ranks: int) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "lvx", ranks, 3), frames=7, ranks=ranks)
    source, start = Source.of(str(folder)), []
    for batch in whole_batches(folder, frames=7):
        types = types_by(batch["input_ids"], source.config)
        model = source.load(torch.float32)
        start.append(model(**batch, mm_token_type_ids=types).loss.item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.videos == source.processor.videos
