"""VideoLLaMA 3 with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images. A frame that is measured is a video's, a square, all of whose
tokens are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import VideoLlama3Config

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.qwen2_5_vl.batch import VIDEO_GRID, VIDEO_PIXELS
from ds_lvx.models.random_weights import (
    of_heads,
    random_pixels,
    random_text,
    size_of_known,
    size_of_parts,
    text_settings,
    tiny_size,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.video_llama_3.batch import VIDEO_MERGES, patch_width
from ds_lvx.models.video_llama_3.dimensions import known
from ds_lvx.models.video_llama_3.processor import Processor

_OTHERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NAMES = (Processor.image_token, Processor.video_token)
_IDS = (151_655, 151_656)
_MERGE = 2
_SIDE = 32
"""Patches of a frame that is measured, by side."""
_TINY_SIDE, _TINY_PATCH = 32, 8


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> VideoLlama3Config:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: of the tokens of an image and of a video; None: the published models', or where the
            vocabulary is small its last.
    """
    fits = size.vocabulary > _IDS[-1]
    image, video = ids or (_IDS if fits else (size.vocabulary - 2, size.vocabulary - 1))
    vision = {**vision_settings(size), "initializer_range": size.initializer_range}
    del vision["image_size"]  # pictures have any
    return VideoLlama3Config(
        text_config={"model_type": "qwen2", "tie_word_embeddings": False, **text_settings(size)},
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is VideoLLaMA 3 7B's, with frames of 448 x 448 pixels."""
    if config is None:
        return size_of_known(known(), "3-7B", positions=32_768, rope_theta=1e6, image_size=448)
    text, vision = config.text_config, config.vision_config
    return size_of_parts(text, vision, **of_heads(text), image_size=_SIDE * vision.patch_size)


def tiny() -> tuple[VideoLlama3Config, Processor]:
    """A model of about 200,000 parameters, and its processor: images have 16 to 64 tokens, frames
    4 or more where there are few of them."""
    tokenizer = byte_tokenizer((*_OTHERS, *_NAMES), eos_token=_OTHERS[2], pad_token=_OTHERS[0])
    least = _TINY_SIDE**2
    files = {
        file: {
            "patch_size": _TINY_PATCH,
            "size": {"shortest_edge": least, "longest_edge": most * least},
        }
        for file, most in (("preprocessor_config.json", 4), ("video_preprocessor_config.json", 64))
    }
    size = tiny_size(tokenizer, image_size=_TINY_SIDE, patch_size=_TINY_PATCH)
    ids = tuple(int(tokenizer.get_vocab()[name]) for name in _NAMES)
    return config_of(size, ids), Processor(tokenizer, files)


def frame_tokens(config: Any) -> int:
    """Visual tokens of a frame of `random_frames`."""
    return (_SIDE // _MERGE) ** 2


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: a video in front of the text."""
    video = torch.full((total * frame_tokens(config),), int(config.video_token_id))
    batch = random_text(text_tokens, first=int(config.image_token_id), seed=seed, front=video)
    batch[VIDEO_GRID] = torch.tensor([[total, _SIDE, _SIDE]])
    batch[VIDEO_MERGES] = torch.tensor([_MERGE])
    pixels = random_pixels(frames, (_SIDE**2, patch_width(config)), seed=seed, apart=(1,))
    return {**batch, VIDEO_PIXELS: pixels.flatten(0, 1)} if len(pixels) else batch
