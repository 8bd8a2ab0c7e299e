"""Video-LLaMA with random weights, cut to any size, and frames to measure with.

All layers of the text see the video's places, which stand in front of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.random_weights import plain_settings, random_pixels, random_text, size_of_parts
from ds_lvx.models.size import Size
from ds_lvx.models.video_llama.batch import PIXELS
from ds_lvx.models.video_llama.dimensions import QFORMER
from ds_lvx.models.video_llama.model import VideoLlamaConfig
from ds_lvx.models.video_llama.processor import IMAGE_TOKEN, TEMPLATES, Processor
from ds_lvx.models.visual import COUNTS

_POSITIONS = 2048
_FRAMES = 4096  # that a video may have, so that long ones can be measured


def config_of(size: Size, **others: Any) -> VideoLlamaConfig:
    """The configuration of a model cut to a size, with the published Q-Formers.

    Args:
        size: its dimensions; ``cross_at`` says nothing here.
        others: further fields.
    """
    text = LlamaConfig(**plain_settings(replace(size, positions=max(size.positions, _POSITIONS))))
    vision = {
        "width": size.vision_hidden,
        "layers": size.vision_layers,
        "heads": size.vision_heads,
        "mlp": size.vision_mlp,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
    }
    given = {"image_token_id": size.vocabulary, "frames": _FRAMES, **others}
    return VideoLlamaConfig(text, vision, **given)


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Video-LLaMA-2-7B's.

    Raises:
        NotImplementedError: its Q-Formers are not the published models'.
    """
    if config is None:
        config = VideoLlamaConfig(LlamaConfig(vocab_size=32_000))
    own = VideoLlamaConfig()
    fields = ("qformer", "queries", "video_queries", "video_layers")
    other = [field for field in fields if getattr(config, field) != getattr(own, field)]
    if other:
        raise NotImplementedError(
            f"got a Video-LLaMA with {other[0]} {getattr(config, other[0])}; expected "
            f"{getattr(own, other[0])}, as the published models have it: others cannot be cut to a "
            "size"
        )
    text, vision = config.text_config, config.vision
    return size_of_parts(
        text,
        None,
        vision_hidden=vision["width"],
        vision_heads=vision["heads"],
        vision_mlp=vision["mlp"],
        vision_layers=vision["layers"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
    )


def tiny() -> tuple[VideoLlamaConfig, Processor]:
    """A model of about 150,000 weights, and its processor."""
    special = ("<s>", "</s>", "<unk>", IMAGE_TOKEN)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = byte_tokenizer(special, **roles)
    tokenizer.chat_template = TEMPLATES["llama_v2"]
    size = Size(
        vocabulary=len(tokenizer) - 1,
        positions=4096,
        bos=int(tokenizer.bos_token_id),
        eos=int(tokenizer.eos_token_id),
        pad=int(tokenizer.pad_token_id),
    )
    qformer = {**QFORMER, "width": 32, "layers": 2, "heads": 2, "mlp": 64}
    config = config_of(size, qformer=qformer, queries=4, video_queries=4)
    return config, Processor.fitting(tokenizer, config)


def random_frames(
    config: VideoLlamaConfig, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: one video stands before the text.

    Raises:
        ValueError: more frames than the model can number.
    """
    if total > config.frames:
        raise ValueError(
            f"got {total} frames; expected at most {config.frames}, which the model can number: "
            "take fewer"
        )
    image, side = int(config.image_token_id), config.vision["image_size"]
    front = torch.full((config.video_queries,), image)
    pixels = random_pixels(frames, (3, side, side), seed=seed)
    text = random_text(text_tokens, first=image, seed=seed, front=front)
    batch = {**text, COUNTS: torch.tensor([len(pixels)])}
    return {**batch, PIXELS: pixels} if len(pixels) else batch
