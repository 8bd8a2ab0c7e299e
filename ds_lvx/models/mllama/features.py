"""Where mllama's visual features lie while the text model runs.

transformers' forward holds on to the vision tower's output (7,680 numbers a token) to its end,
and to the projected features (4,096) that the cross-attention layers share. With a sharded batch
the first is let go as soon as it is projected, and the second may wait on the host.

The vision tower runs in all groups of ranks that train together, or in none: ZeRO-3 gathers its
weights from all of them, and ZeRO-1 and -2 reduce what gradients there are, in buckets that must be
alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

from ds_lvx.attention.checkpointing import is_partitioned
from ds_lvx.attention.features import offload
from ds_lvx.distributed.channel import Channel
from ds_lvx.models.batch import ShardedBatch, move
from ds_lvx.models.mllama.batch import FRAME_KEYS, STATES, blank
from ds_lvx.models.patch import KEYWORD, Hook


class _Pass:
    """What the hooks below know of the forward that is running."""

    def __init__(self) -> None:
        self.sharded = False
        self.encoded: Any = None


class _Begin(Hook):
    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(
        self, module: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        self._state.sharded = batch is not None
        self._state.encoded = None
        if batch is None or batch.world is None:
            return None
        if not is_partitioned(module) and not _reduces(module):
            return None  # nothing of other groups is waited for
        return args, {**kwargs, **_as_elsewhere(batch, batch.world, kwargs, module=module)}


class _Encoded(Hook):
    def __init__(self, state: _Pass) -> None:
        self._state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._state.sharded:
            self._state.encoded = output


class _Projected(Hook):
    def __init__(self, state: _Pass, *, offloads: bool) -> None:
        self._state = state
        self._offloads = offloads

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._state.sharded:
            return None
        encoded, self._state.encoded = self._state.encoded, None
        if encoded is not None:
            encoded["last_hidden_state"] = None
        return offload(output) if self._offloads else None


def _reduces(module: Any) -> bool:
    """Whether ZeRO-1 or -2 will reduce gradients of the vision tower or the projector."""
    parts = module.vision_model, module.multi_modal_projector
    trained = (p for part in parts for p in part.parameters() if p.requires_grad)
    return torch.is_grad_enabled() and any(hasattr(p, "_hp_mapping") for p in trained)


def _as_elsewhere(
    batch: ShardedBatch, world: Channel, kwargs: Mapping[str, Any], *, module: Any
) -> dict[str, Any]:
    """What to change so that the tower runs in all groups or in none.

    A batch of text alone follows the others: it has a blank image beside images, and features of no
    length beside features.

    Args:
        batch, world: the keyword; all ranks.
        kwargs: of the model.
        module: the model, without its head.

    Raises:
        ValueError: on all ranks: some groups have images and some have features.

    Collectives: one agreement of all ranks on the control plane.
    """
    mine = STATES if kwargs.get(STATES) is not None else FRAME_KEYS[0]
    records = world.agree({"given": mine, "seen": any(batch.kv_lengths or ())})
    seen = {record["given"] for record in records if record["seen"]}
    if len(seen) > 1:
        ranks = [r for r, each in enumerate(records) if each["seen"] and each["given"] == STATES]
        raise ValueError(
            f"got {STATES} on ranks {', '.join(map(str, ranks))} and {FRAME_KEYS[0]} on others; "
            "expected the same kind in the batches of all replicas: the vision tower must run on "
            "all ranks or on none, whose weights and gradients they share"
        )
    # Where nobody sees anything and some have a blank image, all have one.
    wanted = max(seen or {record["given"] for record in records})
    if wanted == mine:
        return {}
    changed: dict[str, Tensor | None] = dict.fromkeys((*FRAME_KEYS, STATES))
    if wanted == STATES:
        shape = kwargs["input_ids"].shape[0], 0, module.config.get_text_config().hidden_size
        changed[STATES] = torch.zeros(shape, dtype=module.dtype, device=batch.text.device)
    else:
        changed |= {key: move(each, batch.text.device) for key, each in blank(module).items()}
    return changed


def install(model: MllamaForConditionalGeneration, *, offloads: bool) -> None:
    """Put the hooks on a model.

    Args:
        model: the model.
        offloads: a layer wants its features on the host, and so all of them share those.
    """
    state = _Pass()
    model.model.register_forward_pre_hook(_Begin(state), with_kwargs=True)
    model.model.vision_model.register_forward_hook(_Encoded(state))
    model.model.multi_modal_projector.register_forward_hook(
        _Projected(state, offloads=offloads),
    )
