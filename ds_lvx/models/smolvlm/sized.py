"""SmolVLM and Idefics3 with random weights, cut to any size; frames to measure with.

All layers of the text see images. A frame that is measured is a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Idefics3Config, SmolVLMConfig

from ds_lvx.models.byte_tokenizer import byte_tokenizer
from ds_lvx.models.random_weights import (
    of_heads,
    random_pixels,
    random_text,
    size_of_parts,
    text_settings,
    tiny_size,
    vision_settings,
)
from ds_lvx.models.size import Size
from ds_lvx.models.smolvlm.batch import tile_tokens
from ds_lvx.models.smolvlm.processor import AROUND, IMAGE_TOKEN, WHOLE, Processor
from ds_lvx.models.visual import PIXELS

_OTHERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TINY_SIDE = 16
_IMAGE = 49_190
"""The token of an image, where a vocabulary has room."""


@dataclass(frozen=True)
class Sizes:
    """See `ds_lvx.models.sized.Makes`.

    Attributes:
        of_class: of configurations.
    """

    of_class: Any

    def config_of(self, size: Size, image: int | None = None) -> Any:
        """The configuration of a model cut to a size.

        Args:
            size: its dimensions; ``cross_at`` says nothing here.
            image: the token of an image; None: the published models', or where the vocabulary is
                small its last.
        """
        text = {"model_type": "llama", "tie_word_embeddings": False, **text_settings(size)}
        vision = {**vision_settings(size), "initializer_range": size.initializer_range}
        side = size.image_size // size.patch_size
        return self.of_class(
            text_config=text,
            vision_config=vision,
            image_token_id=min(_IMAGE, size.vocabulary - 1) if image is None else image,
            scale_factor=3 if side % 3 == 0 else 2,
            tie_word_embeddings=False,
        )

    def size_of(self, config: Any) -> Size:
        """The size of a configuration; None is that of SmolLM2 1.7B on SigLIP so400m, as SmolVLM2
        2.2B has them."""
        if config is None:
            return Size(
                vocabulary=49_280,
                hidden=2048,
                heads=32,
                kv_heads=32,
                mlp=8192,
                layers=24,
                head_dim=64,
                cross_at=tuple(range(24)),
                positions=8192,
                rope_theta=130_000.0,
                vision_hidden=1152,
                vision_heads=16,
                vision_mlp=4304,
                vision_layers=27,
                vision_global_layers=0,
                image_size=384,
            )
        text, vision = config.text_config, config.vision_config
        return size_of_parts(text, vision, **of_heads(text))

    def tiny(self) -> tuple[Any, Processor]:
        """A model of about 200,000 parameters, and its processor: a tile has 4 tokens."""
        places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
        tokenizer = byte_tokenizer(
            (*_OTHERS, AROUND, WHOLE, *places, IMAGE_TOKEN),
            eos_token=_OTHERS[2],
            pad_token=_OTHERS[0],
        )
        sides = {"longest_edge": 3 * _TINY_SIDE}
        tile = {"longest_edge": _TINY_SIDE}
        files: dict[str, dict[str, Any]] = {
            "preprocessor_config.json": {"size": sides, "max_image_size": tile}
        }
        size = tiny_size(tokenizer, image_size=_TINY_SIDE, patch_size=_TINY_SIDE // 4)
        image = int(tokenizer.get_vocab()[IMAGE_TOKEN])
        config = self.config_of(size, image)
        return config, Processor(tokenizer, files, config)

    def random_frames(
        self, config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
    ) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.random_frames`: frames stand in front of the text."""
        image, vision = int(config.image_token_id), config.vision_config
        tiles = torch.full((total * tile_tokens(config),), image)
        batch = random_text(text_tokens, first=image, seed=seed, front=tiles)
        shape = (vision.num_channels, vision.image_size, vision.image_size)
        pixels = random_pixels(frames, shape, seed=seed, apart=(1,))
        return {**batch, PIXELS: pixels[None]} if len(pixels) else batch


SMOLVLM, IDEFICS3 = Sizes(SmolVLMConfig), Sizes(Idefics3Config)
