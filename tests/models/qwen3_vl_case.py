"""A tiny Qwen3-VL, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.models.qwen2_5_vl_case import (
    IDS,
    IMAGE,
    MERGE,
    PATCH,
    START,
    TEXT,
    VIDEO,
    Batch,
    Medium,
    collate,
    weighted,
    with_adapters,
    without_tower,
)

VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0, 1],
}


def tiny_model(**text: Any) -> Qwen3VLForConditionalGeneration:
    """Three layers of text, of which two add features of the tower's three; always the same
    weights."""
    return weighted(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig(text_config={**TEXT, "head_dim": 12, **text}, vision_config=VISION, **IDS),
    )


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    return with_adapters(tiny_model())


def frozen_tower() -> Any:
    return without_tower(tiny_model())


def make_batch(
    samples: Sequence[Sequence[int | Medium]], *, left: bool = False, seed: int = 0
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: of each what stands in it: so many tokens of text, or frames, height and width of
            a medium in merged patches; one of one frame is an image.
        left: shorter ones are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for sample in samples:
        parts = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, START, (part,), generator=generator))
                continue
            t, h, w = part
            token = IMAGE if t == 1 else VIDEO
            grids[token].append([t, h * MERGE, w * MERGE])
            for frame in range(t):
                when = [] if t == 1 else [3 + frame, 4]  # its time, as text
                parts += [torch.tensor([*when, START]), torch.full((h * w,), token)]
        rows.append(torch.cat(parts))
    return collate(rows, [grids[IMAGE], grids[VIDEO]], generator, left=left)


def hard_batch(seed: int = 0) -> Batch:
    """Images of several sizes and videos among text, a sample of text alone, unequal lengths."""
    first = [3, (1, 2, 3), 2, (3, 2, 2), 4, (1, 1, 1), (1, 3, 2), 7]
    return make_batch([first, [9], [(2, 3, 2), 11]], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    return make_batch([[2, (1, 2, 2), 5], [4, (4, 1, 2), 9], [6]], left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than images; no mask."""
    batch = make_batch([[2, (1, 2, 2), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([[(7, 2, 2), 8]], seed=seed)


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
