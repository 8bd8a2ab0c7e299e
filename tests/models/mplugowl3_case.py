"""A tiny mPLUG-Owl3, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ds_lvx.models import FAMILIES
from tests.models import mllama_case
from tests.models.mplugowl3_double import mPLUGOwl3Config, mPLUGOwl3Model

VOCABULARY = 96
SIZE = 8  # pixels of an image, by side; it has four visual tokens

Batch = dict[str, Any]


def tiny_model(**settings: Any) -> mPLUGOwl3Model:
    """Four text layers, two of them hyper layers; nothing at 0 or 1; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = mPLUGOwl3Model(mPLUGOwl3Config(**settings))
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
    # The last layer of the tower is not used by the model either.
    model.vision_model.encoder.layers[-1].requires_grad_(False)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("mplugowl3").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def make_batch(texts: Sequence[str], *, left: bool = False, seed: int = 0) -> Batch:
    """A batch as the processor returns it, padded, with labels.

    Args:
        texts: a letter a token: ``i`` for an image, ``.`` for others.
        left: shorter texts are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(map(len, texts))
    rows = [text.rjust(length) if left else text.ljust(length) for text in texts]
    ids = torch.randint(1, VOCABULARY, (len(rows), length), generator=generator)
    valid = torch.tensor([[int(each != " ") for each in row] for row in rows])
    is_image = torch.tensor([[each == "i" for each in row] for row in rows])
    first = valid.cumsum(dim=1) == 1  # nothing stands before it, or only padding
    count = int(is_image.sum())
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill((valid == 0) | is_image | first, -100),
        "pixel_values": torch.randn(count, 3, SIZE, SIZE, generator=generator),
        "media_offset": [torch.where(row)[0] for row in is_image],
    }


def hard_batch(seed: int = 0) -> Batch:
    """Text before the first image, adjacent images, one that begins a text, a sample of text alone,
    texts of unequal length."""
    return make_batch(["..ii...i.i.....", "i...........", "......."], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    return make_batch(["..i...i.i..", "i.....", "......i"], left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    return make_batch(["....i......"], seed=seed)


def seen_by_nobody(seed: int = 3) -> Batch:
    """The last token is an image, of which nothing is learnt; no padding."""
    batch = make_batch(["..ii..i.....i"], seed=seed)
    del batch["attention_mask"]
    return batch


def text_only(seed: int = 4) -> Batch:
    batch = make_batch([".........", "............."], seed=seed)
    del batch["pixel_values"]
    return batch


def ds_config(*, stage: int, sp_size: int, cross: dict[str, Any], self_attn: Any) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross=cross, self_attn=self_attn)
    patterns = FAMILIES.named("mplugowl3").patterns
    for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
        rule["match"] = patterns[kind]
    return config
