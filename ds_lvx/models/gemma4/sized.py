"""Gemma 4 with random weights, cut to any size; images to measure with.

All layers of the text see images, the last of six all of the text, with heads twice as large and a
quarter of the heads of keys, which are its values. Nothing is shared between layers, and none has
embeddings of its own: as the larger published models have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.gemma4.batch import PLACES, TYPES, positions
from ds_lvx.models.gemma4.dimensions import known
from ds_lvx.models.gemma4.processor import END, IMAGE_TOKEN, START, VIDEO_TOKEN, Processor
from ds_lvx.models.random_weights import (
    random_pixels,
    random_text,
    size_of_known,
    size_of_parts,
    text_settings,
    tiny_size,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.visual import PIXELS

_OTHERS = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>")
_WINDOW = 1024
_LOCAL_THETA, _GLOBAL_THETA = 1e4, 1e6
_IMAGE = 258_880
"""The token of an image, where a vocabulary has room."""
_POOLED = 3
"""Patches of a token, by side."""
_FEWER = 4
_SIDE, _PLACES = 768, 10_240
"""Of a published model: pixels of a frame that is measured, by side, and patches that there may be.
A smaller one has places for the patches of its frame."""


def config_of(
    size: Size,
    ids: tuple[int, int, int, int] | None = None,
    *,
    pooled: int = _POOLED,
    places: int | None = None,
    **text: Any,
) -> Gemma4Config:
    """The configuration of a model cut to a size.

    Args:
        size: its dimensions; ``mlp`` is an expert's where there are some, and that of all tokens
            three times as wide; ``cross_at`` says nothing here.
        ids: of the tokens that begin and end an image, of an image and of a video; None: the last
            of the vocabulary.
        pooled: patches of a token, by side.
        places: patches that an image may have, by side; None: those of a frame.
        text: further entries of the text's.
    """
    settings = text_settings(size)
    rope = settings["rope_parameters"]
    settings |= {
        "pad_token_id": size.pad or 0,  # what images have in the place of their embeddings
        "vocab_size_per_layer_input": size.vocabulary,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 2 * settings["head_dim"],
        "num_global_key_value_heads": max(size.kv_heads // _FEWER, 1),
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
        "sliding_window": _WINDOW,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": size.rope_theta,
            },
            "sliding_attention": {**rope, "rope_theta": _LOCAL_THETA},
        },
        **text,
    }
    if size.experts:
        settings |= {
            "enable_moe_block": True,
            "intermediate_size": 3 * size.mlp,
            "moe_intermediate_size": size.mlp,
            "num_experts": size.experts,
            "top_k_experts": size.chosen_experts,
        }
    if places is None:
        places = _PLACES if size.image_size >= _SIDE else size.image_size // size.patch_size
    vision = {
        **{key: each for key, each in vision_settings(size).items() if key != "image_size"},
        "num_key_value_heads": size.vision_heads,
        "head_dim": size.vision_hidden // size.vision_heads,
        "pooling_kernel_size": pooled,
        "position_embedding_size": max(places, pooled),
        "standardize": True,
        "initializer_range": size.initializer_range,
    }
    last = min(_IMAGE, size.vocabulary - 4)
    begin, end, image, video = (last + 1, last + 2, last, last + 3) if ids is None else ids
    return Gemma4Config(
        text_config=settings,
        vision_config=vision,
        audio_config=None,
        boi_token_id=begin,
        eoi_token_id=end,
        image_token_id=image,
        video_token_id=video,
        audio_token_id=None,
        initializer_range=size.initializer_range,
    )


def size_of(config: Any) -> Size:
    """The size of a configuration; None is Gemma 4 26B A4B's, with frames of 768 x 768 pixels.

    Raises:
        NotImplementedError: layers share keys or have embeddings of their own, or heads or experts
            of other proportions than those that are made.
    """
    if config is None:
        of_experts = {"mlp": 704, "head_dim": 256, "experts": 128, "chosen_experts": 8}
        beside = {"positions": 262_144, "rope_theta": _GLOBAL_THETA}
        frames = {"image_size": _SIDE, "patch_size": 16}
        return size_of_known(known(), "26B-A4B", **of_experts, **beside, **frames)
    text = config.text_config
    of_all, of_each = text.per_layer_config["full_attention"], _local(text)
    fields = {
        "kv_heads": of_each.num_key_value_heads,
        "head_dim": of_each.head_dim,
        "rope_theta": text.rope_parameters["full_attention"]["rope_theta"],
        "image_size": _pixels(config.vision_config),
    }
    if text.enable_moe_block:
        fields["mlp"] = text.moe_intermediate_size
        fields |= {"experts": text.num_experts, "chosen_experts": text.top_k_experts}
    size = size_of_parts(text, config.vision_config, **fields)
    made: Any = config_of(size).text_config
    wanted = made.per_layer_config["full_attention"]
    of_layers = ("hidden_size_per_layer_input", "num_kv_shared_layers", "intermediate_size")
    wrong = [key for key in of_layers if getattr(text, key) != getattr(made, key)]
    of_heads = ("head_dim", "num_key_value_heads")
    wrong += [key for key in of_heads if getattr(of_all, key) != getattr(wanted, key)]
    if wrong:
        raise NotImplementedError(
            f"got a Gemma 4 whose {wrong[0]} is not that of a model with random weights of its "
            "size; expected layers as Gemma 4 26B A4B has them: others cannot be cut to a size"
        )
    return size


def _local(text: Any) -> Any:
    kind = "sliding_attention" if "sliding_attention" in text.layer_types else "full_attention"
    return text.per_layer_config[kind]


def build(config: Any, *, dtype: torch.dtype) -> Gemma4ForConditionalGeneration:
    """Random weights, by torch's generator."""
    model = Gemma4ForConditionalGeneration._from_config(config, dtype=dtype)
    tower = model.model.vision_tower
    if tower.config.standardize:  # its buffers are empty else
        nn.init.zeros_(tower.std_bias)
        nn.init.ones_(tower.std_scale)
    return model


def tiny() -> tuple[Gemma4Config, Processor]:
    """A model of about 200,000 parameters, and its processor: an image has up to 9 tokens."""
    tokenizer = byte_tokenizer(
        (*_OTHERS, START, END, IMAGE_TOKEN, VIDEO_TOKEN),
        bos_token=_OTHERS[2],
        eos_token=_OTHERS[4],
        pad_token=_OTHERS[0],
    )
    size = tiny_size(tokenizer, layers=6, patch_size=4, bos=int(tokenizer.bos_token_id))
    names = (START, END, IMAGE_TOKEN, VIDEO_TOKEN)
    begin, end, image, video = (int(tokenizer.get_vocab()[name]) for name in names)
    config = config_of(size, (begin, end, image, video), pooled=2, places=64, sliding_window=64)
    files: dict[str, dict[str, Any]] = {
        "processor_config.json": {
            "image_processor": {"max_soft_tokens": 9},
            "video_processor": {"max_soft_tokens": 4},
        }
    }
    return config, Processor(tokenizer, files, config)


def frame_side(config: Any) -> int:
    """Tokens of a frame that is measured, by side."""
    vision = config.vision_config
    return max(_pixels(vision) // vision.patch_size // vision.pooling_kernel_size, 1)


def _pixels(vision: Any) -> int:
    """Of a frame that is measured, by side."""
    return min(vision.position_embedding_size * vision.patch_size, _SIDE)


def random_frames(
    config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
) -> dict[str, Tensor]:
    """See `ds_lvx.models.contract.Family.random_frames`: frames stand in front of the text, a token
    between them."""
    vision, image = config.vision_config, int(config.image_token_id)
    side, pooled = frame_side(config), vision.pooling_kernel_size
    one = torch.cat((torch.full((1,), config.boi_token_id), torch.full((side**2,), image)))
    batch = random_text(text_tokens, first=image, seed=seed, front=one.repeat(total))
    batch[TYPES] = (batch["input_ids"] == image).long()
    grid, patches = (side * pooled, side * pooled), (side * pooled) ** 2
    if total > 0:
        batch[PLACES[PIXELS]] = positions([grid] * total, patches, pooled)
    pixels = random_pixels(frames, (patches, 3 * vision.patch_size**2), seed=seed, apart=(1,))
    return {**batch, PIXELS: pixels} if len(pixels) else batch
