"""A Llama-3.2-Vision model small enough to train on a CPU in seconds."""

from __future__ import annotations

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from digits.data import FRAME_SIZE, IMAGE_TOKEN


def tiny_mllama(seed: int) -> MllamaForConditionalGeneration:
    """Four text layers, two of them cross-attention, and two vision layers, randomly initialised.

    The same seed gives the same weights.
    """
    vision = MllamaVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        intermediate_size=128,
        image_size=FRAME_SIZE,
        patch_size=8,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0, 1],
        vision_output_dim=64 * 3,
        initializer_range=0.1,
    )
    text = MllamaTextConfig(
        vocab_size=IMAGE_TOKEN,  # the image token itself is never written
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        cross_attention_layers=[1, 3],
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=0,  # no sequence here begins, ends or is padded by a token
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    )
    for name, parameter in model.named_parameters():
        # As downloaded weights have them; shut, as in a new model, no frame would be seen at first.
        if "cross_attn_" in name and name.endswith("gate"):
            torch.nn.init.constant_(parameter, 1.0)
    return model
