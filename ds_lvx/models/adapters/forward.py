"""What stands in the place of a model's encoder: this rank's images, then everyone's results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

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


class Encode(Hook):
    """A forward pre-hook of a model of transformers, and what runs in the place of its encoder.

    The encoder is a method that takes pixels and returns an object with ``pooler_output``, the
    rows of the images in order. It gets no keyword but its own: with others some fail.

    Args:
        model: the model.
        name: of the method.
        takes: arguments of the model's that it takes as well, tensors with a row an image.
        as_videos: it takes ``[videos, frames, ...]``; here a frame is a video of its own.
    """

    def __init__(
        self, model: Any, name: str, *, takes: Collection[str] = (), as_videos: bool = False
    ) -> None:
        self._model, self._name, self._takes = model, name, tuple(takes)
        self._as_videos = as_videos
        self._before = vars(model).get(name)
        self._own: Callable[..., Any] = getattr(model, name)
        self._now: tuple[ShardedBatch, Tensor, tuple[int, ...]] | None = None
        setattr(model, name, self._encode)

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
        batch, rows, lengths = self._now
        self._now = None  # it is run once a forward, and keeps nothing alive
        if pixels is None:
            return SimpleNamespace(
                pooler_output=torch.zeros(0, device=rows.device),
                qformer_outputs=None,
                vision_outputs=None,
            )
        if self._as_videos:
            pixels = pixels.unsqueeze(1)
        taken = {key: kwargs[key] for key in self._takes}
        found = self._own(pixels, **taken, return_dict=True)
        found.pooler_output = gather_images(
            found.pooler_output, rows, channel=batch.channel, lengths=lengths
        )
        return found

    def undo(self) -> None:
        """Give the model its own encoder back."""
        vars(self._model).pop(self._name, None)
        if self._before is not None:
            setattr(self._model, self._name, self._before)
