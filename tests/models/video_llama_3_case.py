"""A tiny VideoLLaMA 3, and batches for it as its processor makes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

from tests.models import qwen2_5_vl_case as qwen
from tests.models.internvl_case import padded
from tests.models.qwen2_5_vl_case import IMAGE, START, TEXT, VIDEO, Batch, Medium

PATCH, MERGE = 4, 2
MASK = "video_compression_mask"
VISION: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}


def tiny_model(**text: Any) -> Any:
    """Three layers of text, two of vision; always the same weights."""
    settings = {"model_type": "qwen2", **TEXT, "rope_parameters": None, **text}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False}
    config = VideoLlama3Config(text_config=settings, vision_config=VISION, **ids)
    return qwen.weighted(VideoLlama3ForConditionalGeneration, config)


def lora_model() -> Any:
    return qwen.with_adapters(tiny_model())


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.vision_model.requires_grad_(False)
    return model


def make_batch(
    samples: Sequence[Sequence[int | Medium]],
    *,
    left: bool = False,
    seed: int = 0,
    kept: float = 0.6,
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: of each what stands in it: so many tokens of text, or frames, height and width of
            a medium in tokens; one of one frame is an image, whose patches are tokens.
        left: shorter ones are padded on the left, not on the right.
        seed: of ids, masks and pixels.
        kept: of a video's tokens, behind its first frame; of each frame one or more.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    images: list[list[int]] = []
    videos: list[list[int]] = []
    masks: list[Tensor] = []
    for sample in samples:
        parts: list[Tensor] = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, START, (part,), generator=generator))
                continue
            t, h, w = part
            if t == 1:
                images.append([1, h, w])
                parts.append(torch.full((h * w,), IMAGE))
                continue
            videos.append([t, h * MERGE, w * MERGE])
            mask = torch.rand(t, h * w, generator=generator) < kept
            mask[0], mask[:, 0] = True, mask[:, 0] | ~mask.any(dim=1)
            masks.append(mask.flatten())
            for frame, count in enumerate(mask.sum(dim=1).tolist()):
                parts.append(torch.tensor([3 + frame, 4, *[VIDEO] * count]))  # its time in front
        rows.append(torch.cat(parts))
    batch = padded(rows, left=left)
    for grids, kind, merge in ((images, "image", 1), (videos, "video", MERGE)):
        if grids:
            batch[f"{kind}_grid_thw"] = torch.tensor(grids)
            batch[f"{kind}_merge_sizes"] = torch.full((len(grids),), merge)
            shape = (int(torch.tensor(grids).prod(dim=1).sum()), 3 * PATCH**2)
            pixels = "pixel_values" + ("_videos" if kind == "video" else "")
            batch[pixels] = torch.randn(shape, generator=generator)
    if masks:
        batch[MASK] = torch.cat(masks)
    return batch


def hard_batch(seed: int = 0) -> Batch:
    """Images of several sizes and videos among text, a sample of text alone, unequal lengths."""
    first = [3, (1, 2, 3), 2, (3, 2, 2), 4, (1, 1, 1), (1, 3, 2), 7]
    return make_batch([first, [9], [(2, 3, 2), 11]], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    """Two videos in a sample, one with frames of other sizes, and text alone."""
    samples = [[2, (1, 2, 2), 3, (3, 1, 2), (2, 2, 2), 5], [4, (4, 1, 2), 9], [6]]
    return make_batch(samples, left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than images; no mask."""
    batch = make_batch([[2, (1, 2, 2), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([[(7, 2, 2), 8]], seed=seed)


def whole_video(seed: int = 6) -> Batch:
    """A video of which all tokens are kept, and none says so."""
    batch = make_batch([[3, (4, 2, 2), 8]], seed=seed, kept=1.1)
    del batch[MASK]
    return batch


def generate(model: Any, batch: Batch, **keywords: Any) -> Any:
    """The model's own generation, which gets the kept tokens of videos: transformers (5.23) deals
    all of them to beams and samples, by the number of those in the text, and loses videos."""
    if hasattr(model, "_get_image_nums_and_video_nums"):  # 5.17, which counts them
        return model.generate(**batch, **keywords)
    given, own = dict(batch), model.model.get_video_features
    mask = given.pop(MASK, None)

    @functools.wraps(own)
    def kept(*args: Any, **words: Any) -> Any:
        out = own(*args, **words)
        parts = mask.split([len(each) for each in out.pooler_output])
        out.pooler_output = [each[m] for each, m in zip(out.pooler_output, parts, strict=True)]
        return out

    model.model.get_video_features = own if mask is None else kept
    try:
        return model.generate(**given, **keywords)
    finally:
        model.model.get_video_features = own


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, whole_video, text_only)
