"""Sharding a batch for mllama: the text evenly by token, the frames by image.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample (those of a sample with fewer are
padded), ``tiles`` of an image, ``P`` visual tokens of a tile.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.models.batch import ShardedBatch, Text, digest, move, span, split
from ds_lvx.models.mllama.mask import Runs, pack_tiles, unpack_tiles

_TEXT_KEYS = ("input_ids", "attention_mask", "position_ids", "labels")
_MASK_KEYS = ("cross_attention_mask", "visible_images")
_FRAME_KEYS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
_KEYS = (*_TEXT_KEYS, *_MASK_KEYS, *_FRAME_KEYS, "cross_attention_states")


def shard(
    batch: Mapping[str, Any],
    model: MllamaForConditionalGeneration,
    *,
    channel: Channel,
    frames: str,
    always_vision: bool,
) -> dict[str, Any]:
    """This rank's part of a batch, ready for ``model(**shard)``; see `ds_lvx.shard_batch`.

    Args:
        batch: the batch as mllama's processor returns it.
        model: the model that will get the shard.
        channel: the sequence-parallel group.
        frames: ``"all"`` or ``"local"``.
        always_vision: send a batch without images through the vision tower and the
            cross-attention layers all the same (with nothing to see, and exactly no effect), so
            that this group takes part in every collective that groups with images take part in.

    Collectives: one agreement on the control plane.
    """
    draft, error = None, None
    try:
        draft = _Draft.of(batch, model, channel=channel, frames=frames)
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as caught:  # noqa: BLE001
        error = caught
    records = channel.agree({} if draft is None else draft.record(), error)
    assert draft is not None
    require_same(records, draft.shared_record(), what="shard_batch")
    return draft.finish(records, always_vision=always_vision)


@dataclass(frozen=True, eq=False)
class _Draft:
    """What one rank knows of the batch before it has heard of the others."""

    model: MllamaForConditionalGeneration
    channel: Channel
    frames: str
    text: Text
    runs: Runs | None
    pixels: dict[str, Tensor]
    states: Tensor | None
    share: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], model: Any, *, channel: Channel, frames: str) -> _Draft:
        batch = {key: value for key, value in batch.items() if value is not None}
        _check_keys(batch, frames)
        text = Text.of(batch)
        if text.shape[1] < channel.size:
            raise ValueError(
                f"got {text.shape[1]} text tokens for {channel.size} ranks; expected at least one "
                "token a rank: use longer texts or a smaller sequence_parallel_size"
            )
        pixels = {key: batch[key] for key in _FRAME_KEYS if key in batch}
        _check_pixels(pixels, model, batch_size=text.shape[0])
        runs = _runs(batch, text)
        states = batch.get("cross_attention_states")
        if states is not None:
            states = _states_by_token(states, model, runs, batch_size=text.shape[0])
        share = 0 if "pixel_values" not in pixels else pixels["pixel_values"].shape[1]
        return cls(model, channel, frames, text, runs, pixels, states, share)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        runs = self.runs
        record = {
            "frames": self.frames,
            "shape of input_ids": list(self.text.shape),
            "contents of the text (a checksum)": self.text.digest(),
            "visibility of the images (a checksum)": runs
            and digest(runs.start, runs.end, runs.tiles),
        }
        if self.frames == "all":
            record["number of images"] = self.share
            record["visual tokens given"] = None if self.states is None else self.states.shape[1]
        return record

    def record(self) -> dict[str, Any]:
        tiles = self._tiles() if self._tiles_are_local else None
        packed = None if tiles is None else pack_tiles(tiles)
        return {**self.shared_record(), "share": self.share, "tiles": packed}

    def finish(self, records: Sequence[Mapping[str, Any]], *, always_vision: bool) -> Any:
        """Cut out this rank's shard, knowing how many images each rank holds."""
        channel, device = self.channel, _device(self.model)
        shares = tuple(int(record["share"]) for record in records)
        if self.frames == "all":
            shares = split(self.share, channel.size)
        lengths = split(self.text.shape[1], channel.size)
        shard = self.text.shard(span(lengths, channel.rank))
        vision, kv_lengths, cross = self._vision(shares, records)
        row_mask = None if cross is None or self.runs is None else ~self.runs.sees_nothing
        if kv_lengths is None and always_vision:
            vision, kv_lengths = self._dummy(), (0,) * channel.size
            row_mask = torch.zeros(self.text.shape).bool()
        keyword = ShardedBatch.of(
            channel=channel,
            text_lengths=lengths,
            kv_lengths=kv_lengths,
            text_rule=self.text.visibility(),
            cross_rule=cross,
            row_mask=row_mask,
            device=device,
        )
        shard = {key: move(value, device) for key, value in {**shard, **vision}.items()}
        return {**shard, "use_cache": False, "ds_lvx": keyword}

    def _vision(self, shares: tuple[int, ...], records: Sequence[Mapping[str, Any]]) -> Any:
        """Model arguments, visual tokens by rank, and the whole rule."""
        if self.states is not None:
            return self._given_states()
        if sum(shares) == 0:
            if self.runs is not None:
                self.runs.check_images(0)
            return {}, None, None
        mine = span(shares, self.channel.rank)
        # With frames="local" the frames at hand are this rank's from the first on.
        cut = mine if self.frames == "all" else slice(0, self.share)
        vision = {key: value[:, cut] for key, value in self.pixels.items()}
        max_tiles, patches = _tile_shape(self.model)
        kv_lengths = tuple(share * max_tiles * patches for share in shares)
        cross = None
        if self.runs is not None:
            self.runs.check_images(sum(shares))
            tiles = self._tiles()
            if self._tiles_are_local:
                shapes = [(self.text.shape[0], share, max_tiles) for share in shares]
                parts = zip((record["tiles"] for record in records), shapes, strict=True)
                tiles = torch.cat([unpack_tiles(*part) for part in parts], dim=1)
            cross = self.runs.visibility(tiles, patches=patches)
        if shares[self.channel.rank] == 0:
            vision = self._dummy()
        return vision, kv_lengths, cross

    @property
    def _tiles_are_local(self) -> bool:
        """Whether other ranks must be told which of this rank's tiles are padding."""
        return self.frames == "local" and self.runs is not None and self.runs.tiles is None

    def _tiles(self) -> Tensor:
        """bool ``[B, n, tiles]``: the tiles of the frames at hand that are no padding."""
        assert self.runs is not None
        if self.runs.tiles is not None:
            return self.runs.tiles
        if "aspect_ratio_mask" in self.pixels:
            return self.pixels["aspect_ratio_mask"].cpu().bool()
        max_tiles, patches = _tile_shape(self.model)
        images = 0 if self.states is None else self.states.shape[1] // (max_tiles * patches)
        return torch.ones(self.text.shape[0], images, max_tiles).bool()

    def _given_states(self) -> Any:
        """The features are given: split them by image, or by token where images do not matter."""
        assert self.states is not None
        max_tiles, patches = _tile_shape(self.model)
        unit = 1 if self.runs is None else max_tiles * patches
        images = self.states.shape[1] // unit
        kv_lengths = tuple(share * unit for share in split(images, self.channel.size))
        cross = None
        if self.runs is not None:
            self.runs.check_images(images)
            cross = self.runs.visibility(self._tiles(), patches=patches)
        features = self.states[:, span(kv_lengths, self.channel.rank)]
        return {"cross_attention_states": features}, kv_lengths, cross

    def _dummy(self) -> dict[str, Tensor]:
        """One blank frame. A rank without frames runs it through the vision tower and drops the
        result, so that it takes part in ZeRO-3's gathers and its gradients are 0, not absent."""
        config = _vision_config(self.model)
        tiles, size = config.max_num_tiles, config.image_size
        mask = torch.zeros(1, 1, tiles, dtype=torch.long)
        mask[..., 0] = 1
        return {
            "pixel_values": torch.zeros(1, 1, tiles, config.num_channels, size, size),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": mask,
        }


def _check_keys(batch: Mapping[str, Any], frames: str) -> None:
    if frames not in ("all", "local"):
        raise ValueError(f'got frames={frames!r}; expected "all" or "local"')
    for key in batch:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1) or ["input_ids"]
            raise ValueError(
                f"got {key!r} in the batch; expected only {', '.join(_KEYS)} (nearest: "
                f"{near[0]!r}): remove it, or pass it to the model yourself"
            )
    if all(key in batch for key in _MASK_KEYS):
        raise ValueError("got cross_attention_mask and visible_images; expected one of them")
    if "cross_attention_states" in batch and "pixel_values" in batch:
        raise ValueError("got pixel_values and cross_attention_states; expected one of them")
    if "cross_attention_states" in batch and frames == "local":
        raise ValueError(
            'got cross_attention_states with frames="local"; expected the features of the whole '
            'batch with frames="all", or pixel_values of the local frames'
        )


def _check_pixels(
    pixels: Mapping[str, Tensor],
    model: MllamaForConditionalGeneration,
    *,
    batch_size: int,
) -> None:
    if "pixel_values" not in pixels:
        return
    missing = [key for key in _FRAME_KEYS if key not in pixels]
    if missing:
        raise ValueError(f"got pixel_values without {missing[0]}; the vision tower needs both")
    config = _vision_config(model)
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


def _states_by_token(
    states: Tensor,
    model: MllamaForConditionalGeneration,
    runs: Runs | None,
    *,
    batch_size: int,
) -> Tensor:
    """``[B * N * tiles, P, hidden]`` or ``[B, S, hidden]`` as ``[B, S, hidden]``."""
    hidden = model.lm_head.in_features
    if states.ndim != 3 or states.shape[2] != hidden or states.shape[0] % batch_size:
        raise ValueError(
            f"got cross_attention_states {tuple(states.shape)}; expected [batch * images * tiles, "
            f"patches, {hidden}] or [batch, tokens, {hidden}] for {batch_size} samples"
        )
    states = states.reshape(batch_size, -1, hidden)
    max_tiles, patches = _tile_shape(model)
    if runs is not None and states.shape[1] % (max_tiles * patches):
        raise ValueError(
            f"got {states.shape[1]} visual tokens a sample; expected a multiple of {max_tiles} "
            f"tiles of {patches} tokens, because the mask is one of whole images"
        )
    return states


def _tile_shape(model: MllamaForConditionalGeneration) -> tuple[int, int]:
    """Tiles of an image, and visual tokens of a tile."""
    return _vision_config(model).max_num_tiles, model.model.vision_model.num_patches


def _vision_config(model: MllamaForConditionalGeneration) -> Any:
    return model.config.vision_config


def _device(model: torch.nn.Module) -> torch.device:
    parameter = next(model.parameters())
    # A parameter that ZeRO-3 keeps elsewhere tells nothing of where the model computes.
    if hasattr(parameter, "ds_id"):
        return torch.device(get_accelerator().current_device_name())
    return parameter.device
