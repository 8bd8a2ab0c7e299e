"""idefics from a checkpoint's folder: its own processor's text, pixels and mask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_lvx.compare.case import (
    cut,
    random_case,
)
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.registry import FAMILIES
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import write_config
from tests.models import idefics_case
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, whole_batches, write_samples
from tests.models.idefics_case import tiny_model

FAKE = "<fake_token_around_image>"


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint, and two samples."""
    own = FAMILIES.named("idefics").tiny()[1].own
    own.save_pretrained(folder)
    added = {"vocab_size": len(own.tokenizer) - 2, "additional_vocab_size": 2}
    tiny_model(**added, max_position_embeddings=512).save_pretrained(folder)
    return write_samples(folder, answer="It is green.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("idefics"))


def test_text_pixels_and_mask_are_those_of_the_model_s_processor(folder: Path) -> None:
    processor = Source.of(str(folder)).processor
    image = Image.open(folder / "a.png")
    theirs = processor.own(text=[["Look", image, image, "end</s>a", image, "b"]])
    ids, mask = theirs["input_ids"], theirs["image_attention_mask"]
    mine = FAMILIES.named("idefics").frames(
        processor, ids, [[image] * 3], count=3, dtype=torch.float32
    )
    start, end = mine["visible_images"].unbind(dim=-1)
    index = torch.arange(3)
    seen = (start[..., None] <= index) & (index < end[..., None])
    assert torch.equal(seen, mask.bool())
    assert not seen.any(dim=-1).all()
    torch.testing.assert_close(mine["pixel_values"], theirs["pixel_values"])
    ids = whole_batches(folder, frames=3)[1]["input_ids"][0]
    assert processor.tokenizer.decode(ids) == (
        f"<s>User: Look{FAKE}<image>{FAKE}{FAKE}<image>{FAKE}<image>{FAKE}<image>{FAKE}\n"
        "Assistant: It is green.</s>\n"
    )


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    case = cut(random_case("idefics"), hidden=256, cross_layers=1, self_layers=2, vision_layers=1)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 28}
    case = replace(case, **sizes, vocabulary=96, text_tokens=8)
    model, layout = compared(case, frames=2, method="lvx", recompute=True)
    assert layout.kv_lengths == (2 * case.frame_tokens,)
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all("post_layernorm" in name for name in silent)
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}


def test_a_tiny_one_is_made_of_nothing(folder: Path) -> None:
    source = Source.of("tiny:idefics")
    source.check_tokenizer()
    model = source.load(torch.float32)
    config = idefics_case.ds_config(stage=0, sp_size=1, cross={"method": "lvx"}, self_attn="ring")
    patched_by(config, model)
    gates = [p for name, p in model.named_parameters() if "alpha_" in name]
    assert len(gates) == 4
    assert all(bool((gate == 0.5).all()) for gate in gates)
    encoder = TextEncoder(source.processor, source.max_length(None), family=source.family)
    maker = BatchMaker(encoder, FrameRate(count=3), owned=range)
    conversations = read_conversations(folder / "train.jsonl")
    batch = dict(maker.batch([conversations[1]]).inputs)
    model(**shard_batch(batch, model=model, frames="local")).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all("post_layernorm" in name for name in silent)


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=3)).read_text())
    config["ds_lvx"]["layers"][2]["match"] = FAMILIES.named("idefics").patterns["self"]
    loss = first_loss(folder, tmp_path, config, frames=3)
    source = Source.of(str(folder))
    start = []
    for batch in whole_batches(folder, frames=3):
        model, labels = source.load(torch.float32), batch.pop("labels")
        seen = batch.pop("visible_images")
        index = torch.arange(batch["pixel_values"].shape[1])
        mask = (seen[..., :1] <= index) & (index < seen[..., 1:])
        logits = model(**batch, image_attention_mask=mask).logits[0, :-1]
        start.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:]).item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.image_token_id == source.processor.image_token_id
