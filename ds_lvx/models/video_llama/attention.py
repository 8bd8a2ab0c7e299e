"""The video Q-Former's cross-attention, and the gradients of what every rank computes alike.

Every rank has the queries of all videos and the frames that it encoded. All that follows from the
queries is the same on all ranks, and each rank's backward finds the gradient of its own text alone,
while the ranks' gradients of a parameter are summed. So the gradient is summed over the ranks where
the replicated part ends, and divided by their number: summed, its parameters get theirs once. Keys
and values are of one rank's frames alone. Their gradients are multiplied again where they begin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.merge import accumulation_dtype
from ds_lvx.models.attend import attend
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import ShardedForward, scale_gradient, trains
from ds_lvx.models.video_llama.batch import VIDEO


class VideoAttention(ShardedForward):
    """`BertSelfAttention` of the queries of all videos over the frames of all ranks.

    The model's code hands it no keyword.

    Attributes:
        batch: of the forward that is running, or None.
    """

    def __init__(self, module: torch.nn.Module, plan: LayerPlan) -> None:
        super().__init__(module, plan)
        self.batch: ShardedBatch | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, ds_lvx=self.batch, **kwargs)

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *_unused: Any,
        **_others: Any,
    ) -> tuple[Tensor, None]:
        """Attention of ``[V, P, hidden]`` over ``[1, frames * Q, width]`` of this rank.

        Returns:
            ``[V, P, hidden]``, and None for the keys that the model's own returns.
        """
        module, ranks = self.module, batch.channel.size
        assert encoder_hidden_states is not None, "the video Q-Former runs with frames"

        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (module.num_attention_heads, -1))

        def project_kv(frames: Tensor) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the module's own calls.
            made = split(module.key(frames)), split(module.value(frames))
            return scale_gradient(made[0], ranks), scale_gradient(made[1], ranks)

        q = split(module.query(hidden_states))
        out = attend(
            self.plan,
            replace(batch, cross=batch.others[VIDEO]),
            q.flatten(0, 1)[None],
            features=encoder_hidden_states,
            project_kv=project_kv,
            trains=trains(module.key, module.value),
            kv_heads=q.shape[2],
            scale=q.shape[3] ** -0.5,
        )
        return out.reshape(*q.shape[:2], -1), None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel) -> Tensor:
        ctx.channel = channel
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = ctx.channel.all_reduce(gradient.to(accumulation_dtype(gradient.dtype)))
        return (total / ctx.channel.size).to(gradient.dtype), None


def share_gradient(x: Tensor, channel: Channel) -> Tensor:
    """``x``, which every rank has alike; in backward the mean of the gradients of all ranks.

    Args:
        x: any shape; it wants a gradient on every rank or on none.
        channel: the ranks.

    Collectives: in backward an all-reduce of x's size in fp32.
    """
    return cast(Tensor, _ShareGradient.apply(x, channel))
