"""Llama-3.2-Vision (mllama)."""

from ds_lvx.models.mllama.family import attention_layers, encoders, find, patch, shard
from ds_lvx.models.mllama.mask import visible_images

__all__ = ["attention_layers", "encoders", "find", "patch", "shard", "visible_images"]
