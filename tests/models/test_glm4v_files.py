"""GLM-4.1V and GLM-4.6V from a checkpoint's folder: text and pixels, and fine-tuning on them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor

from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.training.model import Source
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, whole_batches, write_tiny
from tests.models.glm4v_case import for_one_process, token_types

CLASSES: dict[str, Any] = {"glm4v": Glm4vProcessor, "glm46v": Glm46VProcessor}


def write_checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint with the settings of transformers' image processor, and two samples."""
    write_tiny(folder, name)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    Glm4vImageProcessorPil(**settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("glm4v"), "glm4v")


def test_pixels_are_those_of_the_model_s_processor(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    theirs = Glm4vImageProcessorPil.from_pretrained(folder)
    for size in ((40, 24), (200, 90), (16, 16), (9, 31)):
        image = Image.effect_noise(size, 90).convert("RGB")
        expected = theirs([image], return_tensors="pt")
        for bounds, pixels in (((None, None), {}), ((300, 700), {"least": 600, "most": 1400})):
            if pixels:
                edges = {"shortest_edge": pixels["least"], "longest_edge": pixels["most"]}
                expected = theirs([image], size=edges, return_tensors="pt")
            grid = processor.grid(Medium(None, (size[1], size[0]), pixels=bounds))
            assert [1, *grid] == expected["image_grid_thw"][0].tolist()
            made = processor.images.rows([image], grid, dtype=torch.float32)
            torch.testing.assert_close(made, expected["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_a_video_s_text_and_sizes_are_those_of_the_model_s_processor(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """transformers' own needs torchvision; what it does with numbers does not."""
    FAMILIES.named(name).tiny()[1].save_pretrained(tmp_path)
    processor = FAMILIES.named(name).load_processor(str(tmp_path))
    theirs: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2), image_token=processor.image_token
    )
    theirs.replace_frame_token_id = partial(CLASSES[name].replace_frame_token_id, theirs)
    settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    sizes: Any = SimpleNamespace(**settings, temporal_patch_size=2)
    for frames, sides in ((5, (40, 24)), (2, (64, 64)), (1, (9, 31)), (16, (100, 300))):
        times = tuple(3 * n / 25 for n in range(frames))
        shown = processor.shown(Medium(times, sides))
        patches = Glm4vVideoProcessor.get_num_of_video_patches(sizes, max(frames, 2), *sides)
        assert sum(shown.tokens) * 4 == patches
        grid = processor.grid(Medium(times, sides))
        given = {
            "video_grid_thw": torch.tensor([[len(shown.tokens), *grid]]),
            "video_metadata": [SimpleNamespace(fps=25, timestamps=times)],
        }
        own = CLASSES[name].replace_video_token(theirs, given, 0)
        token = processor.image_token
        expanded = shown.text.replace(token, token * shown.tokens[0])
        assert expanded == f"<|begin_of_video|>{own}<|end_of_video|>"


def test_a_checkpoint_s_processor_says_how_times_are_written(tmp_path: Path) -> None:
    """Also where the model is GLM-4.1V's."""
    processor = FAMILIES.named("glm4v").tiny()[1]
    assert "<|end_of_image|>1<|end_of_video|>" in processor.shown(Medium((1.25,), (32, 32))).text
    processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    said = {**json.loads(path.read_text()), "processor_class": "Glm46VProcessor"}
    path.write_text(json.dumps(said))
    found = FAMILIES.named("glm4v").load_processor(str(tmp_path))
    assert "1.2 seconds<|end_of_video|>" in found.shown(Medium((1.25,), (32, 32))).text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("glm4v", 2),
        pytest.param("glm4v", 3, marks=pytest.mark.exhaustive),
        pytest.param("glm46v", 2, marks=pytest.mark.exhaustive),
        pytest.param("glm4v_moe", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path, name: str, ranks: int) -> None:
    if name != "glm4v":
        folder = tmp_path / "start"
        folder.mkdir()
        write_checkpoint(folder, name)
    loss = first_loss(folder, tmp_path, rules(name, "lvx", ranks, 3), frames=7, ranks=ranks)
    source, start = Source.of(str(folder)), []
    for batch in whole_batches(folder, frames=7):
        types = token_types(batch["input_ids"], source.config.to_dict())
        batch = for_one_process({**batch, "mm_token_type_ids": types})
        start.append(source.load(torch.float32)(**batch).loss.item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.videos == source.processor.videos
