"""SmolVLM from a checkpoint's folder: its text and pixels, and fine-tuning on them; random weights
for `ds-lvx compare`."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_lvx.compare.case import cut, random_case
from ds_lvx.data.chat import read_conversations
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.models.smolvlm.processor import in_words
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.models.compare_case import compared
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny

NAME = "smolvlm"
AROUND = "<fake_token_around_image>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(NAME), NAME, sides=(60, 20))


def test_text_is_that_of_transformers_processor(folder: Path) -> None:
    """`get_image_prompt_string`, and `replace_video_token`, of its SmolVLM."""
    processor = Source.of(str(folder)).processor
    shown, tile = processor.shown(Medium(None, (20, 60))), "<image>"
    first, second = (
        "".join(f"{AROUND}<row_{row}_col_{n}>{tile}" for n in (1, 2, 3)) + "\n" for row in (1, 2)
    )
    whole = f"{AROUND}<global-img>{tile}{AROUND}"
    assert processor.grid(20, 60) == (1, 3)
    assert shown.text == f"{first}\n{whole}"
    assert (shown.frames, shown.tokens) == ((1, 0, 0, 0), (4,) * 4)
    assert processor.shown(Medium(None, (28, 60))).text == f"{first}{second}\n{whole}"
    shown = processor.shown(Medium((0.0, 61.5), (20, 60)))
    assert shown.text == (
        "You are provided the following series of two frames from a 0:01:01 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{whole}\nFrame from 01:01:{whole}\n\n"
    )
    assert shown.frames == (1, 1)


def test_an_image_is_cut_to_as_many_tiles_as_are_counted(folder: Path) -> None:
    processor, rng = Source.of(str(folder)).processor, random.Random(0)
    sides = [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(60)]
    for height, width in [*sides, (16, 16), (17, 16), (48, 17), (33, 48)]:
        picture = Image.effect_noise((width, height), 90).convert("RGB")
        made = processor.images(picture, return_tensors="pt", return_row_col_info=True)
        found = made["rows"][0][0], made["cols"][0][0]
        assert processor.grid(height, width) == found, (height, width)
        assert made["pixel_values"].shape[1] == found[0] * found[1] + 1


def test_numbers_are_written_as_num2words_does() -> None:
    numbers = {
        0: "zero",
        21: "twenty-one",
        40: "forty",
        105: "one hundred and five",
        1000: "one thousand",
        1024: "one thousand and twenty-four",
        3600: "three thousand, six hundred",
        12_345: "twelve thousand, three hundred and forty-five",
    }
    assert {number: in_words(number) for number in numbers} == numbers


def test_tiles_of_another_size_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    settings = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"max_image_size 32 .* tiles of 16"):
        Source.of(str(other))


def test_a_conversation_becomes_a_batch_of_which_ranks_decode_their_own(folder: Path) -> None:
    conversations = read_conversations(folder / "train.jsonl")
    batch = maker_of(folder, frames=6).batch(conversations).inputs
    assert batch["pixel_values"].shape == (2, 4 + 6, 3, 16, 16)
    shard_batch(batch, model=Source.of(str(folder)).load(torch.float32))  # checks text and pixels
    whole, owned = batch["pixel_values"][1], FAMILIES.named(NAME).owned
    for rank in range(3):
        mine = owned([4] * 10, rank=rank, size=3)
        maker = maker_of(folder, frames=6, deal=partial(owned, rank=rank, size=3))
        part = maker.batch(conversations[1:]).inputs["pixel_values"]
        assert torch.equal(part[0], whole[mine])


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(folder, tmp_path, rules(NAME, "lvx", 2, 3), frames=7)
    model = Source.of(str(folder)).load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=7)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]


@pytest.mark.parametrize("name", [NAME, "idefics3"])
def test_a_comparison_trains_a_model_of_random_weights(name: str) -> None:
    case = cut(random_case(name), hidden=256, cross_layers=2, vision_layers=2)
    assert (case.heads, case.kv_heads, case.self_layers, case.frame_tokens) == (4, 4, 0, 81)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 16}
    case = replace(case, **sizes, patch_size=4, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(case, frames=3, method="ring")
    assert layout.text_lengths == (3 * 4 + 8,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    assert (published.image_token_id, published.scale_factor) == (49_190, 3)
    assert family.frame_tokens(published) == 81
    made = family.dimensions(published.to_dict(), "mine", "config.json")
    assert (made.frame_tokens, made.tower_tokens, made.cross.count) == (81, 27**2, 24)
    config = family.tiny()[0]
    model = family.build(config, gate=1.0, dtype=torch.float32)
    counted = family.dimensions(config.to_dict(), "tiny", "config.json").parameters
    matrices = {id(p): p.numel() for n, p in model.named_parameters() if p.ndim == 2}
    positions = model.model.vision_model.embeddings.position_embedding.weight.numel()
    assert counted == sum(matrices.values()) - positions
