"""The keyword that travels with a sharded batch to the layers that attend.

Shapes: ``B`` samples, ``T`` text tokens of the whole sequence, ``s`` of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_lvx.attention.features import FeatureGradient
from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.transfer import to_device
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.cuts import span
from ds_lvx.models.decoding_keys import DecodingKeys

RECENT = "recent"
"""In `ShardedBatch.others`: the text over itself, of which a token sees those in a window."""


@dataclass(frozen=True, eq=False)
class ShardedBatch:
    """What the attention layers must know of a sharded batch; travels as the keyword ``ds_lvx``.

    Attributes:
        text: the layout of the text over itself.
        cross: the layout of the text over the visual tokens, or None when no layer is to look at
            images.
        row_mask: bool ``[B, 1, s, 1]``, False where a text token may see no image at all; None
            when every token sees some.
        features_gradient: where layers that project K and V again add up the gradient of the
            visual features; the running forward fills it in.
        world: all ranks, where other groups train on other batches; `shard_batch` fills it in.
        others: of a model with further sequences, or with layers that see a part of one: layouts
            by names of the family's own.
        order: int64 ``[B, T]`` on the CPU, where the parts of all ranks, one after the other, have
            each token of the whole text, -1 where nobody holds it; None: they are in its order.
        unmerged: int64 ``[b, t]`` on the CPU: where rows that begin alike are one, of each token of
            the rows as they came its place in ``[B * T]``, -1 of padding that is in none; None:
            these are the rows.
        branches: of rows that begin alike and are one, how many tokens its rows share, and how many
            each has behind these; padding that nobody holds is not counted. None: none are one.
        among: tokens of the text that are images', of all rows, by rank; None where images stand
            beside it.
        deep: what forward keeps for the text's layers
            (`ds_lvx.models.concatenated.forward.Deep`).
        decoding: what the generation keeps whose forward it is: every rank has the whole text then,
            and rows of ``row_mask`` are those of the model.
        split: a generation's prompt is split over the ranks, as in training.
        behind: its text stands behind a prompt whose keys are sharded
            (`ds_lvx.models.generating.text_keys`).
        past: tokens before a text that is split and goes on from a cache; 0 of one that begins.
        units: images or frames that this rank holds, none of which is split; None: not told.
        whole_text: every rank runs all of the text, in training too.
        is_recent: it is of layers that see a window (`recent`).
    """

    text: Layout
    cross: Layout | None
    row_mask: Tensor | None
    features_gradient: FeatureGradient | None = None
    world: Channel | None = None
    others: Mapping[str, Layout] = field(default_factory=dict)
    order: Tensor | None = None
    unmerged: Tensor | None = None
    branches: Sequence[Sequence[int]] | None = None
    among: tuple[int, ...] | None = None
    deep: Any = None
    decoding: DecodingKeys | None = None
    split: bool = False
    behind: bool = False
    past: int = 0
    units: int | None = None
    whole_text: bool = False
    is_recent: bool = False

    @classmethod
    def of(
        cls,
        *,
        channel: Channel,
        text_lengths: tuple[int, ...],
        kv_lengths: tuple[int, ...] | None,
        text_rule: Visibility | None,
        cross_rule: Visibility | None,
        row_mask: Tensor | None,
        device: torch.device,
        others: Mapping[str, Layout] | None = None,
        order: Tensor | None = None,
    ) -> ShardedBatch:
        """The keyword of this rank, from what holds for the whole batch and every rank knows.

        Args:
            channel: the sequence-parallel group that shares the batch.
            text_lengths: text tokens by rank.
            kv_lengths: visual tokens by rank, or None when no layer is to look at images.
            text_rule: of the whole text, on the CPU: T queries, T keys; None where all see all.
            cross_rule: of the whole text and the visual tokens of all ranks in the order of ranks,
                on the CPU; None where all see all.
            row_mask: bool ``[B, T]``, False where a text token may see no image at all; None when
                every token sees some.
            device: where the model computes.
            others, order: see the class.
        """
        here = span(text_lengths, channel.rank)
        text = Layout.of_batch(channel, text_lengths, text_lengths, text_rule, device=device)
        cross = None
        if kv_lengths is not None:
            cross = Layout.of_batch(channel, text_lengths, kv_lengths, cross_rule, device=device)
        mask = None if row_mask is None else move(row_mask[:, None, here, None], device)
        return cls(text, cross, mask, others={} if others is None else others, order=order)

    @property
    def channel(self) -> Channel:
        """The sequence-parallel group that shares the batch."""
        return self.text.channel

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Text tokens by rank."""
        return self.text.q_lengths

    @property
    def places(self) -> Tensor:
        """int64 ``[s]`` on the CPU: this rank's tokens of a text whose rows are cut alike."""
        here = span(self.text_lengths, self.channel.rank)
        if self.order is None:
            return torch.arange(self.past + here.start, self.past + here.stop, device="cpu")
        return self.order[0].argsort()[here]

    @property
    def kv_lengths(self) -> tuple[int, ...] | None:
        """Visual tokens by rank, or None when no layer is to look at images."""
        return None if self.cross is None else self.cross.kv_lengths

    def in_order(self, parts: Tensor) -> Tensor:
        """What there is of each token, ``[B, T, ...]``, from the parts of all ranks.

        Args:
            parts: ``[B, n, ...]``, one after the other.

        Returns:
            In the order of the whole text, in rows as they came; zeros for padding that nobody
            holds.
        """
        order = self.order
        if order is None and self.unmerged is None:
            return parts
        if order is None:
            order = torch.arange(parts.shape[1], device="cpu").expand(parts.shape[:2])
        # In all parts of all rows, one after the other.
        rows = torch.arange(len(order), device="cpu")[:, None] * parts.shape[1]
        order = torch.where(order < 0, -1, rows + order)
        if self.unmerged is not None:
            there = order.flatten()[self.unmerged.clamp(min=0)]
            order = there.masked_fill(self.unmerged < 0, -1)
        order = order.to(parts.device)
        found = parts.flatten(0, 1)[order.clamp(min=0)]
        missing = (order < 0).view(*order.shape, *[1] * (parts.ndim - 2))
        return found.masked_fill(missing, 0)

    def shards(self, kind: str) -> bool:
        """Whether a kind of layer, ``self``, ``cross`` or ``recurrent``, is to see what other ranks
        hold. A token that is generated is on every rank, and so is a state."""
        if kind == "cross" or self.decoding is None or self.split:
            return True
        return self.behind and kind == "self"

    @property
    def recent(self) -> ShardedBatch | None:
        """The same for layers of text that see a window; None: the batch knows of none."""
        layout = self.others.get(RECENT)
        return None if layout is None else replace(self, text=layout, is_recent=True)

    def layout(self, kind: str) -> Layout:
        """The layout of a kind of layer: ``self``, ``cross`` or ``recurrent``."""
        if kind != "cross":
            return self.text
        assert self.cross is not None, "cross-attention without images is skipped"
        return self.cross


def move(value: Any, device: torch.device) -> Any:
    """A tensor or a `Visibility` on the model's device; anything else as it is."""
    if isinstance(value, Visibility):
        return value.to(device)
    return to_device(value, device) if isinstance(value, Tensor) else value


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model computes."""
    parameter = next(model.parameters())
    # A parameter that ZeRO-3 keeps elsewhere tells nothing of where the model computes.
    if hasattr(parameter, "ds_id"):
        return torch.device(get_accelerator().current_device_name())
    return parameter.device
