"""A tiny InternVL, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from ds_lvx.models import FAMILIES

VOCABULARY = 64
PAD, START, END, IMAGE = 0, 61, 62, 63
PATCH, SIDE = 4, 16
TOKENS = 4  # of a tile

Batch = dict[str, Any]


def tiny_model(kind: str = "qwen2", *, tied: bool = True, **text: Any) -> Any:
    """Three layers of text, two of vision, one head's weights; always the same weights."""
    settings: dict[str, Any] = {
        "model_type": kind,
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
        "attention_bias": True,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = InternVLConfig(
        text_config={**settings, **text},
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = InternVLForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def lora_model() -> Any:
    return with_lora(tiny_model(), FAMILIES.named("internvl").lora_targets)


def with_lora(model: Any, targets: str) -> Any:
    """A model inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batch(
    samples: Sequence[Sequence[int | tuple[int, ...]]], *, left: bool = False, seed: int = 0
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: of each what stands in it: so many tokens of text, or the tiles of images that
            follow each other: several of one image, or one each of a video's frames.
        left: shorter ones are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    count = 0
    for sample in samples:
        parts = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, START, (part,), generator=generator))
                continue
            for tiles in part:
                visual = torch.full((TOKENS * tiles,), IMAGE)
                parts += [torch.tensor([START]), visual, torch.tensor([END])]
                count += tiles
        rows.append(torch.cat(parts))
    batch = padded(rows, left=left)
    if count:
        batch["pixel_values"] = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return batch


def padded(rows: Sequence[Tensor], *, left: bool) -> Batch:
    """Rows of ids as text and labels; special tokens are not learnt."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest).long()
    for n, row in enumerate(rows):
        here = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, here], mask[n, here] = row, 1
    labels = ids.masked_fill((mask == 0) | (ids >= START), -100)
    if left:  # nobody says the first token
        labels[torch.arange(len(rows)), mask.argmax(dim=1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def hard_batch(seed: int = 0) -> Batch:
    """Images of several tiles and videos among text, a sample of text alone, unequal lengths."""
    first = [3, (1,), 2, (1, 1, 1), 4, (4,), (2,), 7]
    return make_batch([first, [9], [(1, 1), 11]], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    return make_batch([[2, (3,), 5], [4, (1, 1, 1, 1), 9], [6]], left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than tiles; no mask."""
    batch = make_batch([[2, (1,), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([[(1,) * 7, 8]], seed=seed)


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
