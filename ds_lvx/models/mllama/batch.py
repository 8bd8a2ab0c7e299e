"""mllama's batches: what of them is visual, and the rule by which text sees images.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample (those of a sample with fewer are
padded), ``tiles`` of an image, ``P`` visual tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.prefixes import Merge
from ds_lvx.models.runs import Runs
from ds_lvx.models.text import Text
from ds_lvx.models.visual import Visual

STATES = "cross_attention_states"
_MASK_KEYS = ("cross_attention_mask", "visible_images")
COUNTS = "num_images"
FRAME_KEYS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
KEYS = (*_MASK_KEYS, COUNTS, *FRAME_KEYS, STATES)


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedRuns(Runs):
    """The run of images that each token sees, of rows that hold several samples.

    Attributes:
        sample: int64 ``[B, T]``, which sample of its row a token belongs to, from 0.
    """

    sample: Tensor

    def joined(self, rows: Merge) -> Self:
        """See `Runs.joined`."""
        return replace(super().joined(rows), sample=rows.taken(self.sample, 0))

    def visibility(
        self,
        tiles: Tensor,
        *,
        patches: int,
        blind_see_all: bool = False,
        counts: Tensor | None = None,
    ) -> Visibility:
        """As of `Runs`; a token that sees no image attends to all tiles of its own sample's.

        Positions leave a place before each sample's images for their padding, so that one range
        is a sample, and one within it is a run of its images without padding::

            images of a sample       0   1       2               3
            kv_pos              -1   0   1   2   3   (4)     5   6     2, 1, none and 1 of them
        """
        assert counts is not None, "rows of several samples come with their numbers of images"
        bounds = _bounds(counts)
        image = torch.arange(tiles.shape[1]).repeat(len(bounds), 1)
        owner = torch.searchsorted(bounds[:, 1:-1].contiguous(), image, right=True)
        padding = bounds.gather(1, owner) + owner - 1
        position = torch.where(tiles, (image + owner)[..., None], padding[..., None])
        position = position.masked_fill((owner == counts.shape[1])[..., None], EVERYTHING)
        own = self.sample.clamp(max=counts.shape[1])  # what pads a row is a sample without images
        start, end = self.start + own, self.end + own
        if blind_see_all:
            start = torch.where(self.sees_nothing, bounds.gather(1, own) + own - 1, start)
            end = torch.where(self.sees_nothing, bounds.gather(1, own + 1) + own, end)
        start, end, position = (each.to(torch.int32) for each in (start, end, position.flatten(1)))
        return Visibility(start, end, position.repeat_interleave(patches, dim=1))

    def check_counts(self, counts: Tensor) -> None:
        """Compare with the images of each sample of each row, int ``[B, D]``.

        Raises:
            ValueError: a token sees another sample's.
        """
        bounds, own = _bounds(counts), self.sample.clamp(max=counts.shape[1])
        within = (bounds.gather(1, own) <= self.start) & (self.end <= bounds.gather(1, own + 1))
        wrong = (~within & ~self.sees_nothing).nonzero().tolist()
        if wrong:
            row, token = wrong[0]
            run = f"{int(self.start[row, token])} to {int(self.end[row, token]) - 1}"
            raise ValueError(
                f"got {COUNTS} {counts[row].tolist()} for row {row}, whose token {token}, of "
                f"sample {int(self.sample[row, token])}, sees the images {run} of the row; "
                "expected it to see its own sample's only"
            )


def _bounds(counts: Tensor) -> Tensor:
    """int64 ``[B, D + 2]``: images of a row before each sample, of one without images behind the
    last, and all."""
    ends = counts.cpu().long().cumsum(dim=1)
    return torch.cat((torch.zeros_like(ends[:, :1]), ends, ends[:, -1:]), dim=1)


def visual(batch: Mapping[str, Any], text: Text, model: MllamaForConditionalGeneration) -> Visual:
    """The visual part of a batch, as mllama's processor or `visible_images` has it.

    A padding tile is seen by nobody, but for the tokens before the first image: transformers lets
    their attention see every key, padding included, and drops the output of their MLP instead. In a
    batch that holds for the images that pad a sample, too, so that its loss depends on who shares
    the batch; with ``num_images`` it sees its own only, and one without images none, as alone. So
    do samples that share a row, with their numbers of images by row, ``[B, D]``.
    """
    if all(key in batch for key in _MASK_KEYS):
        raise ValueError("got cross_attention_mask and visible_images; expected one of them")
    if STATES in batch and "pixel_values" in batch:
        raise ValueError(f"got pixel_values and {STATES}; expected one of them")
    pixels = {key: batch[key] for key in FRAME_KEYS if key in batch}
    _check_pixels(pixels, model, batch_size=text.shape[0])
    runs = _runs(batch, text)
    runs, counts = _counted(batch, runs, text)
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


def visible_images(
    input_ids: Tensor, image_token_id: int, *, begins: Tensor | None = None
) -> Tensor:
    """The images that each token sees by the rule of mllama's processor, without its mask.

    A token sees the images from the start of the latest group of adjacent image tokens to the
    latest image so far. Pass the result to `ds_lvx.shard_batch` as ``visible_images``.

    Args:
        input_ids: int ``[B, T]``, the whole text.
        image_token_id: the id of ``<|image|>``.
        begins: bool ``[B, T]``, where a sample begins in its row, of rows that hold several: a
            token sees its own sample's images only.

    Returns:
        int32 ``[B, T, 2]``: first image of the row, and one past the last; both the same before a
        sample's first image.

    Source: transformers, ``processing_mllama.get_cross_attention_token_mask``.
    """
    is_image = input_ids == image_token_id
    seen = is_image.cumsum(dim=1)
    follows_image = torch.nn.functional.pad(is_image[:, :-1], (1, 0), value=False)
    begins = torch.zeros_like(is_image) if begins is None else begins
    opens = begins | (is_image & ~follows_image)
    start = torch.where(opens, seen - is_image.long(), 0).cummax(dim=1).values
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


def _counted(
    batch: Mapping[str, Any], runs: Runs | None, text: Text
) -> tuple[Runs | None, Tensor | None]:
    """How many images each sample has of its own; and the runs, of rows of several as such.

    Raises:
        ValueError: no count a sample, one that text looks beyond, or counts without a mask.
    """
    counts, rows = batch.get(COUNTS), text.shape[0]
    if counts is None:
        return runs, None
    found = tuple(counts.shape) if isinstance(counts, Tensor) else ()
    packed = len(found) == 2 and found[0] == rows and found[1] > 0
    if runs is None or not isinstance(counts, Tensor) or not (found == (rows,) or packed):
        got = found if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(
            f"got {COUNTS} {got}; expected a tensor [{rows}], the images of each sample (or "
            f"[{rows}, samples], of each of a row), beside one of {' and '.join(_MASK_KEYS)}"
        )
    if packed:
        begins = text.begins
        sample = torch.zeros(1, 1) if begins is None else begins.cumsum(dim=1)
        runs = PackedRuns(
            runs.start, runs.end, runs.tiles, runs.images, sample=sample.long().expand(text.shape)
        )
        runs.check_counts(counts)
        return runs, counts
    reach = runs.end.amax(dim=1)
    beyond = (reach > counts.cpu()).nonzero()[:, 0].tolist()
    if beyond:
        row = beyond[0]
        raise ValueError(
            f"got {COUNTS} {int(counts[row])} for sample {row}, whose text sees {int(reach[row])} "
            "images; expected at least as many"
        )
    return runs, counts


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
