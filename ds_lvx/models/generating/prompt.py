"""What a generation begins with, on one rank: the whole text is on every rank, its own units here.

Shapes: ``B`` samples, ``C`` rows of each, ``T`` tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.batch import ShardedBatch, device_of, move
from ds_lvx.models.contract import Family
from ds_lvx.models.cuts import span
from ds_lvx.models.decoding_keys import DecodingKeys, LayerKey
from ds_lvx.models.draft import Content
from ds_lvx.models.generating.further import Further
from ds_lvx.models.generating.limits import splits
from ds_lvx.models.generating.text_keys import AUTO, SHARDED, Held
from ds_lvx.models.shard import Settled
from ds_lvx.models.text import TEXT_KEYS, Text

Kept: TypeAlias = "tuple[Prompt, Mapping[LayerKey, tuple[Tensor, Tensor]], Tensor | None]"
"""The first prompt, K and V by layer, and what stands in the place of features."""
WHOLE = slice(None)
LAST = slice(-1, None)


@dataclass(frozen=True, eq=False)
class Part:
    """This rank's part of a prompt whose keys stay sharded.

    Attributes:
        keyword: of the prompt's forward.
        arguments: of the model: ids and positions of this rank's tokens, on the device, and which
            of them need logits: those that are the last of a row, or any.
        picks: int64 ``[B]`` on the device: which of these logits are a row's.
        owners: int64 ``[B]`` on the device: the rank that has a row's last token.
    """

    keyword: ShardedBatch
    arguments: Mapping[str, Tensor | None]
    picks: Tensor
    owners: Tensor

    @classmethod
    def of(cls, text: Text, keyword: ShardedBatch, device: torch.device) -> Part:
        """The part of a text.

        Args:
            text: the whole text.
            keyword: as of a forward of training.
            device: where the model computes.

        Raises:
            ValueError: a row ends with padding.
        """
        lengths, rank = keyword.text_lengths, keyword.channel.rank
        assert keyword.order is not None, "tokens are dealt"
        last = keyword.order[:, -1].contiguous()
        wrong = (last < 0).nonzero()[:1]
        if len(wrong) > 0:
            raise ValueError(
                f"got padding at the end of sample {int(wrong)}, behind which nothing can be "
                'generated; expected it at the beginning: padding_side="left" of the tokenizer'
            )
        ends = torch.tensor(lengths, device="cpu").cumsum(dim=0)
        owners = torch.searchsorted(ends, last, right=True)
        places = (last - (ends[rank] - lengths[rank])).masked_fill(owners != rank, 0)
        wanted, picks = places.unique(return_inverse=True)
        shard = text.shard(span(lengths, rank))
        # Without a mask of its own a part has none, and not that of the whole text.
        arguments = {key: shard.get(key) for key in TEXT_KEYS[:3]}
        arguments["logits_to_keep"] = wanted
        return cls(
            keyword,
            {key: move(value, device) for key, value in arguments.items()},
            move(picks, device),
            move(owners, device),
        )

    def logits(self, mine: Tensor, copies: int) -> Tensor:
        """Those of the last token of each row, on every rank.

        Args:
            mine: ``[B, m, V]``, of the tokens that ``arguments`` name.
            copies: C.

        Returns:
            ``[B * C, 1, V]``.

        Collectives: an all-gather of ``B V`` of them.
        """
        rows = torch.arange(len(mine), device=mine.device)
        channel: Channel = self.keyword.channel
        own = mine[rows, self.picks][None].contiguous()
        everyones = channel.gather_rows([own], [0], (1,) * channel.size).wait()[0]
        return everyones[self.owners, rows].repeat_interleave(copies, dim=0)[:, None]


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
        further: this rank's part of a text behind a cache, until it runs.
        text: what ranks hold of a prompt whose keys stay sharded, or may stay until it has run;
            also of one behind it.
        text_keys: whether those of a prompt that is split stay, one of ``WORDS`` of
            `ds_lvx.models.generating.text_keys`.
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
    further: Further | None = None
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
        return replace(self, arguments={}, others={}, split=None, part=None, further=None)

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
        queries, rank = count * copies, self.channel.rank
        cross = self._cross(
            tokens, copies, (queries,) * self.channel.size, first_query=rank * queries
        )
        return ShardedBatch(
            text,
            cross,
            self._mask(tokens, copies),
            world=self.world,
            others=self.others,
            decoding=decoding,
            behind=self.text is not None,
        )

    def split_behind(self, past: int, mask: Tensor | None) -> Prompt:
        """The same text, which goes on from a cache, split over the ranks.

        Args:
            past: tokens before it.
            mask: of all of the text, 0 at padding; None without.
        """
        before = Held.nothing(self.shape[0]) if self.text is None else self.text
        further = Further.of(
            before,
            whole=past - before.tokens,
            tokens=self.shape[1],
            mask=mask,
            channel=self.channel,
            device=self.device,
        )
        lengths = further.keyword.text_lengths
        cross = self._cross(WHOLE, 1, lengths, first_query=0)
        rows = self._mask(span(lengths, self.channel.rank), 1)
        keyword = replace(further.keyword, cross=cross, row_mask=rows)
        return replace(self, further=replace(further, keyword=keyword))

    def _mask(self, tokens: slice, copies: int) -> Tensor | None:
        if self.row_mask is None:
            return None
        rows = self.row_mask[:, tokens].repeat_interleave(copies, dim=0)
        mask: Tensor = move(rows[:, None, :, None], self.device)
        return mask

    def _cross(
        self, tokens: slice, copies: int, q_lengths: tuple[int, ...], *, first_query: int
    ) -> Layout | None:
        if self.kv_lengths is None:
            return None
        rank, rule = self.channel.rank, None
        if self.rule is not None:
            part = self.rule.part(tokens, WHOLE)
            starts, ends = (each.repeat(1, copies) for each in (part.q_start, part.q_end))
            rule = Rule.on(Visibility(starts, ends, part.kv_pos), self.device)
        return Layout(
            self.channel,
            q_lengths,
            self.kv_lengths,
            rule,
            device=self.device,
            first_query=first_query,
            first_key=sum(self.kv_lengths[:rank]),
        )


@dataclass(frozen=True, eq=False)
class Fresh:
    """A batch that begins a generation, in the form of one that goes on from a cache
    (`ds_lvx.models.generating.past.Continued`).

    Attributes:
        content: of its draft.
    """

    content: Content

    def record(self) -> dict[str, Any]:
        """What the other ranks of the group have to know of it, JSON."""
        return self.content.record()

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        return self.content.shared_record()

    def prompt(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        family: Family,
        model: Any,
        channel: Channel,
        always_vision: bool,
        text_keys: str,
    ) -> tuple[dict[str, Tensor], Prompt]:
        """The whole text on the model's device, and what generation begins with beside it.

        Args:
            records: of all ranks.
            family, model, always_vision: as of `Settled.of`.
            channel: the sequence-parallel group.
            text_keys: see `Prompt`.

        Raises:
            ValueError: as of `Part.of`, where every rank keeps the keys of its part.
        """
        content, device = self.content, device_of(model)
        (rank, size), text = content.place, content.text
        part = Settled.of(content, records, family=family, model=model, always_vision=always_vision)
        stays, keyword, held = text.stays_sharded, None, None
        long = splits(text.shape[1], size) or (size > 1 and text_keys == SHARDED)
        if stays or (long and family.splits_prompt):
            keyword = replace(part.keyword(text, channel=channel, device=device), split=True)
            held = Held.of(text, keyword.text_lengths, rank)
        positions, named = part.visual.prompt_positions(text), text.named
        given = named | ({} if positions is None else {"position_ids": positions})
        # The text's own are transformers', which makes more of them for more tokens and rows.
        beside = part.visual.beside(rank, text, text.part(rank, size) if stays else WHOLE)
        others = {key: value for key, value in beside.items() if key not in named}
        rule = part.rule
        if rule is not None and part.kv_lengths is not None:
            rule = rule.part(WHOLE, span(part.kv_lengths, rank))
        prompt = Prompt(
            channel=channel,
            device=device,
            shape=text.shape,
            arguments={k: move(v, device) for k, v in {**part.arguments, **others}.items()},
            kv_lengths=part.kv_lengths,
            rule=rule,
            row_mask=part.row_mask,
            positions=positions,
            others=part.visual.layouts(
                text, channel=channel, lengths=(text.shape[1],) * size, device=device
            ),
            split=None if stays else keyword,
            text=held,
            text_keys=text_keys,
            among=stays,
            prefix=text.prefix,
        )
        if stays:
            assert keyword is not None
            prompt = replace(
                prompt, part=Part.of(replace(text, position_ids=positions), keyword, device)
            )
        return {k: move(v, device) for k, v in given.items() if v is not None}, prompt
