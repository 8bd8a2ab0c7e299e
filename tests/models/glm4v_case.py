"""A tiny GLM-4.1V, and batches for it as its processor makes them.

The model's own forward refuses images beside videos; of such a batch it gets `as_images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor

from tests.models import qwen2_5_vl_case as qwen
from tests.models.qwen2_5_vl_case import MERGE, PATCH, Batch, Medium

START, END, VIDEO_START, VIDEO_END, IMAGE, VIDEO = range(58, 64)
TEXT: dict[str, Any] = {
    **qwen.TEXT,
    "hidden_size": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "image_size": 3 * PATCH,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
IDS: dict[str, Any] = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "tie_word_embeddings": False,
}


def tiny_model(**text: Any) -> Any:
    """Three layers of text, two of vision; always the same weights."""
    config = Glm4vConfig(text_config={**TEXT, **text}, vision_config=VISION, **IDS)
    return qwen.weighted(Glm4vForConditionalGeneration, config)


def tiny_46(**text: Any) -> Any:
    """The same of GLM-4.6V's classes."""
    config = Glm46VConfig(text_config={**TEXT, **text}, vision_config=VISION, **IDS)
    return qwen.weighted(Glm46VForConditionalGeneration, config)


def lora_model() -> Any:
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    return qwen.without_tower(tiny_model())


def token_types(ids: Tensor, given: Mapping[str, int] = IDS) -> Tensor:
    """As transformers' processor numbers them, by the ids of a config."""
    theirs: Any = SimpleNamespace(
        image_token_id=given["image_token_id"],
        video_start_id=given["video_start_token_id"],
        video_end_id=given["video_end_token_id"],
    )
    return torch.tensor(Glm4vProcessor.create_mm_token_type_ids(theirs, ids.tolist()))


def make_batch(
    samples: Sequence[Sequence[int | Medium]], *, left: bool = False, seed: int = 0
) -> Batch:
    """See `tests.models.qwen2_5_vl_case.make_batch`."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    images: list[list[int]] = []
    videos: list[list[int]] = []
    for sample in samples:
        parts: list[Tensor] = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, START, (part,), generator=generator))
                continue
            t, h, w = part
            (images if t == 1 else videos).append([t, h * MERGE, w * MERGE])
            parts.append(torch.tensor([] if t == 1 else [VIDEO_START]).long())
            for frame in range(t):
                when = [] if t == 1 else [3 + frame, 4]  # its time, as text
                parts += [torch.tensor([START, *[IMAGE] * (h * w), END, *when])]
            parts.append(torch.tensor([] if t == 1 else [VIDEO_END]).long())
        rows.append(torch.cat(parts))
    return qwen.collate(
        rows, [images, videos], generator, left=left, special=START, types=token_types
    )


def hard_batch(seed: int = 0) -> Batch:
    """Images of several sizes among text, a sample of text alone, unequal lengths."""
    first = [3, (1, 2, 3), 2, (1, 2, 2), 4, (1, 1, 1), (1, 3, 2), 7]
    return make_batch([first, [9], [(1, 3, 2), 11]], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    """Videos: two in a sample, one with frames of other sizes, and text alone."""
    samples = [[2, (2, 2, 2), 3, (3, 1, 2), 5], [4, (4, 1, 2), 9], [6]]
    return make_batch(samples, left=True, seed=seed)


def mixed(seed: int = 3) -> Batch:
    """Images and videos among each other; what the model's own forward refuses."""
    first = [3, (1, 2, 3), 2, (3, 2, 2), 4, (1, 1, 1), (1, 3, 2), 7]
    return make_batch([first, [9], [(2, 3, 2), (1, 2, 2), 5]], seed=seed)


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


BATCHES = (hard_batch, left_padded, mixed, one_image, one_video, text_only)


def for_one_process(batch: Batch) -> Batch:
    """What the model's own forward takes of a batch."""
    both = {"image_grid_thw", "video_grid_thw"} <= batch.keys()
    return as_images(batch) if both else batch


def generate(model: Any, batch: Batch, **keywords: Any) -> Any:
    """The model's own generation, in which beams of a sample keep its images: GLM-4.1V's class
    (transformers 5.23) loses their videos, and gives the first beams the first images."""
    own = GenerationMixin._expand_multimodal_outputs
    model._expand_multimodal_outputs = MethodType(own, model)
    return model.generate(**as_images(batch), **keywords)


def as_images(batch: Batch) -> Batch:
    """The same with each frame of a video an image of its own: to the tower, at the tokens and for
    positions it is one."""
    left = {1: frames_of(batch, "pixel_values", "image_grid_thw")}
    left[2] = frames_of(batch, "pixel_values_videos", "video_grid_thw")
    types = batch["mm_token_type_ids"]
    kinds = [kind for row in types.tolist() for kind, _ in groupby(row) if kind > 0]
    found = [next(left[kind]) for kind in kinds]
    others = {key: value for key, value in batch.items() if "video" not in key}
    if not found:
        return others
    return {
        **others,
        "mm_token_type_ids": types.clamp(max=1),
        "image_grid_thw": torch.stack([grid for grid, _ in found]),
        "pixel_values": torch.cat([pixels for _, pixels in found]),
    }


def frames_of(batch: Batch, pixels: str, grids: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Grid and pixels of each image, or frame."""
    start = 0
    for t, h, w in batch[grids].tolist() if grids in batch else ():
        for _ in range(t):
            yield torch.tensor([1, h, w]), batch[pixels][start : start + h * w]
            start += h * w
