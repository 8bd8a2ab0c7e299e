"""A tiny Gemma 3, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from ds_lvx.models import FAMILIES
from tests.models import internvl_case
from tests.models.internvl_case import PATCH, SIDE, with_lora

VOCABULARY = 64
PAD, EOI, BOI, IMAGE = 0, 61, 62, 63
TOKENS = internvl_case.TOKENS  # of an image
WINDOW = 6
FULL, SLIDING = "full_attention", "sliding_attention"
LAYERS = (SLIDING, FULL, SLIDING)

Batch = dict[str, Any]


def tiny_model(**text: Any) -> Gemma3ForConditionalGeneration:
    """Three layers of text, of which the first and last see less than there is; nothing at 0;
    always the same weights."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": WINDOW,
        **text,
    }
    settings["layer_types"] = [*LAYERS[: settings["num_hidden_layers"]]]
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=settings,
        vision_config=vision,
        mm_tokens_per_image=TOKENS,
        boi_token_index=BOI,
        eoi_token_index=EOI,
        image_token_index=IMAGE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Gemma3ForConditionalGeneration(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # some start at 0
    return model


def lora_model() -> Any:
    return with_lora(tiny_model(), FAMILIES.named("gemma3").lora_targets)


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batch(
    samples: Sequence[Sequence[int | tuple[int, ...]]], *, left: bool = False, seed: int = 0
) -> Batch:
    """InternVL's batch of the same names, whose tiles are images here: those without a token
    between them see each other, as the processor's types have it."""
    batch = internvl_case.make_batch(samples, left=left, seed=seed)
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


def hard_batch(seed: int = 0) -> Batch:
    """Images alone and side by side, a sample of text alone, unequal lengths; some padding is
    within an image, and windows end in the midst of some."""
    first = [3, (1,), 2, (1, 1, 1), 4, (4,), (2,), 7]
    batch = make_batch([first, [9], [(1, 1), 11]], seed=seed)
    batch["attention_mask"][0, 5] = 0
    return batch


def left_padded(seed: int = 1) -> Batch:
    return make_batch([[2, (3,), 5], [4, (1, 1, 1, 1), 9], [6]], left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than images; no mask."""
    batch = make_batch([[2, (1,), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([[(1,) * 7, 8]], seed=seed)


def without_types(seed: int = 6) -> Batch:
    """Tokens of an image see those before them alone."""
    batch = hard_batch(seed)
    del batch["token_type_ids"]
    return batch


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, without_types, text_only)
