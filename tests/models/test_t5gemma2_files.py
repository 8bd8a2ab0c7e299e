"""T5Gemma2 from a checkpoint's folder: its own processor's text and pixels, tools on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from ds_lvx.compare.case import (
    cut,
    random_case,
)
from ds_lvx.data.batch import FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.conversation import Part
from ds_lvx.data.errors import DataError
from ds_lvx.models.registry import FAMILIES
from ds_lvx.training.asking import Prompts
from ds_lvx.training.chatting import OPEN, conversation
from ds_lvx.training.model import Source
from tests.data.media import chat, write_image, write_jsonl
from tests.launch.finetune_runs import write_config
from tests.launch.test_generate import run_chat
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, maker_of, whole_batches, write_samples
from tests.models.t5gemma2_case import SIZE, TOKENS, tiny_model
from tests.ranks import run_ranks

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
VISUAL = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint, and two samples."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 4 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = (*SPECIAL, *VISUAL.values())
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name.strip('<>')}_token": name for name in SPECIAL},
        extra_special_tokens=VISUAL,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    Gemma3Processor(images, fast, image_seq_length=TOKENS).save_pretrained(folder)
    ids = {key: fast.convert_tokens_to_ids(token) for key, token in VISUAL.items()}
    tiny_model(
        vocab_size=max(fast.get_vocab().values()) + 1,
        eoi=ids["eoi_token"],
        image=ids["image_token"],
        bos_token_id=fast.bos_token_id,
        pad_token_id=fast.pad_token_id,
    ).save_pretrained(folder)
    return write_samples(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("t5gemma2"))


def test_text_and_pixels_are_those_of_the_model_s_processor(folder: Path) -> None:
    source = Source.of(str(folder))
    source.check_tokenizer()
    processor = source.processor
    image = Image.open(folder / "a.png")
    mark = VISUAL["boi_token"]
    theirs = processor.own(
        text=[f"Look{mark}{mark}b"], images=[[image, image]], return_tensors="pt"
    )
    family = FAMILIES.named("t5gemma2")
    text = f"Look{family.media_text(processor, [0.0, 1.0])}b"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    mine = family.inputs(processor, [*ids, 9, 8], [*[-100] * len(ids), 9, 8])
    assert mine["input_ids"] == theirs["input_ids"][0].tolist()
    assert mine["decoder_input_ids"] == [processor.tokenizer.bos_token_id, 9]
    assert mine["labels"] == [9, 8]
    made = family.frames(processor, torch.zeros(1, 1), [[image] * 2], count=2, dtype=torch.float32)
    torch.testing.assert_close(made["pixel_values"], theirs["pixel_values"])


def test_a_conversation_is_read_and_said(folder: Path, tmp_path: Path) -> None:
    maker = maker_of(folder, frames=2, min_tokens=8)
    decode = maker.encoder.tokenizer.decode
    batch = maker.batch(read_conversations(folder / "train.jsonl")[1:]).inputs
    assert decode(batch["labels"][0, :4]).startswith("Yes<eos>")
    assert decode(batch["decoder_input_ids"][0, :4]) == "<bos>Yes"
    assert len(batch["labels"][0]) == 8  # a token for each rank
    read = decode(batch["input_ids"][0])
    image = f"{VISUAL['boi_token']}{VISUAL['image_token'] * TOKENS}{VISUAL['eoi_token']}"
    assert read.count(image) == 3
    assert read.endswith("Assistant: ")
    later = chat(("text", "Go on"), answer="No")
    later["messages"] = [*later["messages"], *chat(("image", "a.png"), answer="Yes")["messages"]]
    write_image(tmp_path / "a.png", (40, 24))
    write_jsonl(tmp_path / "later.jsonl", later)
    (conversation,) = read_conversations(tmp_path / "later.jsonl")
    with pytest.raises(DataError, match=r"later\.jsonl.*got an image behind an answer"):
        maker.sample(conversation)


def test_a_comparison_trains_a_model_of_random_weights() -> None:
    case = cut(random_case("t5gemma2"), hidden=512, cross_layers=1, self_layers=6, vision_layers=1)
    assert (case.heads, case.kv_heads, case.head_dim) == (2, 1, 256)
    sizes = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "image_size": 112}
    case = replace(case, **sizes, vocabulary=96, text_tokens=8, mlp=64)
    model, layout = compared(case, frames=2, method="lvx")
    assert layout.kv_lengths == (2 * case.frame_tokens + 16,)
    assert all(parameter.grad.any() for _, parameter in model.named_parameters())
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}


def test_a_checkpoint_has_a_size() -> None:
    family = FAMILIES.named("t5gemma2")
    published = family.config(family.size())
    assert (published.encoder.mm_tokens_per_image, published.encoder.image_token_id) == (
        256,
        256001,
    )
    assert family.size(published) == family.size()
    with pytest.raises(NotImplementedError, match=r"'tokens': 4, .* expected .*'tokens': 1, "):
        family.size(tiny_model().config)


def ds_config_of(tmp_path: Path, *, stage: int) -> dict[str, Any]:
    """A config whose rules are for this model's layers."""
    config: dict[str, Any]
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=stage)).read_text())
    patterns = FAMILIES.named("t5gemma2").patterns
    methods = {"local": "none", "cross": "lvx", "self": "ulysses"}
    config["ds_lvx"]["layers"] = [
        {"match": patterns[kind], "method": method} for kind, method in methods.items()
    ]
    return config


@pytest.mark.slow
def test_a_chat_is_read_anew_for_every_question(folder: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "ds.json", tmp_path / "answers.jsonl"
    config.write_text(json.dumps(ds_config_of(tmp_path, stage=0)))
    words = ["--model", folder, "--deepspeed_config", config, "--frames", 3, "--max_new_tokens", 5]
    words += ["--chat", "--video", folder / "a.mp4", "--prompt", "What animal?", "--output", out]
    words += ["--traceback"]
    assert run_ranks(run_chat, 2, "And where?", *map(str, words)) == [0, 0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question"] for record in records] == ["What animal?", "And where?"]
    source = Source.of(str(folder))
    model, encoder = source.load(torch.float32).eval(), maker_of(folder, frames=3).encoder
    prompts, turns = Prompts(encoder, FrameRate(count=3), owned=range), []
    for record in records:
        asked = conversation(
            (Part("video", str(folder / "a.mp4")),), [*turns, (record["question"], OPEN)]
        )
        batch = prompts.batch([asked]).inputs
        given = {key: value for key, value in batch.items() if key != "images_per_sample"}
        tokens = model.generate(**given, max_new_tokens=5, **prompts.ending(model))
        answer = encoder.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)
        assert record["answer"] == answer
        assert record["new_tokens"] == tokens.shape[1] - 1 > 0
        turns.append((record["question"], answer))


@pytest.mark.slow
def test_finetune_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(folder, tmp_path, ds_config_of(tmp_path, stage=3), frames=3)
    source = Source.of(str(folder))
    start = []
    for batch in whole_batches(folder, frames=3):
        batch.pop("images_per_sample")
        start.append(source.load(torch.float32)(**batch).loss.item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"))
    assert trained.processor.image_token_id == source.processor.image_token_id
