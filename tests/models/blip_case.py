"""Tiny BLIP-2, InstructBLIP and InstructBLIP-Video, and batches as their processors make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from ds_lvx.models import FAMILIES
from tests.models import mllama_case

VOCABULARY, IMAGE, PLACES, SIDE = 96, 95, 3, 28
KINDS: dict[str, tuple[Any, Any]] = {
    "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
    "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    "instructblipvideo": (InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration),
}

Batch = dict[str, Any]


def opt(**settings: Any) -> OPTConfig:
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    }
    return OPTConfig(**{**defaults, **settings})


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def t5() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def tiny_model(
    kind: str = "blip-2", text: Any = None, *, image: int = IMAGE, reads: int = VOCABULARY
) -> Any:
    """Two layers of each sort; nothing at 0 or 1; always the same weights.

    Args:
        kind: ``model_type``.
        text: config of the language model; None: `opt`.
        image: the image token.
        reads: tokens that the Q-Former knows.
    """
    of_config, of_model = KINDS[kind]
    token = "video_token_index" if kind == "instructblipvideo" else "image_token_index"
    config = of_config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": reads,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=opt() if text is None else text,
        num_query_tokens=PLACES,
        **{token: image},
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = of_model(config)
        for name, parameter in model.named_parameters():
            scales = parameter.ndim == 1 and "norm" in name.lower() and "weight" in name
            torch.nn.init.normal_(parameter, float(scales), 0.2 if scales else 0.15)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("blip-2").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def make_batch(texts: Sequence[str], *, seed: int = 0) -> Batch:
    """A batch of BLIP-2 as the processor returns it, with labels.

    Args:
        texts: a letter a token: ``i`` for an image, of `PLACES` tokens, ``.`` for others, a blank
            for padding, which is added where a text is shorter than another.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [text.replace("i", "i" * PLACES) for text in texts]
    length = max(map(len, rows))
    rows = [row.ljust(length) for row in rows]
    ids = torch.randint(3, IMAGE, (len(rows), length), generator=generator)
    for letter, token in (("i", IMAGE), (" ", 1)):
        ids[torch.tensor([[each == letter for each in row] for row in rows])] = token
    valid = torch.tensor([[int(each != " ") for each in row] for row in rows])
    images = sum(text.count("i") for text in texts)
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill((valid == 0) | (ids == IMAGE), -100),
        "pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=generator),
    }


def for_one_process(batch: Batch) -> Batch:
    """The model's own forward wants an image; nobody sees it."""
    if batch["pixel_values"].shape[0] > 0:
        return batch
    return {**batch, "pixel_values": torch.zeros(1, 3, SIDE, SIDE)}


def with_instructions(batch: Batch, lengths: Sequence[int], *, seed: int = 9) -> Batch:
    """The same for an InstructBLIP: instructions of so many tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (len(lengths), max(lengths)), generator=generator)
    kept = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = kept.long()
    return {**batch, "qformer_input_ids": ids * mask, "qformer_attention_mask": mask}


def ds_config(*, stage: int, sp_size: int, self_attn: str) -> dict[str, Any]:
    """`mllama_case.ds_config` without a rule for cross-attention."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross={}, self_attn=self_attn)
    del config["ds_lvx"]["layers"][1]
    return config


def hard_batch(seed: int = 0) -> Batch:
    """An image before its text, adjacent images, text before one, a sample of text alone."""
    return make_batch(["i.....", "..ii..i....", "......."], seed=seed)


def one_image(seed: int = 1) -> Batch:
    return make_batch(["i......"], seed=seed)


def left_padded(seed: int = 2) -> Batch:
    """As the processor pads on the left: between the image and the text."""
    return make_batch(["i    ....", "i........", "i ......."], seed=seed)


def instructed(seed: int = 3) -> Batch:
    return with_instructions(hard_batch(seed), [4, 2, 3, 4])


def videos(seed: int = 4) -> Batch:
    """Three frames of each of two samples, one padded between frames and text."""
    batch = with_instructions(make_batch(["iii  ....", "iii......"], seed=seed), [2, 4])
    return {**batch, "pixel_values": batch["pixel_values"].unflatten(0, (2, 3))}


def answers(seed: int = 6) -> Batch:
    """For a language model with an encoder: what the decoder is to write, of other lengths."""
    batch, generator = instructed(seed), torch.Generator().manual_seed(seed)
    labels = torch.randint(3, IMAGE, (3, 5), generator=generator)
    labels[1, 2:] = -100
    return {**batch, "labels": labels}


def text_only(seed: int = 5) -> Batch:
    return make_batch([".........", "....."], seed=seed)
