"""Gated DeltaNet on a rank's part of a text: heads travel, and the model's own functions run.

Legend: ``B`` rows, ``s`` tokens of a rank, ``S`` of all, ``K`` heads of keys, ``V`` of values, of
which each head of keys has ``V / K``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.attention.recurrent import Take, run_by_heads
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.patch import FusedForward


@dataclass(frozen=True)
class Groups:
    """Heads that run together, one or more groups on a rank.

    A group is a head of keys with its heads of values. Where a rank would have more of the latter
    than it must, it is one of these, and a head of keys stands in the groups of each of its own.

    Attributes:
        copies: groups that a head of keys stands in.
        values: heads of values of a group.
    """

    copies: int
    values: int

    @classmethod
    def of(cls, key_heads: int, value_heads: int, ranks: int) -> Self:
        """Those for so many ranks."""
        ratio = value_heads // key_heads
        if -(-key_heads // ranks) * ratio <= -(-value_heads // ranks):
            return cls(1, ratio)
        return cls(ratio, 1)

    def of_mixed(self, mixed: Tensor, module: Any) -> Tensor:
        """``[..., C]``, channels of queries, keys and values -> ``[..., G, W]``, those of a group side
        by side."""
        sizes = [module.key_dim, module.key_dim, module.value_dim]
        q, k, v = mixed.split(sizes, dim=-1)
        q, k = (x.unflatten(-1, (-1, module.head_k_dim)) for x in (q, k))
        if self.copies > 1:
            q, k = (x.repeat_interleave(self.copies, dim=-2) for x in (q, k))
        return torch.cat((q, k, self.of_values(v, module.head_v_dim)), dim=-1)

    def of_values(self, x: Tensor, size: int) -> Tensor:
        """``[..., V * size]`` -> ``[..., G, values * size]``."""
        return x.unflatten(-1, (-1, self.values * size))


class DeltaForward(FusedForward):
    """Takes the place of the forward of a ``GatedDeltaNet`` as Qwen3.5 has it."""

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer for this rank's text.

        Args:
            batch: the keyword.
            hidden_states: ``[B, s, hidden]``.
            cache_params: none outside of generation.
            attention_mask: ``[B, s]``, 0 at padding that is held; None without.
            kwargs: of the text model, which no function of the layer asks for.

        Returns:
            ``[B, s, hidden]``.
        """
        module = self.module
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
        groups = Groups.of(module.num_k_heads, module.num_v_heads, batch.channel.size)
        mixed = groups.of_mixed(module.in_proj_qkv(hidden_states), module)
        b, a = (
            groups.of_values(project(hidden_states), 1)
            for project in (module.in_proj_b, module.in_proj_a)
        )
        gate = module.in_proj_z(hidden_states)
        found = run_by_heads(
            batch.text,
            torch.cat((mixed, b, a), dim=-1),
            lambda x, take: _run(module, groups, x, take),
        )
        heads = (x.reshape(-1, module.head_v_dim) for x in (found, gate))
        out: Tensor = module.out_proj(module.norm(*heads).view_as(gate))
        return out


def _run(module: Any, groups: Groups, x: Tensor, take: Take) -> Tensor:
    """All tokens ``[B, S, g, W]`` of a rank's groups -> ``[B, S, g, values * head_v_dim]``."""
    code = vars(sys.modules[type(module).__module__])
    keys, values, each = module.head_k_dim, module.head_v_dim, groups.values
    mixed, b, a = x.split([x.shape[3] - 2 * each, each, each], dim=3)
    weight = groups.of_mixed(module.conv1d.weight.squeeze(1).T, module)
    weight = take(weight.movedim(1, 0)).transpose(1, 2).flatten(0, 1)
    mixed = code["causal_conv1d_fn"](
        mixed.flatten(2).transpose(1, 2), weight, None, activation=module.activation
    )
    mixed = mixed.transpose(1, 2).unflatten(2, (x.shape[2], -1))
    q, k, v = mixed.split([keys, keys, each * values], dim=3)
    a_log, dt_bias = (take(groups.of_values(p, 1)).flatten() for p in (module.A_log, module.dt_bias))
    found, _ = code["torch_chunk_gated_delta_rule"](
        *(part.repeat_interleave(each, dim=2) for part in (q, k)),
        v.reshape(*v.shape[:2], -1, values),
        g=-a_log.float().exp() * F.softplus(a.flatten(2).float() + dt_bias),
        beta=b.flatten(2).sigmoid(),
        use_qk_l2norm_in_kernel=True,
    )
    heads: Tensor = found
    return heads.reshape(*x.shape[:3], -1)
