"""OpenFlamingo's cross-attention on this rank's shards.

The model's layers hand their attention nothing but the places of the images in the text. What it
must know of a sharded batch travels in their place, also where a checkpointed layer runs again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_lvx.models.attend import attend
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import KEYWORD, ShardedForward, trains

LOCATIONS = "media_locations"


def places(batch: ShardedBatch) -> Tensor:
    """An empty tensor that carries a sharded batch, as ``media_locations``."""
    carrier: Any = torch.empty(0, device="cpu")
    carrier.ds_lvx = batch
    return cast(Tensor, carrier)


class Attention(ShardedForward):
    """`MaskedCrossAttention`: of text over the latest image, or over all images before it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = getattr(kwargs.get(LOCATIONS), KEYWORD, None)
        return super().__call__(*args, ds_lvx=batch, **kwargs)

    def sharded(self, batch: ShardedBatch, x: Tensor, media: Tensor, **_unused: Any) -> Tensor:
        """Attention of this rank's text ``[B, s, hidden]`` over the features of all ranks.

        Args:
            batch: the keyword.
            x: the text.
            media: this rank's features, ``[B, s_kv, width]``.
        """
        module = self.module

        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (module.heads, -1))

        def project_kv(features: Tensor) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the module's own calls.
            k, v = module.to_kv(features).chunk(2, dim=-1)
            return split(k), split(v)

        q = split(module.to_q(module.norm(x)))
        if not module.only_attend_immediate_media and batch.row_mask is not None:
            # Text before the first image takes the mean of all images, whatever its scores are.
            q = q.masked_fill(~batch.row_mask[:, 0, :, :, None], 0)
        linear: nn.Module = module.to_kv
        out = attend(
            self.plan,
            batch,
            q,
            features=media,
            project_kv=project_kv,
            trains=trains(linear),
            kv_heads=module.heads,
            scale=module.scale,
        )
        return cast(Tensor, module.to_out(out.flatten(2)))
