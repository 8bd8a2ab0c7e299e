"""A tiny idefics and its processor, for trying out; nothing is downloaded."""

from __future__ import annotations

from transformers import IdeficsConfig, IdeficsProcessor
from transformers.models.idefics.configuration_idefics import IdeficsPerceiverConfig
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.idefics.processor import AROUND, IMAGE_TOKEN, Processor
from ds_lvx.models.idefics.sized import config_of
from ds_lvx.models.size import Size

IMAGE_SIZE = 28
MAX_POSITIONS = 4096
_BOS, _EOS, _UNKNOWN = "<s>", "</s>", "<unk>"


def tiny_processor() -> Processor:
    """The processor that belongs to `tiny_config`."""
    tokenizer = byte_tokenizer(
        (_BOS, _EOS, _UNKNOWN, AROUND, IMAGE_TOKEN),
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        pad_token=_UNKNOWN,
    )
    images = IdeficsImageProcessorPil(image_size=IMAGE_SIZE)
    return Processor(IdeficsProcessor(images, tokenizer, image_size=IMAGE_SIZE))


def tiny_config(processor: Processor) -> IdeficsConfig:
    """A model of about 250,000 parameters: 4 text layers, 2 gated ones, 2 of vision.

    Args:
        processor: with the tokenizer whose tokens it has outputs for.
    """
    tokenizer = processor.tokenizer
    size = Size(
        vocabulary=len(tokenizer),
        kv_heads=4,
        layers=6,
        cross_at=(0, 3),
        positions=MAX_POSITIONS,
        image_size=IMAGE_SIZE,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    config = config_of(size)
    config.perceiver_config = IdeficsPerceiverConfig(
        use_resampler=True,
        resampler_n_latents=4,
        resampler_depth=1,
        resampler_n_heads=2,
        resampler_head_dim=8,
    )
    return config
