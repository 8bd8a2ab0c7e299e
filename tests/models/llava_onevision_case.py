"""A tiny LLaVA-OneVision, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from ds_lvx.models import FAMILIES
from ds_lvx.models.llava_onevision.batch import image_tokens
from tests.models.internvl_case import PAD, START, VOCABULARY, Batch, padded

IMAGE, VIDEO = 62, 63
PATCH, SIDE = 4, 16
FRAME = 4  # tokens
UNUSED = "post_layernorm"

Size = tuple[int, int]


def config_of(**text: Any) -> LlavaOnevisionConfig:
    settings: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(
        text_config={**settings, **text},
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIDE * h, SIDE * w] for h in (1, 2) for w in (1, 2)],
        vision_aspect_ratio="anyres_max_2",  # less than the largest grid has
    )


def tiny_model(**text: Any) -> LlavaOnevisionForConditionalGeneration:
    """Three layers of text, two of vision; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlavaOnevisionForConditionalGeneration(config_of(**text))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("llava_onevision").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batch(
    samples: Sequence[Sequence[int | Size | str]],
    *,
    frames: int = 3,
    several: bool = False,
    left: bool = False,
    seed: int = 0,
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: of each what stands in it: so many tokens of text, the size of an image, or
            ``"video"``.
        frames: of a video.
        several: images are several of one sample, and not tiled.
        left: shorter ones are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    sizes: list[Size] = []
    tiles, videos, config = [], 0, config_of()
    for sample in samples:
        parts = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, START, (part,), generator=generator))
            elif isinstance(part, str):
                parts.append(torch.full((frames * FRAME + 1,), VIDEO))
                videos += 1
            else:
                found = (1, (SIDE // PATCH) ** 2 + 1) if several else image_tokens(part, config)
                tiles.append(found[0])
                sizes.append(part)
                parts.append(torch.full((found[1],), IMAGE))
        rows.append(torch.cat(parts))
    batch = padded(rows, left=left)
    if tiles:
        shape = (len(tiles), max(tiles), 3, SIDE, SIDE)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
        for image, count in enumerate(tiles):
            batch["pixel_values"][image, count:] = 0
        batch["image_sizes"] = torch.tensor(sizes)
        batch["batch_num_images"] = torch.tensor([len(sizes)] if several else [1] * len(sizes))
    if videos:
        shape = (videos, frames, 3, SIDE, SIDE)
        batch["pixel_values_videos"] = torch.randn(shape, generator=generator)
    return batch


def hard_batch(seed: int = 0) -> Batch:
    """Tiled images and videos that touch each other or not, a text alone, unequal lengths."""
    first = [3, (10, 30), 2, "video", "video", 4, (20, 20), (30, 9), 7]
    return make_batch([first, [9], ["video", (32, 32), 11]], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    """Several images of a sample, which are not tiled."""
    samples = [[2, (16, 16), 5], [4, (9, 20), (20, 9), "video", 9], [6]]
    return make_batch(samples, left=True, several=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than images; no mask."""
    batch = make_batch([[2, (12, 20), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([["video", 8]], frames=7, seed=seed)


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
