"""A long text behind a cache, split over the ranks as a long prompt is.

Its tokens attend to all of the text so far, by lvx: each rank has the keys of a part of it, those
of its own new tokens among them, and queries travel. Of what every rank had the keys of, each takes
a run of neighbours; keys that were sharded stay where they are.

Shapes: ``B`` samples, ``P`` tokens before this text, ``t`` of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.batch import RECENT, ShardedBatch
from ds_lvx.models.cuts import span, split
from ds_lvx.models.generating.text_keys import Held


@dataclass(frozen=True, eq=False)
class Further:
    """What a forward of such a text goes by.

    Attributes:
        keyword: of the forward.
        held: what ranks hold of all of the text, where its keys stay.
        run: of the tokens that every rank has the keys of, those that are this rank's part.
        whole: how many those tokens are.
    """

    keyword: ShardedBatch
    held: Held
    run: slice
    whole: int

    @classmethod
    def of(
        cls,
        before: Held,
        *,
        whole: int,
        tokens: int,
        mask: Tensor | None,
        channel: Channel,
        device: torch.device,
    ) -> Self:
        """A text behind others, which looks at no image yet.

        Args:
            before: tokens whose keys are sharded.
            whole: tokens behind those, of which every rank has the keys.
            tokens: t.
            mask: ``[B, P + t]``, 0 at padding; None without.
            channel: the sequence-parallel group.
            device: where the model computes.
        """
        rank, size = channel.rank, channel.size
        runs, lengths = split(whole, size), split(tokens, size)
        held = before.more(runs, mask, rank).more(lengths, mask, rank)
        past = before.tokens + whole
        end = torch.arange(past + 1, past + tokens + 1, dtype=torch.int32, device="cpu")
        end = end.repeat(len(held.kv_pos), 1)

        def layout(start: Tensor) -> Layout:
            rule, first = Rule.on(Visibility(start, end, held.kv_pos), device), held.lengths[:rank]
            return Layout(channel, lengths, held.lengths, rule, device=device, first_key=sum(first))

        window = held.window
        recent = {} if window is None else {RECENT: layout((end - window).clamp(min=0))}
        text, behind = layout(torch.zeros_like(end)), before.tokens > 0
        keyword = ShardedBatch(
            text, None, None, others=recent, split=True, behind=behind, past=past
        )
        return cls(keyword, held, span(runs, rank), whole)
