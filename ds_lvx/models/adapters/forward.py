"""What stands in the place of a model's encoder: this rank's images, then everyone's results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from ds_lvx.attention.sequence import gather_shards
from ds_lvx.distributed.channel import Channel
from ds_lvx.models.adapters.batch import LENGTHS, ROWS
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.visual import PIXELS


def gather_images(
    made: Tensor, rows: Tensor, *, channel: Channel, lengths: tuple[int, ...]
) -> Tensor:
    """What stands at the image tokens of this rank's text.

    Args:
        made: ``[n, P, hidden]``, of this rank's images, or of a blank one that is dropped.
        rows: int64 ``[m]``, those that are wanted, of the rows of all ranks.
        channel: the ranks that share the batch.
        lengths: rows by rank.

    Returns:
        ``[m, hidden]``. In backward the gradients of all ranks are summed where the image is.

    Collectives: an all-gather of this rank's rows, and in backward an all-to-all.
    """
    mine = made.flatten(0, 1)[: lengths[channel.rank]]
    whole = gather_shards(mine, 0, channel=channel, lengths=lengths, wants_grad=mine.requires_grad)
    return whole.index_select(0, rows)


class EncodePrompt(Hook):
    """A forward pre-hook of a text model: a prompt as embeddings, with the images at their places.

    Generation is the text model's own, which is handed the images of this rank.

    Args:
        model: the whole model, whose own parameters ZeRO-3 has to have ready.
        takes: the arguments that are the images'.
        embed: embeds ids ``[B, T]`` with a batch, by these arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        takes: Collection[str],
        embed: Callable[[ShardedBatch, Tensor, Mapping[str, Any]], Tensor],
    ) -> None:
        self._model, self._takes, self._embed = model, tuple(takes), embed

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        if batch is None or batch.decoding is None or self._takes[0] not in kwargs:
            return None
        given, copies = dict(kwargs), batch.decoding.copies
        ids = given.pop("input_ids")[::copies]  # rows of a sample lie side by side
        taken = {key: given.pop(key, None) for key in self._takes}
        own = [*self._model.parameters(recurse=False)]
        with deepspeed.zero.GatheredParameters(
            own, enabled=any(hasattr(each, "ds_id") for each in own)
        ):
            x = self._embed(replace(batch, decoding=None), ids, taken)
        return args, {**given, "inputs_embeds": x.repeat_interleave(copies, dim=0)}


def with_images(text: Any, ids: Tensor, places: Tensor, made: Tensor | None) -> Tensor:
    """Embeddings of a text ``[B, T, hidden]``, with ``made [m, hidden]`` at the places of images.

    Args:
        text: the text model, whose embedding may have no row for the token of a place.
        ids: ``[B, T]``.
        places: bool ``[B, T]``.
        made: what stands there, in order; None: nothing does.
    """
    x: Tensor = text.get_input_embeddings()(ids.masked_fill(places, 0))
    if made is None:
        return x
    return x.masked_scatter(places[..., None].expand_as(x), made.to(x.dtype))


class Encode(Hook):
    """A forward pre-hook of a model of transformers, and what runs in the place of its encoder.

    The encoder is a method that takes pixels and returns an object with ``pooler_output``, the
    rows of the images in order. It gets no keyword but its own: with others some fail. Meanwhile
    its Q-Former is given masks that nobody has to look into.

    Args:
        model: the model.
        name: of the method.
        takes: arguments of the model's that it takes as well, tensors with a row an image.
        as_videos: it takes ``[videos, frames, ...]``; here a frame is a video of its own.
        token: that stands in the places of images.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        token: int | None,
        takes: Collection[str] = (),
        as_videos: bool = False,
    ) -> None:
        self._token = -1 if token is None else token  # batches are refused without
        self._model, self._name, self._takes = model, name, tuple(takes)
        self._as_videos = as_videos
        self._before = vars(model).get(name)
        self._own: Callable[..., Any] = getattr(model, name)
        self._now: tuple[ShardedBatch, Tensor, tuple[int, ...]] | None = None
        self._encodes = False
        setattr(model, name, self._encode)
        self._prepared = model.qformer.register_forward_pre_hook(self._prepare, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        self._now = None
        if batch is None:
            return None
        # Its forward insists on some that a batch without images has not.
        given = {**dict.fromkeys((PIXELS, *self._takes)), **kwargs}
        self._now = batch, given.pop(ROWS), given.pop(LENGTHS)
        return args, given

    def _encode(self, pixels: Tensor | None = None, **kwargs: Any) -> Any:
        if self._now is None:
            return self._own(pixels, **kwargs)
        now, self._now = self._now, None  # it is run once a forward, and keeps nothing alive
        return self._made(*now, pixels, kwargs)

    def embed(self, batch: ShardedBatch, ids: Tensor, given: Mapping[str, Any]) -> Tensor:
        """A prompt's embeddings, for `EncodePrompt`."""
        rows, lengths, pixels = (given[key] for key in (ROWS, LENGTHS, PIXELS))
        made = None
        if pixels is not None:
            made = self._made(batch, rows, lengths, pixels, given).pooler_output
        return with_images(self._model.language_model, ids, ids == self._token, made)

    def _made(
        self,
        batch: ShardedBatch,
        rows: Tensor,
        lengths: tuple[int, ...],
        pixels: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Any:
        if pixels is None:
            return SimpleNamespace(
                pooler_output=torch.zeros(0, device=rows.device),
                qformer_outputs=None,
                vision_outputs=None,
            )
        if self._as_videos:
            pixels = pixels.unsqueeze(1)
        taken = {key: kwargs[key] for key in self._takes}
        self._encodes = True
        try:
            found = self._own(pixels, **taken, return_dict=True)
        finally:
            self._encodes = False
        found.pooler_output = gather_images(
            found.pooler_output, rows, channel=batch.channel, lengths=lengths
        )
        return found

    def _prepare(
        self, qformer: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """The Q-Former's masks: transformers asks the device whether there is padding in one.

        An image has none. Which tokens of an instruction are padding, SDPA takes in 4 dimensions as
        they are; others want two, and do not ask.
        """
        if not self._encodes:
            return None
        given = {**kwargs, "encoder_attention_mask": None}
        mask: Tensor | None = given.get("attention_mask")
        if mask is not None and mask.ndim == 2 and qformer.config._attn_implementation == "sdpa":
            given["attention_mask"] = mask.bool()[:, None, None].expand(-1, -1, mask.shape[1], -1)
        return args, given

    def undo(self) -> None:
        """Give the model its own encoder back."""
        self._prepared.remove()
        vars(self._model).pop(self._name, None)
        if self._before is not None:
            setattr(self._model, self._name, self._before)
