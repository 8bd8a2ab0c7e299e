"""Qwen2.5-VL with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images. A frame that is measured is a unit of a video, a square.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.qwen2_5_vl.batch import VIDEO_GRID, VIDEO_PIXELS, patch_width
from ds_lvx.models.qwen2_5_vl.dimensions import known
from ds_lvx.models.qwen2_5_vl.processor import END, IMAGE_TOKEN, START, VIDEO_TOKEN, Processor
from ds_lvx.models.random_weights import (
    of_heads,
    random_pixels,
    random_text,
    size_of_known,
    size_of_parts,
    text_settings,
    tiny_size,
)
from ds_lvx.models.size import Size

AnyProcessor = TypeVar("AnyProcessor", bound=Processor)
_MERGE, _FRAMES = 2, 2
_IDS = (151_652, 151_653, 151_655, 151_656)
_OTHERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TINY_SIDE, _TINY_PATCH = 32, 8
_SIDE = 32
"""Patches of a frame that is measured, by side."""


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Qwen2_5_VLConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: of the tokens before and behind an image, of an image and of a video; None: those of
            `ids_of`.
    """
    layers = size.vision_layers
    vision = {
        **vision_settings(size),
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "window_size": 8 * size.patch_size,
        # As published: a quarter of the layers, or at least the last, sees a whole frame.
        "fullatt_block_indexes": [n for n in range(layers) if n % 8 == 7 or n == layers - 1],
        "out_hidden_size": size.hidden,
    }
    return Qwen2_5_VLConfig(
        text_config=rotated_text(size), vision_config=vision, **token_ids(size, ids)
    )


def rotated_text(size: Size) -> dict[str, Any]:
    """Of the text's configuration, what a size says: an eighth of a head turns with the time."""
    head = size.head_dim or size.hidden // size.heads
    eighth = head // 8  # of height and width what is left
    text = text_settings(size)
    text["rope_parameters"]["mrope_section"] = [
        head // 2 - 2 * (3 * eighth // 2),
        3 * eighth // 2,
        3 * eighth // 2,
    ]
    return text


def vision_settings(size: Size) -> dict[str, Any]:
    """Of a tower's configuration, what a size says of each of Qwen's."""
    return {
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "patch_size": size.patch_size,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _FRAMES,
        "initializer_range": size.initializer_range,
    }


def token_ids(size: Size, ids: tuple[int, ...] | None) -> dict[str, Any]:
    """A configuration's own entries; ``ids`` are those of `config_of`."""
    start, end, image, video = ids or ids_of(size)
    return {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": False,
    }


def ids_of(size: Size) -> tuple[int, ...]:
    """Of the tokens around an image, of an image and of a video: the published models', or where
    the vocabulary is small its last."""
    fits = size.vocabulary > _IDS[-1]
    return _IDS if fits else tuple(size.vocabulary - n for n in (4, 3, 2, 1))


def size_of(config: Any, **more: Any) -> Size:
    """The size of a configuration; None is Qwen2.5-VL 7B's, with frames of 448 x 448 pixels.

    Args:
        config: of the model.
        more: fields that its tower has by other words.
    """
    if config is None:
        return size_of_known(known(), "-7B", positions=128_000, rope_theta=1e6, image_size=448)
    text, vision = config.text_config, config.vision_config
    side = _SIDE * vision.patch_size
    return size_of_parts(text, vision, **of_heads(text), image_size=side, **more)


def tiny() -> tuple[Qwen2_5_VLConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 4 to 16 tokens."""
    size, ids, processor = tiny_parts(Processor, video_pixels=_TINY_SIDE**2)
    return config_of(size, ids), processor


def tiny_parts(
    kind: type[AnyProcessor],
    *,
    video_pixels: int,
    image_frames: int = 1,
    names: Sequence[str] = (START, END, IMAGE_TOKEN, VIDEO_TOKEN),
) -> tuple[Size, tuple[int, ...], AnyProcessor]:
    """Size, ids as of `config_of`, and processor of a tiny model.

    Args:
        kind: of processor.
        video_pixels: the most that its settings have for videos.
        image_frames: as which it counts the pixels of an image.
        names: of the tokens that have these ids.
    """
    tokenizer = byte_tokenizer(
        (*_OTHERS, *names),
        eos_token=_OTHERS[2],
        pad_token=_OTHERS[0],
    )
    least = image_frames * _TINY_SIDE**2
    pixels = {"shortest_edge": least, "longest_edge": 4 * least}
    settings = {"size": pixels, "patch_size": _TINY_PATCH, "merge_size": _MERGE}
    files = {
        "preprocessor_config.json": settings,
        "video_preprocessor_config.json": {
            **settings,
            "size": {**pixels, "longest_edge": video_pixels},
        },
    }
    ids = tuple(int(tokenizer.get_vocab()[name]) for name in names)
    size = tiny_size(tokenizer, image_size=_TINY_SIDE, patch_size=_TINY_PATCH)
    return size, ids, kind(tokenizer, files)


def frame_tokens(config: Any) -> int:
    """Visual tokens of a unit of `random_frames`."""
    return (_SIDE // int(config.vision_config.spatial_merge_size)) ** 2


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: a frame is a unit of a video in front."""
    visual = torch.full((total * frame_tokens(config),), config.video_token_id)
    front = torch.cat((torch.tensor([config.vision_start_token_id]), visual))
    first = int(config.vision_start_token_id)
    return random_video(
        config, front, text_tokens, first=first, total=total, side=_SIDE, frames=frames, seed=seed
    )


def random_video(
    config: Any,
    front: Tensor,
    text_tokens: int,
    *,
    first: int,
    total: int,
    side: int,
    frames: Iterable[int],
    seed: int,
) -> dict[str, Tensor]:
    """A batch of the tokens in front, ``[n]``, which have a video of ``total`` units of ``side``
    patches by side, and of random text behind them, of words below ``first``."""
    batch = random_text(text_tokens, first=first, seed=seed, front=front)
    batch[VIDEO_GRID] = torch.tensor([[total, side, side]])
    pixels = random_pixels(frames, (side**2, patch_width(config)), seed=seed, apart=(1,))
    return {**batch, VIDEO_PIXELS: pixels.flatten(0, 1)} if len(pixels) else batch
