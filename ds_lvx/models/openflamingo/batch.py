"""OpenFlamingo's batches: what of them is visual, and the rule by which text sees images.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample (those of a sample with fewer are
padded), of one frame each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.runs import Runs
from ds_lvx.models.samples import images_before, sample_begins
from ds_lvx.models.text import Text
from ds_lvx.models.visual import Visual

PIXELS = "vision_x"
KEYS = (PIXELS,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Counted(Runs):
    """The run of images that each token sees, by the image tokens up to it.

    Attributes:
        latest: see `Facts`.
    """

    latest: bool

    def check_images(self, images: int) -> None:
        """Compare with the number of images that came.

        Raises:
            ValueError: the text has more image tokens, or sees all images before it and has none.
        """
        if images == 0 and not self.latest:
            raise ValueError(
                f"got a batch without {PIXELS} for a model whose text sees all images before it; "
                "expected a blank image at least, as its own code wants it: text before the first "
                "image takes the mean of all images of the batch's sample"
            )
        reach = int(self.end.max()) if self.end.numel() else 0
        if reach > images:
            raise ValueError(
                f"got {reach} image tokens in the text of a sample and {images} images a sample in "
                f"{PIXELS}; expected an image for each of them"
            )


@dataclass(frozen=True)
class Facts:
    """What a batch is checked by.

    Attributes:
        image_token: its id.
        latents: visual tokens of an image that text sees.
        image: channels, height and width.
        latest: text sees the latest image alone, not all before it.
    """

    image_token: int
    latents: int
    image: tuple[int, int, int]
    latest: bool

    @classmethod
    def of(cls, model: Any) -> Facts:
        """Of a model of the package, of ours, or of what has the config of ours alone."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "media_token_id"):
            return cls(model.media_token_id, latents(model), _image(model), latest_only(model))
        side = int(config.vision_config.image_size)
        latest = bool(config.only_attend_immediate_media)
        return cls(config.media_token_id, int(config.latents), (3, side, side), latest)


def visual(batch: Mapping[str, Any], text: Text, model: Any) -> Visual:
    """The visual part of a batch: the pixels, and the image tokens of the text.

    Args:
        batch: with ``vision_x [B, N, 1, channels, height, width]``, or with nothing but text.
        text: its text.
        model: a `Flamingo`.
    """
    facts, pixels = Facts.of(model), batch.get(PIXELS)
    begins = sample_begins(text)
    if begins is not None and not facts.latest:
        raise NotImplementedError(
            "got samples that share a row for a model whose text sees all images before it; "
            "expected a row for each: text before a sample's first image would take the mean of "
            "those of the others; leave --pack (pack=) out"
        )
    if pixels is not None:
        _check_pixels(pixels, facts.image, batch_size=text.shape[0])
    count = 0 if pixels is None else pixels.shape[1]
    end = (text.input_ids.cpu() == facts.image_token).cumsum(1, dtype=torch.int32)
    # Images of the samples before, in a row that several share.
    before = torch.zeros_like(end) if begins is None else images_before(end, begins)
    start = torch.maximum(end - 1, before) if facts.latest else before
    arguments = {} if pixels is None else {PIXELS: pixels}
    runs = Counted(start, end, None, None, latest=facts.latest)
    return Visual(count, facts.latents, arguments, runs, blind_see_all=not facts.latest)


def blank(model: Any) -> dict[str, Tensor]:
    """One blank image."""
    return {PIXELS: torch.zeros(1, 1, 1, *Facts.of(model).image)}


def latents(model: Any) -> int:
    """Visual tokens of an image that text sees."""
    parameter = model.perceiver.latents
    # Of a parameter that ZeRO-3 has partitioned the shape is empty.
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def latest_only(model: Any) -> bool:
    """Whether text sees the latest image alone, not all before it."""
    layers = (layer for layer in model.lang_encoder.gated_cross_attn_layers if layer is not None)
    return all(layer.attn.only_attend_immediate_media for layer in layers)


def _image(model: Any) -> tuple[int, int, int]:
    size = model.vision_encoder.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return 3, int(height), int(width)


def _check_pixels(pixels: Any, image: tuple[int, int, int], *, batch_size: int) -> None:
    found: Any = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    images = found[1] if isinstance(found, tuple) and len(found) > 1 else 0
    expected = (batch_size, images, 1, *image)
    if found != expected:
        raise ValueError(
            f"got {PIXELS} {found}; expected {expected}, images of one frame each for {batch_size} "
            "samples, by the image processor that belongs to the model"
        )
