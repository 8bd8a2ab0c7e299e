"""In place of the model's forward, which takes a dictionary and knows no keyword of ours.

Frames become rows on the rank that has them. The video Q-Former runs on every rank, and its rows go
to the places that this rank's text has for them. Shapes: ``n`` frames of this rank, ``Q`` rows of a
frame, ``V`` videos, ``P`` rows of a video, ``s`` tokens of this rank's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_lvx.models.adapters.forward import EncodePrompt, with_images
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import KEYWORD, Hook, patched_attention
from ds_lvx.models.video_llama.attention import VideoAttention, share_gradient
from ds_lvx.models.video_llama.batch import NUMBERS, PIXELS, ROWS, VIDEO, rows_of

_FORWARD = "forward"


class Forward:
    """The forward of a `VideoLLAMA` that takes a shard, too.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own = vars(model).get(_FORWARD)

    def __call__(self, *args: Any, ds_lvx: ShardedBatch | None = None, **kwargs: Any) -> Any:
        """The language model's output; without a sharded batch what the model itself returns."""
        if ds_lvx is not None:
            return self._sharded(ds_lvx, **kwargs)
        own = partial(type(self._model).forward, self._model) if self._own is None else self._own
        return own(*args, **kwargs)

    def _sharded(
        self, batch: ShardedBatch, *, input_ids: Tensor, frame_numbers: Tensor, **kwargs: Any
    ) -> Any:
        given = {ROWS: kwargs.pop(ROWS), NUMBERS: frame_numbers, PIXELS: kwargs.pop(PIXELS, None)}
        with _autocast(self._model):
            x = self.embed(batch, input_ids, given)
            return self._model.llama_model(inputs_embeds=x, **kwargs, **{KEYWORD: batch})

    def embed(self, batch: ShardedBatch, ids: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Embeddings of this rank's text, with the rows of videos at their places."""
        model, made = self._model, None
        with _autocast(model):
            if given[PIXELS] is not None:
                found = self._video(batch, given[PIXELS], given[NUMBERS]).flatten(0, 1)
                made = model.llama_proj(found.index_select(0, given[ROWS]))
            places = ids == model.IMAGE_PATCH_TOKEN_ID
            return with_images(model.llama_model, ids, places, made)

    def _video(self, batch: ShardedBatch, pixels: Tensor, numbers: Tensor) -> Tensor:
        """What the video Q-Former makes of all videos, ``[V, P, width]``, the same on every rank.

        Args:
            batch: the keyword.
            pixels: of this rank's frames, or of a blank one that is dropped.
            numbers: int64 ``[n]``, of this rank's frames in their videos.
        """
        model = self._model
        _refuse_dropout(model.video_Qformer)
        frames = self._frames(pixels)[: len(numbers)]
        frames = model.video_frame_position_embedding(numbers)[:, None] + frames
        keys = frames.flatten(0, 1)[None]
        tokens = model.video_query_tokens
        videos = batch.others[VIDEO].q_lengths[0] // rows_of(tokens)
        with _attending(model, batch):
            made = model.video_Qformer.bert(
                query_embeds=tokens.expand(videos, -1, -1),
                encoder_hidden_states=keys,
                encoder_attention_mask=torch.ones(keys.shape[:2], device=keys.device),
                return_dict=True,
            )
        return share_gradient(made.last_hidden_state, batch.channel)

    def _frames(self, pixels: Tensor) -> Tensor:
        """What tower and Q-Former make of frames, each by itself, ``[frames, Q, width]``."""
        model = self._model
        patches = model.ln_vision(model.visual_encoder(pixels))
        made = model.Qformer.bert(
            query_embeds=model.query_tokens.expand(len(patches), -1, -1),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], device=patches.device),
            return_dict=True,
        )
        return cast(Tensor, made.last_hidden_state)


class KeepForward(Hook):
    """A forward pre-hook of the model that only knows which forward to put back."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self._model, self._before = model, vars(model).get(_FORWARD)
        setattr(model, _FORWARD, forward)

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None

    def undo(self) -> None:
        """Give the model its forward back."""
        vars(self._model).pop(_FORWARD, None)
        if self._before is not None:
            setattr(self._model, _FORWARD, self._before)


def install(model: Any) -> None:
    """Put all of it on a model."""
    forward = Forward(model)
    model.register_forward_pre_hook(KeepForward(model, forward))
    prompt = EncodePrompt(model, (ROWS, NUMBERS, PIXELS), forward.embed)
    model.llama_model.register_forward_pre_hook(prompt, with_kwargs=True)


@contextmanager
def _attending(model: Any, batch: ShardedBatch) -> Iterator[None]:
    """The video Q-Former's cross-attention has the batch meanwhile."""
    found = map(patched_attention, model.video_Qformer.modules())
    ours = [each for each in found if isinstance(each, VideoAttention)]
    try:
        for each in ours:
            each.batch = batch
        yield
    finally:
        for each in ours:
            each.batch = None


def _autocast(model: Any) -> AbstractContextManager[Any]:
    """The model's own ``maybe_autocast``, where it has one."""
    own = getattr(model, "maybe_autocast", None)
    return nullcontext() if own is None else cast(AbstractContextManager[Any], own())


def _refuse_dropout(video: nn.Module) -> None:
    """Refuse what would make the replicated part another one on each rank."""
    drops = [m.p for m in video.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
    if drops:
        raise NotImplementedError(
            f"got dropout {max(drops)} in video_Qformer while training, which every rank computes "
            "alike, and would drop otherwise on each; set p of its nn.Dropout modules to 0, or "
            "video_Qformer.eval()"
        )
