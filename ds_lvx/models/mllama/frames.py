"""Frames as mllama's processor returns them: decoded one at a time, ready, or random.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` frames, ``tiles`` of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.mllama.processing_mllama import (
    build_string_from_input,
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from ds_lvx.models.mllama.batch import COUNTS, visible_images
from ds_lvx.models.random_weights import random_pixels, random_text
from ds_lvx.models.visual import unwritten


def finish_text(processor: Any, written: str) -> str:
    """The text with its beginning-of-text token, where the template wrote none."""
    bos = processor.tokenizer.bos_token
    if bos is None:
        return written
    return str(build_string_from_input(written, bos, processor.image_token))


def processed(
    processor: Any,
    input_ids: Tensor,
    pictures: Sequence[Iterable[Any]],
    *,
    count: int,
    dtype: torch.dtype,
    begins: Tensor | None = None,
    first: int = 0,
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.frames`, and ``packed_frames``, which has ``begins``; and
    ``first``, which says nothing here.

    Returns:
        ``visible_images`` int32 ``[B, T, 2]`` (the run of images that a token sees), ``num_images``
        int64 ``[B]`` (of the whole sample, whoever holds them; of each of a row ``[B, D]``),
        ``pixel_values`` ``[B, count, tiles, 3, height, width]``, ``aspect_ratio_ids [B, count]``
        and ``aspect_ratio_mask [B, count, tiles]``. A sample with fewer frames is padded as the
        processor pads it.
    """
    images = processor.image_processor
    size, tiles = images.size, images.max_image_tiles
    shape = (len(pictures), count)
    pixels = unwritten((*shape, tiles, 3, size["height"], size["width"]), dtype)
    ratio_ids = torch.zeros(shape, dtype=torch.int64)
    ratio_mask = torch.zeros(*shape, tiles, dtype=torch.int64)
    ratio_mask[:, :, 0] = 1
    for row, sample in enumerate(pictures):
        for place, picture in enumerate(sample):
            done = images(images=[[picture]], return_tensors="pt")
            # In place, one at a time: float32 tiles of all frames at once would be twice the
            # memory of what is kept in bfloat16.
            pixels[row, place] = done["pixel_values"][0, 0]
            ratio_ids[row, place] = done["aspect_ratio_ids"][0, 0]
            ratio_mask[row, place] = done["aspect_ratio_mask"][0, 0]
    counts = (input_ids == processor.image_token_id).long()
    if begins is not None:
        sample = begins.cumsum(dim=1) - 1
        none = torch.zeros(len(counts), int(sample.max()) + 1, dtype=torch.int64)
        counts = none.scatter_add(1, sample, counts)
    return {
        "visible_images": visible_images(input_ids, processor.image_token_id, begins=begins),
        COUNTS: counts if begins is not None else counts.sum(dim=1),
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask,
    }


def ready(config: Any, input_ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.pixel_batch`. The mask is made by the processor's own
    functions."""
    samples, count = pixels.shape[:2]
    max_tiles = config.vision_config.max_num_tiles
    spans = [
        get_cross_attention_token_mask(row, config.image_token_index) for row in input_ids.tolist()
    ]
    mask = convert_sparse_cross_attention_mask_to_dense(
        spans,
        num_tiles=[[1] * count] * samples,
        max_num_tiles=max_tiles,
        length=input_ids.shape[1],
    )
    tiles = pixels.new_zeros(samples, count, max_tiles, *pixels.shape[2:])
    tiles[:, :, 0] = pixels
    ratio_mask = torch.zeros(samples, count, max_tiles, dtype=torch.long)
    ratio_mask[:, :, 0] = 1
    return {
        "input_ids": input_ids,
        "pixel_values": tiles,
        "aspect_ratio_ids": torch.ones(samples, count, dtype=torch.long),
        "aspect_ratio_mask": ratio_mask,
        "cross_attention_mask": torch.from_numpy(mask),
    }


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`."""
    text, vision = config.get_text_config(), config.vision_config
    highest = min(text.vocab_size, config.image_token_index)
    tiles, size = vision.max_num_tiles, vision.image_size
    pixels = random_pixels(frames, (tiles, 3, size, size), seed=seed)[None]
    ratios = [height * width for height, width in vision.supported_aspect_ratios]
    return {
        **random_text(text_tokens, first=highest, seed=seed),
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.full(pixels.shape[:2], 1 + ratios.index(tiles)),
        "aspect_ratio_mask": torch.ones(pixels.shape[:3], dtype=torch.long),
        "visible_images": torch.tensor([0, total]).expand(1, text_tokens, 2),
    }
