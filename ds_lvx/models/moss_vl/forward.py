"""What the model's own forward would do otherwise with a sharded batch.

It makes positions of the text at hand, pads features to a multiple of some tokens, walks over media
one by one, and counts the labelled tokens of this rank alone. With a sharded batch positions come
with it, features go to their places in one copy, and the loss counts the labels of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.attention.features import offload
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.moss_vl.attention import ROTARY
from ds_lvx.models.moss_vl.batch import PIECES, PLACES
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.text import ITEMS_KEY

STATES = "cross_attention_states"
_PACK = "convert_packed_to_batch"
_LOSS = "_loss_function"
_FORWARD = "forward"
_POSITIONS = "vision_position_ids"
_SHIFTED = "shift_labels"


class Running:
    """What the parts below know of the forward that is running.

    Attributes:
        batch: the keyword, or None: the model's own forward.
        places, pieces: see `PLACES` and `PIECES` of `ds_lvx.models.moss_vl.batch`.
        loss: keywords of the loss.
        features: the visual features, where they are kept from the model's own variables.
    """

    def __init__(self) -> None:
        self.begin(None, {})

    def begin(self, batch: ShardedBatch | None, given: Mapping[str, Any]) -> None:
        """Forget the forward before.

        Args:
            batch: the keyword.
            given: what else was taken out of the model's arguments.
        """
        self.batch = batch
        self.places: Tensor | None = given.get(PLACES)
        self.pieces: Sequence[tuple[int, int]] = given.get(PIECES, ())
        self.loss = {key: given[key] for key in (_SHIFTED, ITEMS_KEY) if key in given}
        self.features: Tensor | None = None


class Begin(Hook):
    """A forward pre-hook of the model: takes out of a sharded batch what its forward knows not."""

    def __init__(self, running: Running, model: nn.Module) -> None:
        self._running, self._model = running, model
        self._before = {key: vars(owner).get(key) for owner, key in self._owners()}

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch = kwargs.get(KEYWORD)
        self._running.begin(batch, {} if batch is None else kwargs)
        if batch is None:
            return None
        ours = (PLACES, PIECES, _SHIFTED, ITEMS_KEY)
        return args, {key: value for key, value in kwargs.items() if key not in ours}

    def undo(self) -> None:
        """Give the model its tower's forward, its packing and its loss back."""
        for owner, key in self._owners():
            vars(owner).pop(key, None)
            if self._before[key] is not None:
                setattr(owner, key, self._before[key])

    def _owners(self) -> tuple[tuple[Any, str], ...]:
        inside: Any = self._model.model
        return (inside.visual, _FORWARD), (inside, _PACK), (self._model, _LOSS)


class Tower:
    """In place of the tower's forward: a frozen one may run over some of the frames at a time.

    It runs as often on every rank, over a blank frame where there are none: under ZeRO-3 each run
    gathers its weights.
    """

    def __init__(self, running: Running, tower: Any) -> None:
        self._running, self._tower, self._own = running, tower, tower.forward

    def __call__(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """The tower's output, whole."""
        pieces = self._running.pieces
        if len(pieces) < 2:
            return self._own(hidden_states, grid_thw=grid_thw, **kwargs)
        outputs = []
        rows, patches = zip(*pieces, strict=True)
        parts = zip(grid_thw.split(rows), hidden_states.split(patches), strict=True)
        with torch.no_grad():
            for grid, pixels in parts:
                blank = len(grid) == 0
                if blank:
                    merge = self._tower.spatial_merge_size
                    pixels = hidden_states.new_zeros(merge**2, hidden_states.shape[1])
                    grid = grid_thw.new_tensor([[1, merge, merge]])
                output = self._own(pixels, grid_thw=grid, **kwargs)
                outputs.append(output[:0] if blank else output)
        return torch.cat(outputs)


class Pack:
    """In place of the model's ``convert_packed_to_batch``: features ``[B, S, hidden]``.

    Args:
        running: the forward.
        inside: the module with ``separator_token``; ZeRO-3 holds that whole while it runs.
        offloads: the features are to wait on the host.
    """

    def __init__(self, running: Running, inside: Any, *, offloads: bool) -> None:
        self._running, self._inside, self._offloads = running, inside, offloads
        self._own = getattr(inside, _PACK)

    def __call__(self, hidden_states: Tensor, grid_thw: Tensor, media_nums_per_sample: Any) -> Any:
        running = self._running
        if running.batch is None or running.places is None:
            return self._own(hidden_states, grid_thw, media_nums_per_sample)
        samples = len(media_nums_per_sample)
        features = self._packed(hidden_states, running.places, samples, running.batch)
        if not self._offloads:
            return features, []
        # The model's forward would hold on to them on the device: it gets a stand-in.
        running.features = offload(features)
        return features.new_zeros(1).expand(features.shape), []

    def _packed(self, x: Tensor, places: Tensor, samples: int, batch: ShardedBatch) -> Tensor:
        separator = self._inside.separator_token.to(x.dtype)
        tokens, hidden = x.shape
        if batch.cross is None or len(places) == 0:
            # A blank frame: its tokens are dropped, and their gradients are 0 and not none.
            return torch.cat((x, separator[None]))[None]
        length = batch.cross.kv_lengths[batch.channel.rank]
        separators = separator.expand(len(places) - tokens, hidden)
        features = x.new_zeros(samples * length, hidden)
        features.index_copy_(0, places[:tokens], x)
        features.index_copy_(0, places[tokens:], separators)
        return features.view(samples, length, hidden)


class Rotate(Hook):
    """A forward pre-hook of the text model: features from where they wait, and their rotary."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        states = kwargs.get(STATES)
        if kwargs.get(KEYWORD) is None or states is None:
            return None
        waiting, self._running.features = self._running.features, None
        # By the text's device and dtype: the features may be on the host.
        rotary = module.rotary_emb(kwargs["inputs_embeds"], kwargs[_POSITIONS])
        given = {STATES: states if waiting is None else waiting, _POSITIONS: None, ROTARY: rotary}
        return args, {**kwargs, **given}


class Loss:
    """In place of the model's loss function: this rank's share of the whole batch's loss."""

    def __init__(self, running: Running, model: Any) -> None:
        self._running, self._own = running, model.loss_function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's loss, with the labels that were shifted before they were cut."""
        return self._own(*args, **{**kwargs, **self._running.loss})


def install(model: Any, *, offloads: bool) -> None:
    """Put all of it on a model.

    Args:
        model: the whole model.
        offloads: the features are to wait on the host.
    """
    running = Running()
    begin = Begin(running, model)
    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.model.visual.forward = Tower(running, model.model.visual)
    setattr(model.model, _PACK, Pack(running, model.model, offloads=offloads))
    setattr(model, _LOSS, Loss(running, model))
    text = model.model.language_model
    # Before the hook that checks the features and shares them.
    text.register_forward_pre_hook(Rotate(running), with_kwargs=True, prepend=True)
