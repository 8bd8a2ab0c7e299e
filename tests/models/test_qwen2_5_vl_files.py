"""Qwen2.5-VL from a checkpoint's folder: its text and pixels, and fine-tuning on them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_lvx.compare.case import (
    cut,
    random_case,
)
from ds_lvx.data.batch import FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.asking import Prompts
from ds_lvx.training.model import Source
from tests.data.media import chat, write_jsonl
from tests.launch.finetune_runs import arguments
from tests.launch.test_generate import run_chat
from tests.models.compare_case import compared, parts_of
from tests.models.concatenated_case import rules
from tests.models.files_case import first_loss, maker_of, whole_batches, write_tiny
from tests.models.qwen2_5_vl_case import types_by
from tests.ranks import run_ranks

NAME = "qwen2_5_vl"


def write_checkpoint(folder: Path, name: str = NAME) -> Path:
    """A checkpoint, and two samples."""
    return write_tiny(folder, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(NAME))


def test_pixels_are_those_of_the_model_s_processor(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    theirs = Qwen2VLImageProcessorPil(**settings)
    for size in ((40, 24), (200, 90), (16, 16)):
        image = Image.effect_noise(size, 90).convert("RGB")
        expected = theirs([image], return_tensors="pt")
        grid = processor.images.grid(size[1], size[0])
        assert [1, *grid] == expected["image_grid_thw"][0].tolist()
        made = processor.images.rows([image], grid, dtype=torch.float32)
        torch.testing.assert_close(made, expected["pixel_values"], atol=1e-5, rtol=1e-5)


def test_a_video_s_patches_have_two_frames_each(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    black, white = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")
    rows = processor.videos.rows([black, white], (4, 4), dtype=torch.float32)
    first, second = rows.view(16, 3, 2, -1).unbind(dim=2)
    assert (first < 0).all()
    assert (second > 0).all()
    shown = processor.shown(Medium((0.0, 0.5, 1.0), (32, 32)))
    assert (shown.frames, shown.tokens) == ((2, 1), (4, 4))
    assert shown.text == "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"


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
    assert batch["second_per_grid_ts"].shape == (2,)


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
    assert (case.heads, case.kv_heads, case.self_layers, case.frame_tokens) == (2, 2, 0, 256)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "patch_size": 2}
    case = replace(case, **sizes, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(case, frames=2, method="ring")
    assert layout.text_lengths == (2 * 256 + 9,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named(NAME)
    published = family.config(family.size())
    assert family.size(published) == family.size()
    assert published.video_token_id == 151_656


def answer(folder: Path, data: Path, *, frames: int, tokens: int) -> str:
    """What one process answers in the place of a chat's last answer, everything encoded anew."""
    source = Source.of(str(folder))
    encoder = TextEncoder(source.processor, 2048, family=source.family)
    prompts = Prompts(encoder, FrameRate(count=frames), owned=range)
    batch = dict(prompts.batch(read_conversations(data)[:1]).inputs)
    ids, config = batch["input_ids"], source.config
    types = types_by(ids, config)
    model = source.load(torch.float32).eval()
    del batch["labels"]
    words = {"max_new_tokens": tokens, "do_sample": False, **prompts.ending(model)}
    out = model.generate(**batch, mm_token_type_ids=types, **words)
    text: str = encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.slow
def test_a_chat_answers_as_whole_conversations_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(rules(NAME, "lvx", 2)))
    out, asked = tmp_path / "answers.jsonl", ["What animal?", "And now?"]
    given = {
        "model": folder,
        "deepspeed_config": tmp_path / "ds.json",
        "frames": 7,
        "max_new_tokens": 5,
        "video": folder / "a.mp4",
        "chat": True,
        "prompt": asked[0],
        "output": out,
        "traceback": True,
    }
    assert run_ranks(run_chat, 2, asked[1], *arguments(**given)) == [0, 0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question"] for record in records] == asked
    messages = chat(("video", str(folder / "a.mp4")), ("text", asked[0]), answer="?")
    for record in records:
        write_jsonl(tmp_path / "chat.jsonl", messages)
        found = answer(folder, tmp_path / "chat.jsonl", frames=7, tokens=5)
        assert record["answer"] == found
        messages["messages"][-1]["content"] = found
        messages["messages"] += chat(("text", asked[1]), answer="?")["messages"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        (NAME, 2),
        pytest.param(NAME, 3, marks=pytest.mark.exhaustive),
        pytest.param("qwen2_vl", 2, marks=pytest.mark.exhaustive),
        pytest.param("qwen3_vl_moe", 2, marks=pytest.mark.exhaustive),
        pytest.param("qwen3_5", 2, marks=pytest.mark.exhaustive),
        pytest.param("qwen3_5_moe", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_finetune_trains_a_checkpoint(tmp_path: Path, name: str, ranks: int) -> None:
    folder = tmp_path / "start"
    folder.mkdir()
    write_checkpoint(folder, name)
    loss = first_loss(
        folder,
        tmp_path,
        rules(name, "lvx", ranks, 3),
        frames=7,
        ranks=ranks,
        eval_data=folder / "train.jsonl",
        eval_steps=1,
        eval_generate=1,
        eval_new_tokens=5,
    )
    (row,) = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    saved = tmp_path / "out" / "model"
    found = answer(saved, folder / "train.jsonl", frames=7, tokens=5)
    assert json.loads(row)["answer"] == found
    source, start = Source.of(str(folder)), []
    for batch in whole_batches(folder, frames=7):
        types = types_by(batch["input_ids"], source.config)
        model = source.load(torch.float32)
        start.append(model(**batch, mm_token_type_ids=types).loss.item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.videos == source.processor.videos
