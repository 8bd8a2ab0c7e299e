"""OpenFlamingo from the files of its package, and from the folder that these become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ds_lvx.compare.case import (
    cut,
    random_case,
)
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.openflamingo.convert import main
from ds_lvx.models.openflamingo.model import VisionEncoder
from ds_lvx.models.registry import FAMILIES
from ds_lvx.plan import models as planned
from ds_lvx.sharding import shard_batch
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import write_config
from tests.models import openflamingo_case
from tests.models.alone_case import patched_by
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, whole_batches, write_samples
from tests.models.openflamingo_case import SIZE, LlamaFlamingo, Model, MptFlamingo, NeoXFlamingo

ROWS = 260  # bytes, <pad>, <|endoftext|>, and the package's two tokens
IMAGE = ROWS - 1
LANGUAGES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig, LlamaFlamingo),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, NeoXFlamingo),
    "mpt": (MptForCausalLM, MptConfig, MptFlamingo),
}


def write_parts(folder: Path, language: str) -> Model:
    """Language model, CLIP and what the package trained; returns the package's model of them."""
    own, config, flamingo = LANGUAGES[language]
    tokenizer = byte_tokenizer(
        ("<pad>", "<|endoftext|>"), eos_token="<|endoftext|>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "language")
    text: dict[str, Any] = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "initializer_range": 0.15}
    if language != "mpt":
        text["intermediate_size"] = 128
    torch.manual_seed(1)
    own(config(**text)).save_pretrained(folder / "language")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": 14}
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(folder / "vision")
    sides = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=sides)
    images.save_pretrained(folder / "vision")
    found = own.from_pretrained(folder / "language")
    lang_encoder = flamingo(found.config)
    lang_encoder.load_state_dict(found.state_dict())
    lang_encoder.resize_token_embeddings(ROWS, mean_resizing=False)
    tower = VisionEncoder.from_pretrained(folder / "vision")
    model = Model(
        tower, lang_encoder, IMAGE, width=16, latents=3, every=2, dim_head=4, heads=8
    ).eval()
    parts = (".perceiver.", ".gated_cross_attn_layer.", ".wte.", ".embed_in.", ".embed_tokens.")
    parts = (*parts, ".lm_head.") if language == "gpt_neox" else parts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
            elif any(each in f".{name}" for each in parts):
                parameter.normal_(std=0.2)
    again = ("old_decoder_blocks.", "gated_cross_attn_layers.")
    # As transformers called the head of a GPT-NeoX then.
    trained = {
        "module." + name.replace("r.lm_head.", "r.embed_out."): value
        for name, value in model.state_dict().items()
        if any(each in f".{name}" for each in parts) and not any(each in name for each in again)
    }
    torch.save({"model_state_dict": trained}, folder / "checkpoint.pt")
    return model


def converted(folder: Path) -> Path:
    words = ("language", "vision", "checkpoint", "output")
    names = ("language", "vision", "checkpoint.pt", "whole")
    pairs = zip(words, names, strict=True)
    assert main([part for word, name in pairs for part in (f"--{word}", str(folder / name))]) == 0
    return folder / "whole"


def write_checkpoint(parts: Path) -> Path:
    """A converted checkpoint, and two samples."""
    write_parts(parts, "gpt_neox")
    folder = converted(parts)
    return write_samples(folder, answer="It is green.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("openflamingo"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_converted_checkpoint_computes_what_the_package_s_does(
    language: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write_parts(tmp_path, language)
    source = Source.of(str(converted(tmp_path)))
    source.check_tokenizer()
    assert source.max_length(None) == 2048
    assert source.processor.tokenizer.convert_ids_to_tokens([IMAGE - 1, IMAGE]) == [
        "<|endofchunk|>",
        "<image>",
    ]
    model = source.load(torch.float32).eval()
    assert not any(each.requires_grad for each in model.vision_encoder.parameters())
    batch = openflamingo_case.make_batch(["...ii....i...", ".i.......", "......."])
    batch["input_ids"][batch["input_ids"] == openflamingo_case.IMAGE] = IMAGE
    found, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    plan = planned.model(str(tmp_path / "whole"))
    assert (plan.cross.count, plan.cross.head_dim, plan.frame_tokens) == (2, 4, 3)
    assert (plan.text.count, plan.text.mlp, plan.vocabulary) == (4, 128, ROWS)
    trained = torch.load(tmp_path / "checkpoint.pt")["model_state_dict"]
    del trained["module.perceiver.norm.weight"]
    torch.save(trained, tmp_path / "checkpoint.pt")
    (tmp_path / "whole").rename(tmp_path / "old")
    with pytest.raises(SystemExit):
        converted(tmp_path)
    assert "1 weights, of which perceiver.norm.weight is missing" in capsys.readouterr().err


def test_text_and_pixels_are_those_of_the_package(folder: Path) -> None:
    source, image = Source.of(str(folder)), Image.open(folder / "a.png")
    tokenizer = source.processor.tokenizer
    first, second = whole_batches(folder, frames=3)
    assert tokenizer.decode(first["input_ids"][0]) == (
        "<image><image><image>Question:What animal? Short answer:A big rabbit.<|endofchunk|>"
    )
    assert tokenizer.decode(second["input_ids"][0]) == (
        "Question:Look<image><image><image><image> Short answer:It is green.<|endofchunk|>"
    )
    learnt = second["labels"][0] != -100
    assert tokenizer.decode(second["input_ids"][0][learnt]) == "It is green.<|endofchunk|>"
    own = CLIPImageProcessorPil.from_pretrained(folder)
    expected = own(image, return_tensors="pt")["pixel_values"]
    assert second["vision_x"].shape == (1, 4, 1, 3, SIZE, SIZE)
    torch.testing.assert_close(second["vision_x"][0, 0], expected)


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    case = cut(
        random_case("openflamingo"), hidden=160, cross_layers=1, self_layers=2, vision_layers=1
    )
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 28}
    case = replace(case, **sizes, vocabulary=96, text_tokens=8)
    model, layout = compared(case, frames=2, method="lvx", recompute=True)
    assert layout.kv_lengths == (2 * case.frame_tokens,)
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(name.startswith("vision_encoder.") for name in silent)
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}


def test_a_tiny_one_is_made_of_nothing(folder: Path) -> None:
    source = Source.of("tiny:openflamingo")
    source.check_tokenizer()
    model = source.load(torch.float32)
    config = openflamingo_case.ds_config(
        stage=0, sp_size=1, cross={"method": "lvx"}, self_attn="ring"
    )
    encoder = TextEncoder(source.processor, source.max_length(None), family=source.family)
    maker = BatchMaker(encoder, FrameRate(count=3), owned=range)
    conversations = read_conversations(folder / "train.jsonl")
    batch = dict(maker.batch([conversations[1]]).inputs)
    expected = model(**batch).loss
    patched_by(config, model)
    loss = model(**shard_batch(batch, model=model, frames="local")).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gates = [p.grad for name, p in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 4
    assert all(gate is not None and gate.abs().max() > 0 for gate in gates)
    source.config.media_token_id -= 1
    with pytest.raises(ValueError, match="'openflamingo' whose image token is 258"):
        source.check_tokenizer()


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=3)).read_text())
    patterns = FAMILIES.named("openflamingo").patterns
    for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
        rule["match"] = patterns[kind]
    loss = first_loss(folder, tmp_path, config, frames=3)
    model = Source.of(str(folder)).load(torch.float32)
    start = [model(**batch).loss.item() for batch in whole_batches(folder, frames=3)]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model")).load(torch.float32)
    moved = {
        name.partition(".")[0]
        for (name, old), new in zip(model.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved == {"lang_encoder", "perceiver"}
