"""Gated DeltaNet on a rank's part of a text: heads travel, and the model's own functions run.

Legend: ``B`` rows, ``s`` tokens of a rank, ``S`` of all, ``K`` heads of keys, ``V`` of values, of
which each head of keys has ``V / K``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_lvx.attention.recurrent import Take, run_by_heads
from ds_lvx.attention.shape import recurrent_groups
from ds_lvx.kernels.transfer import to_device
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import ShardedForward


@dataclass(frozen=True)
class Groups:
    """Heads that run together, one or more groups on a rank; see `recurrent_groups`.

    Attributes:
        copies: groups that a head of keys stands in.
        values: heads of values of a group.
    """

    copies: int
    values: int

    @classmethod
    def of(cls, key_heads: int, value_heads: int, ranks: int) -> Self:
        """Those for so many ranks."""
        return cls(*recurrent_groups(key_heads, value_heads, ranks))

    def of_mixed(self, mixed: Tensor, module: Any, *more: Tensor) -> Tensor:
        """``[..., C]``, channels of queries, keys and values, and ``[..., V]`` each of more, to
        ``[..., G, W]``, by groups."""
        sizes = [module.key_dim, module.key_dim, module.value_dim]
        q, k, v = mixed.split(sizes, dim=-1)
        q, k = (x.unflatten(-1, (-1, module.head_k_dim)) for x in (q, k))
        if self.copies > 1:
            q, k = (x.repeat_interleave(self.copies, dim=-2) for x in (q, k))
        of_values = [self.of_values(v, module.head_v_dim), *(self.of_values(x, 1) for x in more)]
        return torch.cat((q, k, *of_values), dim=-1)

    def to_mixed(self, grouped: Tensor, module: Any) -> Tensor:
        """`of_mixed` undone."""
        keys, size = module.head_k_dim, self.values * module.head_v_dim
        q, k, v = grouped.split([keys, keys, size], dim=-1)
        q, k = (x[..., :: self.copies, :] for x in (q, k))
        return torch.cat([x.flatten(-2) for x in (q, k, v)], dim=-1)

    def of_values(self, x: Tensor, size: int) -> Tensor:
        """``[..., V * size]`` -> ``[..., G, values * size]``."""
        return x.unflatten(-1, (-1, self.values * size))


@dataclass(frozen=True, eq=False)
class State:
    """What a layer leaves behind a text, whole on every rank, as transformers' cache has it.

    Attributes:
        mixed: ``[R, C, kernel]``, the last tokens' channels before the convolution; zeros stand
            for those that a shorter text does not have.
        memory: float32 ``[R, V, head_k_dim, head_v_dim]``.
    """

    mixed: Tensor
    memory: Tensor

    @classmethod
    def of(cls, cache: Any, layer: int) -> Self | None:
        """That of a layer in the cache; None before its first text."""
        held = cache.layers[layer]
        mixed, memory = held.conv_states[0], held.recurrent_states[0]
        return None if mixed is None or memory is None else cls(mixed, memory)

    def keep(self, cache: Any, layer: int) -> None:
        """Leave it in the cache."""
        kernel = self.mixed.shape[2]
        cache.update_conv_state(self.mixed, layer, conv_kernel_size=kernel)
        cache.update_recurrent_state(self.memory, layer)


class DeltaForward(ShardedForward):
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
            cache_params: transformers' own, which gets the state behind the text of all ranks; None
                outside of generation.
            attention_mask: ``[B, s]``, 0 at padding that is held; None without.
            kwargs: of the text model, which no function of the layer asks for.

        Returns:
            ``[B, s, hidden]``.

        Collectives: those of `run_by_heads`; in generation an all-gather of the state.
        """
        module = self.module
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
        groups = Groups.of(module.num_k_heads, module.num_v_heads, batch.channel.size)
        projections = module.in_proj_qkv, module.in_proj_b, module.in_proj_a
        mixed, b, a = (project(hidden_states) for project in projections)
        gate = module.in_proj_z(hidden_states)
        layer = _Layer(self.plan, module, groups, batch, cache_params)
        parts = groups.of_mixed(mixed, module, b, a)
        found = run_by_heads(batch.text, parts, layer.run, order=batch.order)
        heads = (x.reshape(-1, module.head_v_dim) for x in (found, gate))
        out: Tensor = module.out_proj(module.norm(*heads).view_as(gate))
        return out


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a rank runs of a layer: its groups over all tokens."""

    plan: LayerPlan
    module: Any
    groups: Groups
    batch: ShardedBatch
    cache: Any

    def run(self, x: Tensor, take: Take) -> Tensor:
        """``[B, S, g, W]`` -> ``[B, S, g, values * head_v_dim]``."""
        module, each, tokens = self.module, self.groups.values, x.shape[1]
        mixed, b, a = (
            part.flatten(2) for part in x.split([x.shape[3] - 2 * each, each, each], dim=3)
        )
        a_log, dt_bias = (
            take(self.groups.of_values(p, 1)).flatten() for p in (module.A_log, module.dt_bias)
        )
        beta, g = b.sigmoid(), -a_log.float().exp() * F.softplus(a.float() + dt_bias)
        weight = self.groups.of_mixed(module.conv1d.weight.squeeze(1).T, module)
        weight = take(weight.movedim(1, 0)).transpose(1, 2).flatten(0, 1)
        if self.cache is not None:
            before, memory = self._before(mixed, take)
            mixed = torch.cat((before, mixed), dim=1)
            lengths = self._lengths(len(x), x.device)
            padding = torch.arange(tokens, device=x.device) >= lengths[:, None]
            beta, g = (t.masked_fill(padding[:, :, None], 0) for t in (beta, g))
            found, memory = self._walk(weight, mixed, beta, g, memory=memory, goes_on=True)
            self._leave(mixed, memory, lengths)
        elif self.batch.branches is not None:
            found = self._branch(weight, mixed, beta, g, self.batch.branches)
        else:
            found, _ = self._walk(weight, mixed, beta, g)
        heads: Tensor = found.reshape(*x.shape[:3], -1)
        return heads

    def _walk(
        self,
        weight: Tensor,
        mixed: Tensor,
        beta: Tensor,
        g: Tensor,
        *,
        memory: Tensor | None = None,
        goes_on: bool = False,
    ) -> tuple[Tensor, Any]:
        """The model's own functions over rows of tokens.

        Args:
            weight: of the convolution, ``[g * channels, kernel]``.
            mixed: ``[B, before + S, g * channels]``, of the tokens before, too.
            beta, g: ``[B, S, g * values]``.
            memory: of the tokens before; None: there are none.
            goes_on: whether the memory behind them is wanted.

        Returns:
            ``[B, S, g * values, head_v_dim]`` and the memory, or None.
        """
        module, tokens = self.module, beta.shape[1]
        code, size = vars(sys.modules[type(module).__module__]), module.head_k_dim
        # causal-conv1d takes tokens that begin at multiples of 8 numbers only: no part of a row.
        convolved = code["causal_conv1d_fn"](
            mixed.contiguous().transpose(1, 2), weight, None, activation=module.activation
        )
        groups = beta.shape[2] // self.groups.values
        by_group = convolved.transpose(1, 2)[:, -tokens:].unflatten(2, (groups, -1))
        q, k, v = by_group.split([size, size, self.groups.values * module.head_v_dim], dim=3)
        found, memory = code["torch_chunk_gated_delta_rule"](
            *(part.repeat_interleave(self.groups.values, dim=2) for part in (q, k)),
            v.reshape(*v.shape[:2], -1, module.head_v_dim),
            g=g,
            beta=beta,
            initial_state=memory,
            output_final_state=goes_on,
            use_qk_l2norm_in_kernel=True,
        )
        return found, memory

    def _branch(
        self,
        weight: Tensor,
        mixed: Tensor,
        beta: Tensor,
        g: Tensor,
        branches: Sequence[Sequence[int]],
    ) -> Tensor:
        """`_walk` over rows whose branches all begin with the state behind what they share.

        Args:
            weight, mixed, beta, g: as of `_walk`, of no token before.
            branches: as of `ds_lvx.models.batch.ShardedBatch`.
        """
        kernel, rows = self.module.conv_kernel_size, []
        for row, (shared, *lengths) in enumerate(branches):
            shared = max(shared, 1)  # of padding alone, where nobody reads what comes out
            parts = [x[row : row + 1, : shared + sum(lengths)] for x in (mixed, beta, g)]
            found, memory = self._walk(weight, *(x[:, :shared] for x in parts), goes_on=True)
            pieces = [found[0]]
            if any(lengths):
                own = [pad_sequence([*x[0, shared:].split(lengths)], True) for x in parts]
                last = F.pad(parts[0][:, :shared], (0, 0, kernel, 0))[:, -kernel:]
                own[0] = torch.cat((last.expand(len(lengths), -1, -1), own[0]), dim=1)
                memory = memory.repeat_interleave(len(lengths), dim=0)
                behind, _ = self._walk(weight, *own, memory=memory)
                pieces += [one[:length] for one, length in zip(behind, lengths, strict=True)]
            rows.append(torch.cat(pieces))
        return F.pad(
            pad_sequence(rows, True), (0, 0, 0, 0, 0, mixed.shape[1] - max(map(len, rows)))
        )

    def _before(self, mixed: Tensor, take: Take) -> tuple[Tensor, Tensor | None]:
        """This rank's part of the state before the text: ``[B, kernel, g * channels]``, zeros where
        it begins, and ``[B, g * values, head_k_dim, head_v_dim]``."""
        module = self.module
        state = State.of(self.cache, module.layer_idx)
        if state is None:
            return mixed.new_zeros(len(mixed), module.conv_kernel_size, mixed.shape[2]), None
        before = self.groups.of_mixed(state.mixed.transpose(1, 2), module)
        memory = state.memory.unflatten(1, (-1, self.groups.values))
        return (
            take(before.movedim(2, 0)).movedim(0, 2).flatten(2),
            take(memory.movedim(1, 0)).movedim(0, 1).flatten(1, 2),
        )

    def _lengths(self, rows: int, device: torch.device) -> Tensor:
        """int64 ``[B]``: tokens of each row over all ranks; the others pad it."""
        order, each = self.batch.order, self.batch.text_lengths
        if order is None:
            lengths = torch.full((rows,), sum(each), device="cpu")
        else:
            lengths = (order >= 0).sum(dim=1)
        return to_device(lengths, device)

    def _leave(self, mixed: Tensor, memory: Tensor, lengths: Tensor) -> None:
        """Put the state behind the text, that of all groups, into the cache.

        Args:
            mixed: ``[B, kernel + S, g * channels]``.
            memory: of this rank's groups.
            lengths: of `_lengths`.
        """
        module, channel = self.module, self.batch.channel
        last = lengths[:, None] + torch.arange(module.conv_kernel_size, device=mixed.device)
        tail = mixed.gather(1, last[:, :, None].expand(-1, -1, mixed.shape[2]))
        of_memory = memory.unflatten(1, (-1, self.groups.values)).movedim(1, 0)
        of_tail = tail.unflatten(2, (len(of_memory), -1)).movedim(2, 0)
        each = (len(of_memory),) * channel.size
        parts = [of_tail.contiguous(), of_memory.contiguous()]
        tails, memories = channel.gather_rows(parts, [0, 0], each).wait()
        count = module.num_v_heads // self.groups.values
        mixed = self.groups.to_mixed(tails[:count].movedim(0, 2), module).transpose(1, 2)
        memory = memories[:count].movedim(0, 1).flatten(1, 2)
        decoding = self.batch.decoding
        assert decoding is not None, "only generation has a cache"
        decoding.hold_state(self.plan, (mixed, memory))
        rows = (x.repeat_interleave(decoding.copies, dim=0) for x in (mixed, memory))
        State(*rows).keep(self.cache, module.layer_idx)
