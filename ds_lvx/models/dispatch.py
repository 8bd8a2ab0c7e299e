"""Text attention that calls transformers' attention interface: no forward of ours is needed.

transformers looks the function up under ``module.config._attn_implementation``. A patched module
gets a copy of its config with a name of ours; the model's own config keeps its name, so that masks,
checkpoints and the modules beside stay as they were.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ds_lvx.models.attend import attend_to
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import ATTRIBUTE, PatchedAttention, refuse_dropout

IMPLEMENTATION = "ds_lvx"
_REFUSED = ("softcap", "s_aux", "position_bias")


class Dispatched(PatchedAttention):
    """Sends an attention module's call of the interface to `attend_to`.

    Args:
        module: with ``config``; its layer hands keywords that it does not know on to the interface.
        plan: how the layer runs.

    Raises:
        NotImplementedError: the plan is to project K and V again; the interface gets them made.
    """

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        super().__init__(module, plan)
        if plan.recompute_kv:
            raise NotImplementedError(
                f"ds_lvx.layers: got recompute_kv for {plan.name}, whose K and V transformers "
                "projects; expected it for cross-attention only: remove it from this rule"
            )
        self.config = self.module.config

    def install(self) -> None:
        """Give the module a config that names our implementation."""
        if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(IMPLEMENTATION, _attention)
        config = copy.copy(self.config)
        # Not by the property, which would set the sub-configs as well: those are not copied.
        config._attn_implementation_internal = IMPLEMENTATION
        self.module.config = config
        setattr(self.module, ATTRIBUTE, self)

    def remove(self) -> None:
        """Give the module its config back."""
        self.module.config = self.config
        delattr(self.module, ATTRIBUTE)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The implementation that the module would have called."""
        eager: Any = vars(sys.modules[type(self.module).__module__]).get("eager_attention_forward")
        name = self.config._attn_implementation
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(self.module, *args, **kwargs)

    def sharded(
        self,
        batch: ShardedBatch,
        tensors: tuple[Tensor, Tensor, Tensor],
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of this rank's text.

        Args:
            batch: the keyword.
            tensors: q ``[B, H, s, D]``, k and v ``[B, H_kv, s, D]``; behind a prompt those of all
                tokens behind it.
            scaling: factor of the scores; None is ``D ** -0.5``.
            dropout: must be 0.
            sliding_window: a token sees so many, as the batch has it; None: all before it.

        Returns:
            ``[B, s, H, D]``.
        """
        refuse_dropout(dropout)
        seen = batch if sliding_window is None else batch.recent
        refused = [f"{key}={kwargs[key]!r}" for key in _REFUSED if kwargs.get(key) is not None]
        if seen is None:
            refused.append(f"sliding_window={sliding_window!r}")
        if seen is None or refused:
            raise NotImplementedError(
                f"got {refused[0]} for {self.plan.name}; the sharded attention sees the whole text "
                "before a token, or a window that its family knows of, with plain scores: this "
                "model needs sequence_parallel_size 1"
            )
        dtype = tensors[2].dtype
        # Under autocast rotary embeddings widen q and k; SDPA would have narrowed them again.
        q, k, v = (x.to(dtype).transpose(1, 2) for x in tensors)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_to(self.plan, seen, q, (k, v), scale=scale)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls."""
    ours: Dispatched = getattr(module, ATTRIBUTE)
    batch = ours.shared(kwargs)
    if batch is None:
        return ours.own(query, key, value, attention_mask, **kwargs)
    return ours.sharded(batch, (query, key, value), **kwargs), None
