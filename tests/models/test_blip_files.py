"""BLIP-2 and its like from a checkpoint's folder: text, places, pixels and instructions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Blip2Processor,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from ds_lvx.compare.case import (
    case_of,
    cut,
    make_batch,
    random_case,
)
from ds_lvx.data.batch import FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.adapters.dimensions import dimensions
from ds_lvx.models.adapters.processor import Processor
from ds_lvx.plan import models as planned
from ds_lvx.training.asking import Prompts
from ds_lvx.training.lengths import tokens_beside
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import write_config
from tests.models.blip_case import PLACES, SIDE, opt, t5, tiny_model
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, whole_batches, write_samples

KINDS = ("blip-2", "instructblip", "instructblipvideo")
PLACES_OF_ALL = 32  # that an image has in every published model


def write_tokenizer(folder: Path, *special: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return fast


def write_checkpoint(folder: Path, kind: str) -> Path:
    """A checkpoint with the files that its own processor writes, and two samples."""
    token = "<video>" if kind == "instructblipvideo" else "<image>"
    text = write_tokenizer(folder, "</s>", "<pad>", token)
    reader = write_tokenizer(folder / "qformer_tokenizer", "</s>", "<pad>")
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    if kind == "blip-2":
        Blip2Processor(images, text, num_query_tokens=PLACES).save_pretrained(folder)
    elif kind == "instructblip":
        own = InstructBlipProcessor(images, text, reader, num_query_tokens=PLACES)
        own.save_pretrained(folder)
    else:
        images.save_pretrained(folder)
    language = opt(vocab_size=len(text), max_position_embeddings=256)
    image = text.convert_tokens_to_ids(token)
    tiny_model(kind, text=language, image=image, reads=len(reader)).save_pretrained(folder)
    return write_samples(folder, answer="It is green.")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("blip"), request.param)


def for_own_model(batch: dict[str, Any], kind: str) -> dict[str, Any]:
    """A batch of one sample as the model's own code takes it."""
    batch = {key: value for key, value in batch.items() if key != "images_per_sample"}
    images = len(batch["pixel_values"])
    if kind == "instructblip":
        for key in ("qformer_input_ids", "qformer_attention_mask"):
            batch[key] = batch[key].expand(images, -1)
    if kind == "instructblipvideo":
        batch["pixel_values"] = batch["pixel_values"][None]
    return batch


def test_prompts_end_where_the_last_answer_begins(folder: Path) -> None:
    source = Source.of(str(folder))
    encoder = TextEncoder(source.processor, 256, family=source.family)
    prompts = Prompts(encoder, FrameRate(count=2), owned=range)
    for conversation in read_conversations(folder / "train.jsonl"):
        text = prompts.sample(conversation).text
        assert encoder.tokenizer.decode(text.input_ids).endswith("Answer: ")
    # Its places are tokens of the text already.
    assert tokens_beside(source) == 0


def test_text_places_and_instructions_are_those_of_the_models(folder: Path) -> None:
    source = Source.of(str(folder))
    processor, image = source.processor, Image.open(folder / "a.png")
    (batch, second), token = whole_batches(folder, frames=2), source.processor.image_token
    places = token * PLACES
    written = processor.tokenizer.decode(second["input_ids"][0])
    assert written == 3 * places + "</s>Question: Look Answer: It is green.</s>\n"
    learnt = second["labels"][0] != -100
    assert processor.tokenizer.decode(second["input_ids"][0][learnt]) == "It is green.</s>"
    if source.family.model_type == "blip-2":
        own = Blip2Processor.from_pretrained(folder)
        theirs = own(images=image, text="</s>Question: Look Answer:", return_tensors="pt")
        length = theirs["input_ids"].shape[1]
        assert torch.equal(second["input_ids"][:, 2 * PLACES :][:, :length], theirs["input_ids"])
        torch.testing.assert_close(second["pixel_values"][:1], theirs["pixel_values"])
        return
    reader = AutoTokenizer.from_pretrained(folder, subfolder="qformer_tokenizer")
    assert reader.decode(batch["qformer_input_ids"][0]) == "Question: What animal? Answer: "


def test_files_of_another_model_are_refused(folder: Path) -> None:
    source = Source.of(str(folder))
    name = "video" if source.family.model_type == "instructblipvideo" else "image"
    setattr(source.config, f"{name}_token_index", 7)
    with pytest.raises(ValueError, match=r"and a model for which it is 7; expected the same"):
        Processor.of(str(folder), source.config)
    source.config.text_config = t5()
    with pytest.raises(ValueError, match=r"whose language model \(t5\) has an encoder"):
        Processor.of(str(folder), source.config)


def test_the_planner_reads_a_checkpoint_s_config(folder: Path) -> None:
    found = planned.model(str(folder))
    layers = found.cross
    assert (layers.count, layers.hidden, layers.mlp, layers.mlp_matrices) == (2, 32, 48, 2)
    assert (found.frame_tokens, found.tower_tokens, found.tower.hidden) == (PLACES, 5, 16)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"model_type": "t5"}
    with pytest.raises(ValueError, match="on a 't5'; expected an opt or a llama"):
        dimensions(config, "t5", "")


def test_other_places_are_not_compared(folder: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"3 rows an image; expected .* 32 rows"):
        case_of(str(folder))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_a_comparison_trains_a_model_of_random_weights(kind: str) -> None:
    case = cut(random_case(kind), hidden=160 if kind == "blip-2" else 256, cross_layers=2)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 28}
    case = replace(case, **sizes, vision_layers=1, vocabulary=96, text_tokens=8)
    model, layout = compared(case, frames=2, method="lvx")
    assert layout.text.kv_lengths == (2 * PLACES_OF_ALL + 8,)
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}
    assert model.query_tokens.grad.abs().max() > 0
    with pytest.raises(ValueError, match="at most 2048 tokens together"):
        make_batch(case, frames=range(2), total=64, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    [
        pytest.param("blip-2", marks=pytest.mark.exhaustive),
        "instructblip",  # what BLIP-2 has, and an instruction
        pytest.param("instructblipvideo", marks=pytest.mark.exhaustive),
    ],
    indirect=True,
)
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=3)).read_text())
    del config["ds_lvx"]["layers"][1]
    loss = first_loss(folder, tmp_path, config, frames=3)
    source = Source.of(str(folder))
    model = source.load(torch.float32).train()
    start = [
        model(**for_own_model(each, source.family.model_type)).loss.item()
        for each in whole_batches(folder, frames=3)
    ]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.image_token_id == source.processor.image_token_id
