"""mllama with random weights, cut to any size; and a tiny one with a processor, for trying out.

The tiny model's frames are one tile of 28 x 28 pixels. Nothing is downloaded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.mllama.dimensions import known
from ds_lvx.models.random_weights import plain_settings, refill, size_of_known, size_of_parts
from ds_lvx.models.size import Size

IMAGE_TOKEN = "<|image|>"
IMAGE_SIZE = 28
MAX_POSITIONS = 4096
_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}"
    "<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes; the image token is the last id, past the model's output vocabulary."""
    return byte_tokenizer(
        (*_SPECIAL_TOKENS, IMAGE_TOKEN),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
    )


def tiny_processor() -> MllamaProcessor:
    """The processor that belongs to `tiny_config`, with a chat template like Llama's."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = MllamaImageProcessorPil(size=size, max_image_tiles=1)
    return MllamaProcessor(image_processor, tiny_tokenizer(), chat_template=_CHAT_TEMPLATE)


def tiny_config(vocab_size: int, *, num_heads: int = 4, num_kv_heads: int = 2) -> MllamaConfig:
    """A model of about 200,000 parameters: 4 text layers, 2 of them cross-attention, 2 of vision.

    Args:
        vocab_size: of the output; the image token's id is this number.
        num_heads, num_kv_heads: of the text layers.
    """
    size = Size(
        vocabulary=vocab_size,
        heads=num_heads,
        kv_heads=num_kv_heads,
        positions=MAX_POSITIONS,
        image_size=IMAGE_SIZE,
        bos=256,
        eos=260,
        pad=257,
    )
    return config_of(size)


def config_of(size: Size) -> MllamaConfig:
    """The configuration of a model cut to a size."""
    # As in the model itself, the features are the last output beside those of five layers, or of
    # all, where there are fewer.
    taken = list(range(size.vision_layers))[-5:]
    vision = MllamaVisionConfig(
        hidden_size=size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_global_layers=size.vision_global_layers,
        attention_heads=size.vision_heads,
        intermediate_size=size.vision_mlp,
        image_size=size.image_size,
        patch_size=size.patch_size,
        max_num_tiles=size.tiles,
        supported_aspect_ratios=[[1, tiles] for tiles in range(1, size.tiles + 1)],
        intermediate_layers_indices=taken,
        vision_output_dim=size.vision_hidden * (1 + len(taken)),
        initializer_range=size.initializer_range,
    )
    text = MllamaTextConfig(
        **plain_settings(size),
        cross_attention_layers=list(size.cross_at),
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
    )
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=size.vocabulary)


def size_of(config: MllamaConfig | None = None) -> Size:
    """The size of a configuration; None is Llama-3.2-11B-Vision's, its layers as they are dealt."""
    if config is None:
        return size_of_known(
            known(),
            "-11B",
            cross_at=tuple(range(3, 40, 5)),
            head_dim=0,
            positions=131_072,
            rope_theta=5e5,
            vision_layers=32,
            vision_global_layers=8,
            image_size=560,
            tiles=4,
        )
    text: Any = config.get_text_config()
    vision: Any = config.vision_config
    return size_of_parts(
        text,
        vision,
        vocabulary=min(text.vocab_size, config.image_token_index),
        cross_at=tuple(text.cross_attention_layers),
        vision_global_layers=vision.num_global_layers,
        tiles=vision.max_num_tiles,
    )


def build(
    config: MllamaConfig, *, gate: float, dtype: torch.dtype
) -> MllamaForConditionalGeneration:
    """Random weights, by torch's generator, and the cross-attention layers' gates at ``gate``."""
    model = MllamaForConditionalGeneration._from_config(config, dtype=dtype)
    gates = ("cross_attn_attn_gate", "cross_attn_mlp_gate")
    refill(model, gates, partial(nn.init.constant_, val=gate))
    return model
