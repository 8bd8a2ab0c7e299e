"""What a sample says of the pixels of its images and videos is what Qwen's processor makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import Chats, read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.data.text import TextEncoder
from ds_lvx.training.model import Source
from tests.data.media import chat, write_jsonl, write_video

QWEN = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
SIZE = (200, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels")
    write_video(folder / "a.mp4")
    Image.effect_noise(SIZE, 90).convert("RGB").save(folder / "a.png")
    return folder


def maker(name: str) -> BatchMaker:
    source = Source.of(f"tiny:{name}")
    encoder = TextEncoder(source.processor, source.max_length(None), family=source.family)
    return BatchMaker(encoder, FrameRate(count=5), owned=range)


def asked(folder: Path, *parts: dict[str, Any]) -> Any:
    record = chat(*[(part["type"], part[part["type"]]) for part in parts])
    record["messages"][0]["content"] = [*parts, {"type": "text", "text": "What?"}]
    return read_conversations(write_jsonl(folder / "d.jsonl", record))[0]


@pytest.mark.parametrize("name", QWEN)
def test_an_image_has_the_pixels_that_its_line_says(folder: Path, name: str) -> None:
    made = maker(name)
    own = made.encoder.processor.images
    for said in ({"max_pixels": 4000}, {"min_pixels": 60_000, "max_pixels": 90_000}, {}):
        least, most = said.get("min_pixels", own.least), said.get("max_pixels", own.most)
        least, most = min(least, most), max(least, most)
        bounds = replace(own, least=min(own.least, most) if "min_pixels" not in said else least)
        theirs = Qwen2VLImageProcessorPil(
            patch_size=own.side,
            merge_size=own.merge,
            image_mean=own.mean,
            image_std=own.deviation,
            size={"shortest_edge": bounds.least, "longest_edge": most},
        )
        expected = theirs([Image.open(folder / "a.png")], return_tensors="pt")
        part = {"type": "image", "image": "a.png", **said}
        found = made.batch([asked(folder, part)]).inputs
        assert found["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist(), said
        torch.testing.assert_close(
            found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", QWEN)
def test_a_frame_has_the_pixels_that_its_line_says(folder: Path, name: str) -> None:
    made = maker(name)
    patches = made.encoder.processor.videos
    factor = patches.side * patches.merge
    for said in ({"min_pixels": 20_000, "max_pixels": 30_000}, {"max_pixels": 1500}):
        part = {"type": "video", "video": "a.mp4", "fps": 5, **said}
        both = made.batch([asked(folder, part, {"type": "video", "video": "a.mp4"})]).inputs
        grids = both["video_grid_thw"].tolist()
        height, width = smart_resize(48, 64, factor, said.get("min_pixels", 1), said["max_pixels"])
        assert grids[0] == [4, height // patches.side, width // patches.side]
        alone = made.batch([asked(folder, {"type": "video", "video": "a.mp4"})]).inputs
        assert grids[1:] == alone["video_grid_thw"].tolist()
        assert grids[1][1:] != grids[0][1:]
        rows = sum(t * h * w for t, h, w in grids)
        assert len(both["pixel_values_videos"]) == rows


def test_formats_say_them_too(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image><video>x"}, {"from": "gpt", "value": "y"}]
    record = {
        "conversations": turns,
        "images": [{"path": "a.png", "max_pixels": 900}],
        "videos": [{"path": "a.mp4", "min_pixels": 7, "max_pixels": 9, "fps": 2}],
    }
    image, video = Chats(write_jsonl(folder / "s.jsonl", record))[0].media
    assert (image.pixels, video.pixels, video.fps) == ((None, 900), (7, 9), 2)


def test_a_model_with_sizes_of_its_own_refuses_them(folder: Path) -> None:
    part = {"type": "image", "image": "a.png", "max_pixels": 900}
    for name in ("mllama", "internvl"):
        with pytest.raises(DataError, match=rf"d\.jsonl:1: got min_pixels or .*type '{name}'"):
            maker(name).sample(asked(folder, part))
