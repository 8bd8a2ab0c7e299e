"""GLM-4.1V with random weights, cut to any size; a tiny one to try out, frames to measure with.

All layers of the text see images. A frame that is measured is a unit of a video: the square for
which the tower has a learned position for each patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4vConfig

from ds_lvx.models.glm4v import processor as glm
from ds_lvx.models.glm4v.dimensions import known
from ds_lvx.models.glm4v.processor import Processor
from ds_lvx.models.qwen2_5_vl import sized as qwen
from ds_lvx.models.random_weights import of_heads, size_of_known, size_of_parts, text_settings
from ds_lvx.models.size import Size

TOKENS = (
    *("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id"),
    *("image_token_id", "video_token_id"),
)
"""Entries of a configuration."""
_IDS = tuple(range(151_339, 151_345))
_NAMES = (*glm.IMAGE_ENDS, *glm.VIDEO_ENDS, glm.IMAGE_TOKEN, glm.VIDEO_TOKEN)
_TINY_VIDEO_PIXELS = 65_536


def config_of(size: Size, ids: tuple[int, ...] | None = None) -> Glm4vConfig:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        ids: of the tokens before and behind an image, before and behind a video, of an image (and a
            frame), and of a video; None: the published models', or where the vocabulary is small
            its last.

    Raises:
        ValueError: heads are not as wide as the text over their number.
    """
    if size.head_dim not in (0, size.hidden // size.heads):
        raise ValueError(
            f"got heads of {size.head_dim} in a text of width {size.hidden} with {size.heads} of "
            f"them; expected {size.hidden // size.heads}, the only width that GLM-4.1V can have"
        )
    return Glm4vConfig(text_config=rotated_text(size), **all_but_text(size, ids, _IDS))


def all_but_text(
    size: Size, ids: tuple[int, ...] | None, published: tuple[int, ...]
) -> dict[str, Any]:
    """Of a configuration what is not of the text: see `config_of`, and ids where the vocabulary
    has them."""
    if ids is None:
        count, fits = len(published), size.vocabulary > published[-1]
        ids = published if fits else tuple(size.vocabulary - n for n in range(count, 0, -1))
    vision = {
        **qwen.vision_settings(size),
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "image_size": size.image_size,
        "out_hidden_size": size.hidden,
    }
    named = dict(zip(TOKENS, ids, strict=True))
    return {"vision_config": vision, "tie_word_embeddings": False, **named}


def rotated_text(size: Size) -> dict[str, Any]:
    """Of the text's configuration, what a size says: half of a head turns, a quarter of that with
    the time."""
    text = text_settings(size)
    pairs = text.pop("head_dim") // 4
    of_a_side = 3 * pairs // 8
    text["rope_parameters"] |= {
        "partial_rotary_factor": 0.5,
        "mrope_section": [pairs - 2 * of_a_side, of_a_side, of_a_side],
    }
    return text


def size_of(config: Any) -> Size:
    """The size of a configuration; None is GLM-4.1V 9B's."""
    if config is None:
        return size_of_known(
            known(), "GLM-4.1V-9B", vision_mlp=13_696, positions=65_536, image_size=336
        )
    return size_of_parts(config.text_config, config.vision_config, **of_heads(config.text_config))


def tiny() -> tuple[Glm4vConfig, Processor]:
    """A model of about 200,000 parameters, and its processor: pictures have 2 to 8 tokens."""
    size, ids, processor = tiny_parts(Processor)
    return config_of(size, ids), processor


tiny_parts = partial(qwen.tiny_parts, video_pixels=_TINY_VIDEO_PIXELS, image_frames=2, names=_NAMES)


def frame_tokens(config: Any) -> int:
    """Visual tokens of a unit of `random_frames`."""
    return (_side(config) // int(config.vision_config.spatial_merge_size)) ** 2


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: a frame is a unit of a video in front,
    with its begin and its end."""
    ends = torch.tensor([[config.image_start_token_id], [config.image_end_token_id]])
    visual = torch.full((total, frame_tokens(config)), config.image_token_id)
    each = (ends[:1].expand(total, 1), visual, ends[1:].expand(total, 1))
    video = torch.tensor([config.video_start_token_id]), torch.tensor([config.video_end_token_id])
    front = torch.cat((video[0], torch.cat(each, 1).flatten(), video[1]))
    first, side = int(config.image_start_token_id), _side(config)
    return qwen.random_video(
        config, front, text_tokens, first=first, total=total, side=side, frames=frames, seed=seed
    )


def _side(config: Any) -> int:
    """Patches of a frame that is measured, by side."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)
