"""A rank's shard of a batch of any family: the text cut by token, the visual input by unit.

The ranks tell each other what they hold, and what each has cut goes to its device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.batch import ShardedBatch, device_of, move
from ds_lvx.models.contract import Family
from ds_lvx.models.draft import Content, Draft
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.prepare import zigzags
from ds_lvx.models.text import Text
from ds_lvx.models.visual import Visual


def shard(
    family: Family,
    batch: Mapping[str, Any] | Draft,
    model: Any,
    *,
    channel: Channel,
    frames: str,
    always_vision: bool,
    records: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """This rank's part of a batch, ready for ``model(**shard)``; see `ds_lvx.shard_batch`.

    Args:
        family, model: that will get the shard.
        batch: as the family's processor returns it, or what `draft_batch` made of it.
        channel: the sequence-parallel group.
        frames: ``"all"`` or ``"local"``.
        always_vision: as of `Settled.of`.
        records: `Draft.record` of every rank of the group, where they have told each other.

    Collectives: one agreement on the control plane; none with ``records``.
    """
    place = channel.rank, channel.size
    if isinstance(batch, Draft):
        made = batch
    else:
        made = Draft.of(family, batch, model, place=place, frames=frames)
    content, error = made.content, made.error
    if content is not None and content.place != place:
        error = ValueError(
            f"got a draft of rank {content.place[0]} of {content.place[1]} on rank {place[0]} of "
            f"{place[1]}; expected the same groups in draft_batch and in shard_batch"
        )
    if records is None:
        records = channel.agree({} if error is not None else made.record(), error)
    assert content is not None
    require_same(records, content.shared_record(), what="shard_batch")
    part = Settled.of(content, records, family=family, model=model, always_vision=always_vision)
    return _on_device(content, part, family=family, model=model, channel=channel)


def _on_device(
    content: Content, part: Settled, *, family: Family, model: Any, channel: Channel
) -> dict[str, Any]:
    (rank, size), device = content.place, device_of(model)
    text = content.text.zigzag(size) if zigzags(family, model) and size > 1 else content.text
    here = text.part(rank, size)
    keyword = part.keyword(text, channel=channel, device=device)
    in_rows = keyword.order is None and keyword.unmerged is None
    channel.scattered = None if in_rows else keyword.text_lengths[rank]
    beside = part.visual.beside(rank, text, here)
    shard = {**text.shard(here), **part.arguments, **beside}
    moved = {key: move(value, device) for key, value in shard.items()}
    return {**moved, **family.always, KEYWORD: keyword}


@dataclass(frozen=True, eq=False)
class Settled:
    """What is visual of one rank, which knows how many units each rank holds.

    Attributes:
        visual: as its family has it.
        arguments: of the model, on the CPU.
        kv_lengths: visual tokens by rank, or None when no layer is to look at images.
        rule: of the whole text over all of them; None where all see all.
        row_mask: bool ``[B, T]``, the tokens of the text that see any; None: every one.
        units: that this rank holds.
    """

    visual: Visual
    arguments: Mapping[str, Any]
    kv_lengths: tuple[int, ...] | None
    rule: Visibility | None
    row_mask: Tensor | None
    units: int

    @classmethod
    def of(
        cls,
        content: Content,
        records: Sequence[Mapping[str, Any]],
        *,
        family: Family,
        model: Any,
        always_vision: bool,
    ) -> Settled:
        """Settle a draft.

        Args:
            content: of it.
            records: of all ranks.
            family, model: that will get the shard.
            always_vision: send a batch without images through tower and cross-attention all the
                same (with nothing to see, and exactly no effect), so that this group takes part in
                every collective that groups with images take part in, and ZeRO-3 has a gradient
                of every parameter: where it has none, it applies that of the step before again.
        """
        rank, size = content.place
        visual = family.complete(content.visual, model).settled(records)
        shares = tuple(int(record["share"]) for record in records)
        if content.frames == "all":
            shares = visual.shares(size)
        always_vision = always_vision or not family.skips_vision
        arguments: dict[str, Any] = {}
        kv_lengths, rule, row_mask = None, None, None
        if visual.runs is not None:
            visual.runs.check_images(sum(shares))
        if sum(shares) > 0 or visual.has_more:
            if sum(shares) > 0 or always_vision:
                blank = shares[rank] == 0 and not visual.encoded
                arguments = family.blank(model) if blank else dict(visual.arguments)
            kv_lengths = visual.lengths(shares)
            rule = visual.rule(content.valid(shares, records))
            if visual.runs is not None:
                row_mask = ~visual.runs.sees_nothing
        elif always_vision:
            # Where others have features, a batch without images has some of length 0.
            arguments = dict(visual.arguments) if visual.encoded else family.blank(model)
            kv_lengths = (0,) * size
            row_mask = torch.zeros(content.text.shape).bool()
        if not visual.attended:
            kv_lengths, row_mask = None, None
        return cls(visual, arguments, kv_lengths, rule, row_mask, shares[rank])

    def keyword(self, text: Text, *, channel: Channel, device: torch.device) -> ShardedBatch:
        """The keyword of a forward in which each rank has its part of the text."""
        lengths, mask = text.lengths(channel.size), self.row_mask
        keyword = ShardedBatch.of(
            channel=channel,
            text_lengths=lengths,
            kv_lengths=self.kv_lengths,
            text_rule=text.by_rank(text.visibility(), keys=True),
            cross_rule=text.by_rank(self.rule),
            row_mask=mask if mask is None or text.held is None else mask[:, text.held],
            device=device,
            others=self.visual.layouts(text, channel=channel, lengths=lengths, device=device),
            order=text.order(),
        )
        among = self.visual.among(channel.size)
        merged = text.merged()
        return replace(keyword, among=among, units=self.units, whole_text=text.whole, **merged)
