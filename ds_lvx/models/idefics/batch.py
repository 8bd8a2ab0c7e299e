"""idefics's batches: what of them is visual, and the rule by which text sees images.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample (those of a sample with fewer are
padded, and seen by nobody).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.runs import Runs
from ds_lvx.models.text import Here, Text
from ds_lvx.models.visual import Visual

PIXELS = "pixel_values"
MASK = "image_attention_mask"
SEEN = "visible_images"
KEYS = (PIXELS, MASK, SEEN)


@dataclass(frozen=True, eq=False)
class SeenImages(Runs):
    """The run of images that each token sees; see `Runs`."""

    def check_images(self, images: int) -> None:
        """Compare with the number of images that came.

        Raises:
            ValueError: text looks beyond them, or the mask is one of another number.
        """
        reach = int(self.end.max()) if self.end.numel() else 0
        start = int(self.start.min()) if self.start.numel() else 0
        # The processor's mask of a batch without images has one column, of zeros.
        if start < 0 or reach > images or (reach > 0 and self.images not in (None, images)):
            of = f"{MASK} for {self.images}" if self.images is not None else f"{SEEN} to {reach}"
            raise ValueError(
                f"got {of} images a sample, and {images} images; expected the same number: the "
                "mask is that of the whole batch, never of a shard"
            )


@dataclass(frozen=True, eq=False)
class Images(Visual):
    """The images of a batch, each of the same number of visual tokens."""

    def positions(self, text: Text) -> Tensor | None:
        """As the model's own forward makes them: they skip padding, which has 1."""
        if text.position_ids is not None or text.attention_mask is None:
            return None
        pads = text.attention_mask == 0
        return ((~pads).long().cumsum(dim=1) - 1).masked_fill(pads, 1)

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Positions of this rank's text."""
        positions = self.positions(text)
        return {} if positions is None else {"position_ids": positions[:, here]}


def visual(batch: Mapping[str, Any], text: Text, model: Any) -> Images:
    """The visual part of a batch, as idefics's processor has it."""
    pixels = batch.get(PIXELS)
    if pixels is not None and SEEN not in batch:  # its mask is that of one sample a row
        text.refuse_packed()
    if pixels is not None:
        _check_pixels(pixels, model.config.vision_config, batch_size=text.shape[0])
    count = 0 if pixels is None else pixels.shape[1]
    arguments = {} if pixels is None else {PIXELS: pixels}
    return Images(count, image_tokens(model.config), arguments, _runs(batch, text))


def blank(config: Any) -> dict[str, Tensor]:
    """One blank image."""
    vision = config.vision_config
    size = vision.image_size
    return {PIXELS: torch.zeros(1, 1, vision.num_channels, size, size)}


def image_tokens(config: Any) -> int:
    """Visual tokens of an image that text sees."""
    if config.use_resampler:
        return int(config.perceiver_config.resampler_n_latents)
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


def _check_pixels(pixels: Any, vision: Any, *, batch_size: int) -> None:
    found: Any = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    images = found[1] if isinstance(found, tuple) and len(found) > 1 else 0
    size = vision.image_size
    expected = (batch_size, images, vision.num_channels, size, size)
    if found != expected:
        raise ValueError(
            f"got {PIXELS} {found}; expected {expected} for {batch_size} samples and this model's "
            "images: use the processor that belongs to the model"
        )


def _runs(batch: Mapping[str, Any], text: Text) -> SeenImages:
    mask, seen = batch.get(MASK), batch.get(SEEN)
    if mask is not None and seen is not None:
        raise ValueError(f"got {MASK} and {SEEN}; expected one of them")
    if mask is None and seen is None:
        if PIXELS in batch:
            raise ValueError(
                f"got {PIXELS} without {MASK}; expected it beside them, [batch, text tokens, "
                "images], as the processor makes it: which images each token sees"
            )
        nothing = torch.zeros(text.shape, dtype=torch.int32)
        return SeenImages(nothing, nothing, None, None)
    given, last = (mask, None) if mask is not None else (seen, 2)
    key = MASK if mask is not None else SEEN
    found: Any = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    whole = isinstance(given, Tensor) and given.ndim == 3 and found[:2] == text.shape
    if not whole or last not in (None, found[2]):
        expected = (*text.shape, "images" if last is None else last)
        raise ValueError(
            f"got {key} {found}; expected {expected}, the first two as input_ids: the whole "
            "sequence, never a shard"
        )
    return _of_mask(mask) if mask is not None else _of_visible_images(seen)


def _of_visible_images(seen: Any) -> SeenImages:
    start, end = (part.to(torch.int32) for part in seen.detach().cpu().unbind(dim=-1))
    return SeenImages(start, torch.maximum(start, end), None, None)


def _of_mask(mask: Any) -> SeenImages:
    """The runs of a mask ``[B, T, N]``, a sample at a time.

    Raises:
        NotImplementedError: some token sees images that are no run.
    """
    images = mask.shape[2]
    start, end = torch.zeros(2, *mask.shape[:2], dtype=torch.int32)
    index = torch.arange(images, dtype=torch.int32)
    for sample in range(len(mask) if images > 0 else 0):
        seen = (mask[sample] != 0).cpu()
        last = torch.where(seen, index + 1, 0).amax(dim=1)
        first = torch.minimum(torch.where(seen, index, images).amin(dim=1), last)
        gaps = (last - first != seen.sum(dim=1)).nonzero()[:, 0]
        if len(gaps) > 0:
            token = int(gaps[0])
            raise NotImplementedError(
                f"got an {MASK} in which token {token} of sample {sample} sees the images "
                f"{seen[token].nonzero()[:, 0].tolist()}; expected images a, a + 1, ..., b or "
                "none, as the processor has them: the sharded attention sees runs of images only"
            )
        start[sample], end[sample] = first, last
    return SeenImages(start, end, None, images)
