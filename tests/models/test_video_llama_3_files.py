"""VideoLLaMA 3 from a checkpoint's folder: text, pixels and what of a video is left out; and
fine-tuning on them."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
    VideoLlama3ImageProcessorPil,
)
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from ds_lvx.data.chat import read_conversations
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.data.media import chat, write_jsonl
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny

NAME = "video_llama_3"
PIXELS, VIDEO_PIXELS, MASK = "pixel_values", "pixel_values_videos", "video_compression_mask"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp(NAME), NAME)
    frames = [f"{n}.png" for n in range(7)]
    for name, picture in zip(frames, film(7), strict=True):
        picture.save(folder / name)
    write_jsonl(
        folder / "train.jsonl",
        chat(("video", frames), ("text", "What changes?"), answer="A corner."),
        chat(("text", "Look"), ("image", "a.png"), ("video", frames), answer="Yes"),
    )
    return folder


def film(count: int) -> list[Any]:
    """Pictures of which a corner changes every other time, another once, and a third hardly, but
    each time more."""
    first = Image.effect_noise((40, 24), 90).convert("RGB")
    first.paste((100, 100, 100), (24, 0, 40, 14))
    found = []
    for n in range(count):
        picture = first.copy()
        picture.paste((30 * (n // 2), 0, 9), (0, 0, 12, 8))
        for place in range(min(n * n, 16 * 14)):
            picture.putpixel((24 + place % 16, place // 16), (101, 101, 101))
        if n > 2:
            picture.paste((200, 0, 200), (30, 16, 40, 24))
        found.append(picture)
    return found


def test_pixels_of_images_are_those_of_the_model_s_processor(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    theirs = VideoLlama3ImageProcessorPil(**settings)
    for size in ((40, 24), (200, 90), (16, 16), (9, 31)):
        image = Image.effect_noise(size, 90).convert("RGB")
        expected = theirs([image], return_tensors="pt")
        shown = processor.shown(Medium(None, (size[1], size[0])))
        grid = processor.grid(Medium(None, (size[1], size[0])))
        assert [1, *grid] == expected["image_grid_thw"][0].tolist()
        assert (shown.text, shown.tokens) == ("<|image_pad|>\n", (grid[0] * grid[1],))
        assert expected["image_merge_sizes"].tolist() == [processor.images.merge]
        made = processor.images.rows([image], grid, dtype=torch.float32)
        torch.testing.assert_close(made, expected[PIXELS], atol=1e-5, rtol=1e-5)


def of_videos() -> Any:
    """transformers' video processor: its module wants torchvision, what is asked here does not."""
    importlib.import_module("transformers.video_processing_utils")  # which looks for torchvision
    parts = ["torchvision", "transforms", "v2", "functional"]
    found: dict[str, Any] = {}
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        found[name] = ModuleType(name)
        if n < len(parts):
            setattr(found[name], parts[n], found[f"{name}.{parts[n]}"])
    with mock.patch.dict(sys.modules, found):
        module = "transformers.models.video_llama_3.video_processing_video_llama_3"
        return importlib.import_module(module).VideoLlama3VideoProcessor


@pytest.mark.parametrize("compresses", [True, False])
def test_a_video_s_text_and_tokens_are_those_of_the_model_s_processor(
    compresses: bool, folder: Path
) -> None:
    own, processor = of_videos(), Source.of(str(folder)).processor
    processor.compresses = compresses
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    sizes: Any = SimpleNamespace(**settings, temporal_patch_size=1, merge_size=2)
    theirs: Any = SimpleNamespace(video_token=processor.video_token)
    free = (None, None)
    for count, pixels in ((5, free), (2, free), (1, free), (16, (600, 2000))):
        pictures, times = film(count), tuple(3 * n / 25 for n in range(count))
        medium = Medium(times, (24, 40), pixels=pixels, decoded=lambda p=pictures: iter(p))
        shown, grid = processor.shown(medium), processor.grid(medium)
        if pixels == free:
            patches = own.get_num_of_video_patches(sizes, count, 24, 40, {})
            assert count * grid[0] * grid[1] == patches
        rows = [processor.videos.rows([each], grid, dtype=torch.float32) for each in pictures]
        grids, merges = torch.tensor([[count, *grid]]), torch.tensor([2])
        mask = torch.ones(count * grid[0] * grid[1] // 4, dtype=torch.bool)
        if compresses:
            mask = own._get_compression_mask(None, torch.cat(rows), grids, merges)
            assert count == 1 or not mask.all()
        assert shown.tokens == (*mask.view(count, -1).sum(dim=1).tolist(),)
        given = {
            "video_grid_thw": grids,
            "video_merge_sizes": merges,
            MASK: mask,
            "video_metadata": [SimpleNamespace(fps=25, timestamps=times)],
        }
        written = VideoLlama3Processor.replace_video_token(theirs, given, 0)
        pieces = shown.text.removesuffix("\n").split(processor.video_token)
        assert len(pieces) == count + 1
        expanded = "".join(
            piece + processor.video_token * tokens
            for piece, tokens in zip(pieces, shown.tokens, strict=False)
        )
        assert expanded == written


def test_a_conversation_becomes_a_batch_of_the_model(folder: Path) -> None:
    """Of a video there is less in the text than its frames have."""
    conversations = read_conversations(folder / "train.jsonl")
    maker = maker_of(folder, frames=5)
    batch = maker.batch(conversations).inputs
    assert batch["image_merge_sizes"].tolist() == [1]
    assert batch["video_merge_sizes"].tolist() == [2, 2]
    first, _ = batch[MASK].chunk(2)
    tokens = [n for shown in maker.sample(conversations[0]).shown for n in shown.tokens]
    assert tokens == first.view(5, -1).sum(dim=1).tolist()
    assert 5 < sum(tokens) < len(first)
    model = Source.of(str(folder)).load(torch.float32)
    shard_batch(batch, model=model)  # which checks text and pixels


def test_each_rank_decodes_its_own_pixels(folder: Path) -> None:
    conversations = read_conversations(folder / "train.jsonl")[1:]
    maker = maker_of(folder, frames=6)
    whole = maker.batch(conversations).inputs
    tokens = [n for shown in maker.sample(conversations[0]).shown for n in shown.tokens]
    owned, held = FAMILIES.named(NAME).owned, []
    frames = whole[VIDEO_PIXELS].view(6, -1, whole[VIDEO_PIXELS].shape[1])
    for rank in range(3):
        mine = owned(tokens, rank=rank, size=3)
        deal = partial(owned, rank=rank, size=3)
        part = maker_of(folder, frames=6, deal=deal).batch(conversations).inputs
        here = [unit - 1 for unit in mine if unit > 0]
        assert not here or torch.equal(part[VIDEO_PIXELS], frames[here].flatten(0, 1))
        assert torch.equal(part[PIXELS], whole[PIXELS]) if 0 in mine else PIXELS not in part
        assert torch.equal(part[MASK], whole[MASK])
        assert torch.equal(part["input_ids"], whole["input_ids"])
        held += mine
    assert sorted(held) == [*range(7)]


def test_a_frame_that_cannot_be_decoded_is_black_on_all_ranks(folder: Path) -> None:
    """In the text of each, too, whether it holds the frame or not."""
    film(5)[4].save(folder / "cut.jpg")
    raw = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(raw[:-300])
    frames = [*(f"{n}.png" for n in range(4)), "cut.jpg", "5.png"]
    line = write_jsonl(folder / "cut.jsonl", chat(("video", frames), ("text", "?")))
    conversations = read_conversations(line)
    with pytest.raises(ValueError, match=r"cut.jsonl:1: .*cut\.jpg"):
        maker_of(folder, frames=6).batch(conversations)
    parts = [
        maker_of(folder, frames=6, skip=True, deal=lambda tokens, here=here: here).batch(
            conversations
        )
        for here in ([0, 1], [2, 3, 4, 5])
    ]
    assert [len(part.failed) for part in parts] == [0, 1]
    first, second = (part.inputs for part in parts)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first[MASK], second[MASK])
    shown = [mask.sum().item() for mask in first[MASK].view(6, -1)]
    assert shown[4] == shown[0] > 1  # a black one is new, and those behind it are as it is
    assert shown[5] == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path, ranks: int) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "lvx", ranks, 3), frames=7, ranks=ranks)
    source = Source.of(str(folder))
    model = source.load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=7)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.videos == source.processor.videos
