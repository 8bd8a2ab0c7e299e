"""A tiny idefics, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids_pt,
    incremental_to_binary_attention_mask,
)

from ds_lvx.models import FAMILIES
from tests.models import mllama_case

VOCABULARY = 96
IMAGE, END = 95, 2
SIZE = 28

Batch = dict[str, Any]


def tiny_model(**settings: Any) -> IdeficsForVisionText2Text:
    """Four text layers, two gated ones before them; nothing at 0 or 1; always the same weights."""
    vision = {"embed_dim": 16, "image_size": SIZE, "patch_size": 14, "intermediate_size": 24}
    perceiver = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2}
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "initializer_range": 0.15,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "use_resampler": True,
        "vision_config": {**vision, "num_hidden_layers": 2, "num_attention_heads": 2},
        "perceiver_config": {
            **perceiver,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    }
    config = IdeficsConfig(**{**defaults, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = IdeficsForVisionText2Text(config)
        for name, parameter in model.named_parameters():
            # Closed gates would make every gradient of K and V zero, and a test of them nothing.
            if "alpha_" in name:
                torch.nn.init.constant_(parameter, 0.5)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    # Of an output that the model does not use: it never gets a gradient.
    model.model.vision_model.post_layernorm.requires_grad_(False)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("idefics").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def make_batch(texts: Sequence[str], *, left: bool = False, seed: int = 0) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        texts: a letter a token: ``i`` for an image, ``e`` for the end of a text, ``.`` for others.
        left: shorter texts are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(map(len, texts))
    rows = [text.rjust(length) if left else text.ljust(length) for text in texts]
    ids = torch.randint(3, IMAGE, (len(rows), length), generator=generator)
    for letter, token in (("i", IMAGE), ("e", END), (" ", 0)):
        ids[torch.tensor([[each == letter for each in row] for row in rows])] = token
    valid = torch.tensor([[int(each != " ") for each in row] for row in rows])
    images = max(1, *(text.count("i") for text in texts))
    tokenizer: Any = SimpleNamespace(convert_tokens_to_ids=lambda _: IMAGE, eos_token_id=END)
    latest, _ = image_attention_mask_for_packed_input_ids_pt(ids, tokenizer)
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill((valid == 0) | (ids == IMAGE), -100),
        "pixel_values": torch.randn(len(rows), images, 3, SIZE, SIZE, generator=generator),
        "image_attention_mask": incremental_to_binary_attention_mask(
            latest, "pt", num_classes=images
        ),
    }


def ds_config(*, stage: int, sp_size: int, cross: dict[str, Any], self_attn: Any) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross=cross, self_attn=self_attn)
    config["ds_lvx"]["layers"][2]["match"] = FAMILIES.named("idefics").patterns["self"]
    return config


def hard_batch(seed: int = 0) -> Batch:
    """Text before the first image, adjacent images, one that nobody sees, text after an end that
    sees none, a sample of text alone, texts of unequal length."""
    batch = make_batch(["...ii....i...", ".i..e....i", "......."], seed=seed)
    batch["image_attention_mask"][0, :, 1] = 0
    return batch


def one_image(seed: int = 1) -> Batch:
    return make_batch(["..i......"], seed=seed)


def left_padded(seed: int = 2) -> Batch:
    return make_batch(["..i...i.i..", "i.....", "...i..i"], left=True, seed=seed)


def all_before(seed: int = 3) -> Batch:
    """Tokens see every image before them, not the latest alone."""
    batch = make_batch(["..i..i..i...", "....i.i....."], seed=seed)
    before = (batch["input_ids"] == IMAGE).cumsum(dim=1)[..., None]
    return {**batch, "image_attention_mask": (torch.arange(3) < before).long()}


def text_only(seed: int = 4) -> Batch:
    """As the processor has it: one blank image that nobody sees."""
    batch = make_batch(["..........", "......."], seed=seed)
    return {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
