"""What a generation begins with, on one rank: the whole text is on every rank, its own units here.

Shapes: ``B`` samples, ``C`` rows of each, ``T`` tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.batch import ShardedBatch, move
from ds_lvx.models.decoding_keys import DecodingKeys, LayerKey
from ds_lvx.models.text_keys import AUTO, Held

if TYPE_CHECKING:
    from ds_lvx.models.behind import Part

Kept: TypeAlias = "tuple[Prompt, Mapping[LayerKey, tuple[Tensor, Tensor]], Tensor | None]"
"""The first prompt, K and V by layer, and what stands in the place of features."""
WHOLE = slice(None)
LAST = slice(-1, None)


@dataclass(frozen=True, eq=False)
class Prompt:
    """What generation begins with, on one rank.

    Attributes:
        channel: the sequence-parallel group.
        device: where the model computes.
        shape: ``(B, T)``.
        arguments: of the model's first forward beside the text, on the device: this rank's units,
            which are let go then.
        kv_lengths: visual tokens by rank, or None when no layer is to look at images.
        rule: of the prompt over this rank's visual tokens, on the CPU; None: all see all.
        row_mask: bool ``[B, T]`` on the CPU, False where a token may see no image at all; None when
            every token sees some.
        world: all ranks, where other groups generate from other batches.
        positions: int ``[..., B, T]`` on the CPU, where they are not transformers' own.
        others: layouts of the prompt's forward, `ShardedBatch.others`.
        split: the keyword of the prompt's forward where that is split over the ranks.
        kept: where keys are there already: the first prompt, they, and the stand-in for features.
        part: this rank's part of a prompt whose keys stay sharded, until it runs.
        text: what ranks hold of a prompt whose keys stay sharded, or may stay until it has run;
            also of one behind it.
        text_keys: whether those of a prompt that is split stay (`ds_lvx.models.text_keys.WORDS`).
        among: visual tokens stand among the text.
        gaps: some tokens behind a prompt whose keys are sharded are padding.
        prefix: of the text's arguments (`ds_lvx.models.text.Text`); with one the units are an
            encoder's, whose rows stay sharded.
    """

    channel: Channel
    device: torch.device
    shape: tuple[int, int]
    arguments: Mapping[str, Any]
    kv_lengths: tuple[int, ...] | None
    rule: Visibility | None
    row_mask: Tensor | None
    world: Channel | None = None
    positions: Tensor | None = None
    others: Mapping[str, Layout] = field(default_factory=dict)
    split: ShardedBatch | None = None
    kept: Kept | None = None
    part: Part | None = None
    text: Held | None = None
    text_keys: str = AUTO
    among: bool = False
    gaps: bool = False
    prefix: str = ""

    @property
    def is_behind(self) -> bool:
        """Its tokens stand behind those of a prompt whose keys are sharded."""
        return self.text is not None and self.split is None and self.part is None

    def behind(self, tokens: int) -> Prompt:
        """So many tokens that see what the last one sees, once the units are encoded.

        Args:
            tokens: of each sample.
        """
        rule, mask = self.rule, self.row_mask
        if rule is not None:
            start, end = (each[:, -1:].repeat(1, tokens) for each in (rule.q_start, rule.q_end))
            rule = Visibility(start, end, rule.kv_pos)
        mask = None if mask is None else mask[:, -1:].repeat(1, tokens)
        shape = self.shape[0], tokens
        return replace(self.without_units(), shape=shape, rule=rule, row_mask=mask)

    def until(self, tokens: int) -> Prompt:
        """The same where fewer tokens are left of what ranks hold of its text."""
        if self.text is None or tokens >= self.text.tokens:
            return self
        text = self.text.until(tokens, self.channel.rank)
        return replace(self, shape=(self.shape[0], tokens), text=text)

    def without_units(self) -> Prompt:
        """The same once the units are encoded."""
        return replace(self, arguments={}, others={}, split=None, part=None)

    def batch(self, tokens: slice, *, copies: int, decoding: DecodingKeys) -> ShardedBatch:
        """The keyword of a forward.

        Args:
            tokens: whose rows of the rule it goes by; a token that is chosen sees what the last one
                of the prompt sees.
            copies: C.
            decoding: what the generation keeps whose forward it is.
        """
        count = len(range(*tokens.indices(self.shape[1])))
        each = (count,) * self.channel.size
        if self.text is None:
            text = Layout(self.channel, each, each, device=self.device)
        else:
            text = self.text.layout(self.channel, count * copies, self.device)
        mask = None
        if self.row_mask is not None:
            rows = self.row_mask[:, tokens].repeat_interleave(copies, dim=0)
            mask = move(rows[:, None, :, None], self.device)
        cross = self._cross(tokens, count * copies)
        return ShardedBatch(
            text,
            cross,
            mask,
            world=self.world,
            others=self.others,
            decoding=decoding,
            behind=self.text is not None,
        )

    def _cross(self, tokens: slice, queries: int) -> Layout | None:
        if self.kv_lengths is None:
            return None
        rank, rule = self.channel.rank, None
        if self.rule is not None:
            part = self.rule.part(tokens, WHOLE)
            copies = queries // part.q_start.shape[1]
            starts, ends = (each.repeat(1, copies) for each in (part.q_start, part.q_end))
            rule = Rule.on(Visibility(starts, ends, part.kv_pos), self.device)
        return Layout(
            self.channel,
            (queries,) * self.channel.size,
            self.kv_lengths,
            rule,
            device=self.device,
            first_query=rank * queries,
            first_key=sum(self.kv_lengths[:rank]),
        )
