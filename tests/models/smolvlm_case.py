"""A tiny SmolVLM, or Idefics3, and batches for it as its processor makes them: InternVL's, with the
tiles of a sample stacked and padded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from ds_lvx.models import FAMILIES
from tests.models import internvl_case
from tests.models.internvl_case import IMAGE, PAD, PATCH, SIDE, TOKENS, VOCABULARY, Batch

_CLASSES: dict[str, tuple[Any, Any]] = {
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
}


def tiny_model(kind: str = "smolvlm", *, tied: bool = True, **text: Any) -> Any:
    """Three layers of text, two of vision, one head's weights; always the same weights."""
    settings: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
    }
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    of_config, of_model = _CLASSES[kind]
    config = of_config(
        text_config={**settings, **text},
        vision_config=vision,
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = of_model(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def lora_model() -> Any:
    return internvl_case.with_lora(tiny_model(), FAMILIES.named("smolvlm").lora_targets)


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.vision_model.requires_grad_(False)
    return model


def stacked(batch: Batch) -> Batch:
    """Tiles one after the other as ``[B, tiles, 3, SIDE, SIDE]``, with the mask."""
    if "pixel_values" not in batch:
        return batch
    counts = ((batch["input_ids"] == IMAGE).sum(dim=1) // TOKENS).tolist()
    parts = batch["pixel_values"].split(counts)
    pixels = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    mask = torch.zeros(*pixels.shape[:2], SIDE, SIDE).long()
    for row, count in enumerate(counts):
        mask[row, :count] = 1
    return {**batch, "pixel_values": pixels, "pixel_attention_mask": mask}


def make_batch(*args: Any, **keywords: Any) -> Batch:
    """As `internvl_case.make_batch`."""
    return stacked(internvl_case.make_batch(*args, **keywords))


def hard_batch(seed: int = 0) -> Batch:
    return stacked(internvl_case.hard_batch(seed))


def left_padded(seed: int = 1) -> Batch:
    return stacked(internvl_case.left_padded(seed))


def one_image(seed: int = 2) -> Batch:
    return stacked(internvl_case.one_image(seed))


def one_video(seed: int = 5) -> Batch:
    return stacked(internvl_case.one_video(seed))


def text_only(seed: int = 4) -> Batch:
    return internvl_case.text_only(seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
