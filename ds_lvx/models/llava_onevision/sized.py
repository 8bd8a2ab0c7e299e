"""LLaVA-OneVision with random weights, on a Qwen2 with SigLIP, cut to any size; frames to measure
with.

All layers of the text see images. A frame that is measured is a video's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.llava_onevision.batch import FRAMES, VIDEO_PIXELS, frame_tokens
from ds_lvx.models.llava_onevision.dimensions import known
from ds_lvx.models.llava_onevision.processor import IMAGE_TOKEN, VIDEO_TOKEN, Processor
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

_OTHERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_IDS = (151_646, 151_647)
"""Of an image and of a video, where a vocabulary has room."""
_GRIDS = 6
"""Tiles by side, at most."""
_TINY_SIDE, _TINY_GRIDS = 16, 2


def config_of(
    size: Size, ids: tuple[int, ...] | None = None, *, grids: int = _GRIDS
) -> LlavaOnevisionConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: of the tokens of an image and of a video; None: the published models', or where the
            vocabulary is small its last.
        grids: tiles by side that an image may have.
    """
    fits = size.vocabulary > _IDS[-1]
    image, video = ids or (_IDS if fits else (size.vocabulary - 2, size.vocabulary - 1))
    text = {"model_type": "qwen2", "tie_word_embeddings": False, **text_settings(size)}
    own = {"model_type": "siglip_vision_model", "vision_use_head": False}
    sides = [size.image_size * n for n in range(1, grids + 1)]
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config={**vision_settings(size), **own},
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        tie_word_embeddings=False,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is LLaVA-OneVision 7B's."""
    if config is None:
        return size_of_known(known(), "-7b", positions=32_768, rope_theta=1e6, image_size=384)
    text = config.text_config
    return size_of_parts(text, config.vision_config, **of_heads(text))


def tiny() -> tuple[LlavaOnevisionConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: a tile has 16 tokens, a frame 4."""
    tokenizer = byte_tokenizer(
        (*_OTHERS, IMAGE_TOKEN, VIDEO_TOKEN), eos_token=_OTHERS[2], pad_token=_OTHERS[0]
    )
    size = tiny_size(tokenizer, image_size=_TINY_SIDE, patch_size=_TINY_SIDE // 4)
    ids = tuple(int(tokenizer.get_vocab()[name]) for name in (IMAGE_TOKEN, VIDEO_TOKEN))
    config = config_of(size, ids, grids=_TINY_GRIDS)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return config, Processor(tokenizer, {"preprocessor_config.json": half}, config)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: a video in front of the text."""
    vision = config.vision_config
    video = torch.full((total * frame_tokens(config) + 1,), int(config.video_token_index))
    first = int(config.image_token_index)
    batch = random_text(text_tokens, first=first, seed=seed, front=video)
    shape = (vision.num_channels, vision.image_size, vision.image_size)
    pixels = random_pixels(frames, shape, seed=seed, apart=(1,))
    batch[FRAMES] = torch.tensor([total])
    return {**batch, VIDEO_PIXELS: pixels} if len(pixels) else batch
