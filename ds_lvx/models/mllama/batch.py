"""mllama's batches: what of them is visual, and the rule by which text sees images.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample (those of a sample with fewer are
padded), ``tiles`` of an image, ``P`` visual tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.models.batch import Text
from ds_lvx.models.visual import Runs, Visual

STATES = "cross_attention_states"
_MASK_KEYS = ("cross_attention_mask", "visible_images")
COUNTS = "num_images"
FRAME_KEYS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
KEYS = (*_MASK_KEYS, COUNTS, *FRAME_KEYS, STATES)


def visual(batch: Mapping[str, Any], text: Text, model: MllamaForConditionalGeneration) -> Visual:
    """The visual part of a batch, as mllama's processor or `visible_images` has it.

    A padding tile is seen by nobody, but for the tokens before the first image: transformers lets
    their attention see every key, padding included, and drops the output of their MLP instead. In a
    batch that holds for the images that pad a sample, too, so that its loss depends on who shares
    the batch; with ``num_images`` it sees its own only, and one without images none, as alone.
    """
    if all(key in batch for key in _MASK_KEYS):
        raise ValueError("got cross_attention_mask and visible_images; expected one of them")
    if STATES in batch and "pixel_values" in batch:
        raise ValueError(f"got pixel_values and {STATES}; expected one of them")
    pixels = {key: batch[key] for key in FRAME_KEYS if key in batch}
    _check_pixels(pixels, model, batch_size=text.shape[0])
    runs = _runs(batch, text)
    counts = _counts(batch, runs, batch_size=text.shape[0])
    if STATES in batch:
        states = _given_states(batch[STATES], model, runs, batch_size=text.shape[0])
        return replace(states, counts=counts)
    tiles, patches = tile_shape(model)
    count = 0 if "pixel_values" not in pixels else pixels["pixel_values"].shape[1]
    none = torch.zeros(text.shape[0], 0, tiles)
    return Visual(
        count,
        tiles * patches,
        pixels,
        runs,
        valid=pixels.get("aspect_ratio_mask", none),
        blind_see_all=True,
        counts=counts,
    )


def _given_states(
    states: Tensor, model: MllamaForConditionalGeneration, runs: Runs | None, *, batch_size: int
) -> Visual:
    """Features: split by image, or by token where images do not matter."""
    states = _states_by_token(states, model, runs, batch_size=batch_size)
    tiles, patches = tile_shape(model)
    unit = 1 if runs is None else tiles * patches
    count = states.shape[1] // unit
    valid = torch.ones(batch_size, count, tiles)
    return Visual(
        count, unit, {STATES: states}, runs, valid=valid, blind_see_all=True, encoded=True
    )


def blank(model: MllamaForConditionalGeneration) -> dict[str, Tensor]:
    """One blank frame."""
    config: Any = model.config.vision_config
    tiles, size = config.max_num_tiles, config.image_size
    mask = torch.zeros(1, 1, tiles, dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": torch.zeros(1, 1, tiles, config.num_channels, size, size),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def visible_images(input_ids: Tensor, image_token_id: int) -> Tensor:
    """The images that each token sees by the rule of mllama's processor, without its mask.

    A token sees the images from the start of the latest group of adjacent image tokens to the
    latest image so far. Pass the result to `ds_lvx.shard_batch` as ``visible_images``.

    Args:
        input_ids: int ``[B, T]``, the whole text.
        image_token_id: the id of ``<|image|>``.

    Returns:
        int32 ``[B, T, 2]``: first image, and one past the last; both 0 before the first image.

    Source: transformers, ``processing_mllama.get_cross_attention_token_mask``.
    """
    is_image = input_ids == image_token_id
    seen = is_image.cumsum(dim=1)
    follows_image = torch.nn.functional.pad(is_image[:, :-1], (1, 0), value=False)
    opens = is_image & ~follows_image
    start = torch.where(opens, seen - 1, 0).cummax(dim=1).values
    return torch.stack([start, seen], dim=-1).to(torch.int32)


def _check_pixels(
    pixels: Mapping[str, Tensor],
    model: MllamaForConditionalGeneration,
    *,
    batch_size: int,
) -> None:
    if "pixel_values" not in pixels:
        return
    missing = [key for key in FRAME_KEYS if key not in pixels]
    if missing:
        raise ValueError(f"got pixel_values without {missing[0]}; the vision tower needs both")
    config: Any = model.config.vision_config
    found = tuple(pixels["pixel_values"].shape)
    images = found[1] if len(found) > 1 else 0
    tile = (config.num_channels, config.image_size, config.image_size)
    expected = {
        "pixel_values": (batch_size, images, config.max_num_tiles, *tile),
        "aspect_ratio_ids": (batch_size, images),
        "aspect_ratio_mask": (batch_size, images, config.max_num_tiles),
    }
    for key, shape in expected.items():
        if tuple(pixels[key].shape) != shape:
            raise ValueError(
                f"got {key} {tuple(pixels[key].shape)}; expected {shape} for {batch_size} samples "
                "and this model's tiles: use the processor that belongs to the model"
            )


def _runs(batch: Mapping[str, Any], text: Text) -> Runs | None:
    for key, ndim, make in (
        ("cross_attention_mask", 4, Runs.of_mask),
        ("visible_images", 3, Runs.of_visible_images),
    ):
        value = batch.get(key)
        if value is None:
            continue
        if value.ndim != ndim or tuple(value.shape[:2]) != text.shape:
            raise ValueError(
                f"got {key} {tuple(value.shape)}; expected {ndim} dimensions that begin with "
                f"{text.shape}, as input_ids: the whole sequence, never a shard"
            )
        return make(value)
    return None


def _counts(batch: Mapping[str, Any], runs: Runs | None, *, batch_size: int) -> Tensor | None:
    """How many images each sample has of its own.

    Raises:
        ValueError: no count a sample, one that text looks beyond, or counts without a mask.
    """
    counts = batch.get(COUNTS)
    if counts is None:
        return None
    if not isinstance(counts, Tensor) or tuple(counts.shape) != (batch_size,) or runs is None:
        found = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(
            f"got {COUNTS} {found}; expected a tensor [{batch_size}], the images of each sample, "
            f"beside one of {' and '.join(_MASK_KEYS)}"
        )
    reach = runs.end.amax(dim=1)
    beyond = (reach > counts.cpu()).nonzero()[:, 0].tolist()
    if beyond:
        row = beyond[0]
        raise ValueError(
            f"got {COUNTS} {int(counts[row])} for sample {row}, whose text sees {int(reach[row])} "
            "images; expected at least as many"
        )
    return counts


def _states_by_token(
    states: Tensor,
    model: MllamaForConditionalGeneration,
    runs: Runs | None,
    *,
    batch_size: int,
) -> Tensor:
    """``[B * N * tiles, P, hidden]`` or ``[B, S, hidden]`` as ``[B, S, hidden]``."""
    hidden = model.config.get_text_config().hidden_size
    if states.ndim != 3 or states.shape[2] != hidden or states.shape[0] % batch_size:
        raise ValueError(
            f"got cross_attention_states {tuple(states.shape)}; expected [batch * images * tiles, "
            f"patches, {hidden}] or [batch, tokens, {hidden}] for {batch_size} samples"
        )
    states = states.reshape(batch_size, -1, hidden)
    max_tiles, patches = tile_shape(model)
    if runs is not None and states.shape[1] % (max_tiles * patches):
        raise ValueError(
            f"got {states.shape[1]} visual tokens a sample; expected a multiple of {max_tiles} "
            f"tiles of {patches} tokens, because the mask is one of whole images"
        )
    return states


def tile_shape(model: MllamaForConditionalGeneration) -> tuple[int, int]:
    """Tiles of an image, and visual tokens of a tile."""
    config: Any = model.config.vision_config
    return config.max_num_tiles, (config.image_size // config.patch_size) ** 2 + 1
