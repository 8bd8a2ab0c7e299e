"""Sharding a batch of any family: the text evenly by token, the visual input by unit.

First what a rank can do by itself, a `Draft`: checks, checksums, cutting, all of it on the CPU and
without a word to other ranks, so that a data loader's worker can make it. Then the ranks agree, and
what is cut goes to the device.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.batch import ShardedBatch, move
from ds_lvx.models.behind import sharded_prompt
from ds_lvx.models.contract import Family
from ds_lvx.models.cuts import span
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.prepare import zigzags
from ds_lvx.models.prompt import Prompt
from ds_lvx.models.text import IGNORED_LABEL, ITEMS_KEY, TEXT_KEYS, Text
from ds_lvx.models.text_keys import SHARDED, Held
from ds_lvx.models.visual import Visual, pack_tiles, unpack_tiles

SPLIT_TOKENS = 2048
"""A prompt of so many text tokens is split over the ranks, where its family can."""


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
    """This rank's part of a batch or of a `Draft`; see `ds_lvx.models.contract.Family.shard`."""
    place = channel.rank, channel.size
    if isinstance(batch, Draft):
        made = batch
    else:
        made = Draft.of(family, batch, model, place=place, frames=frames)
    draft, error = made.content, made.error
    if draft is not None and draft.place != place:
        error = ValueError(
            f"got a draft of rank {draft.place[0]} of {draft.place[1]} on rank {place[0]} of "
            f"{place[1]}; expected the same groups in draft_batch and in shard_batch"
        )
    if records is None:
        records = channel.agree({} if error is not None else made.record(), error)
    assert draft is not None
    require_same(records, draft.shared_record(), what="shard_batch")
    return draft.finish(
        records, family=family, model=model, channel=channel, always_vision=always_vision
    )


@dataclass(frozen=True, eq=False)
class Draft:
    """What `ds_lvx.sharding.draft_batch` returns: one rank's part before the ranks agreed on it.

    What was wrong with the batch comes out where the ranks agree, so that all of them hear of it.
    """

    content: _Content | None
    error: Exception | None = None

    @classmethod
    def of(
        cls,
        family: Family,
        batch: Mapping[str, Any],
        model: Any,
        *,
        place: tuple[int, int],
        frames: str,
        whole_text: bool = False,
    ) -> Draft:
        """The draft of the rank at ``place``, its number and how many there are.

        Args:
            family, batch, model, frames: as in `ds_lvx.sharding.draft_batch`.
            place: of the rank.
            whole_text: every rank will have all of the text, which may have any length.
        """
        try:
            content = _Content.of(family, batch, model, place=place, frames=frames)
            content.text.lengths(1 if whole_text else place[1])  # there have to be enough tokens
            return cls(content)
        # Whatever it is: the other ranks must not wait for this one.
        except Exception as caught:  # noqa: BLE001
            return cls(None, caught)

    def checked(self) -> _Content:
        """What is in it.

        Raises:
            Exception: what was wrong with the batch.
        """
        if self.error is not None:
            raise self.error
        assert self.content is not None
        return self.content

    def record(self) -> dict[str, Any]:
        """What the other ranks of the group have to know of it, JSON; raises as `checked`."""
        return self.checked().record()

    def learning(self, items: float | None, *, but: Collection[tuple[int, slice]] = ()) -> Draft:
        """The same when ranks have agreed on it, with what of it is learnt.

        Args:
            items: what the sum of the losses is divided by; None as before.
            but: rows and tokens of samples of which nothing is learnt, the same on every rank.
        """
        content = self.checked()
        text = content.text
        if but and text.labels is not None:
            labels = text.labels.clone()
            for place in but:
                labels[place] = IGNORED_LABEL
            text = replace(text, labels=labels)
        text = replace(text, items=text.items if items is None else items)
        return replace(self, content=replace(content, text=text))

    @property
    def labelled(self) -> int:
        """Tokens that are learnt."""
        return self.checked().text.labelled

    def pin_memory(self) -> Draft:
        """The same in pinned memory; a data loader with ``pin_memory=True`` calls it."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> Draft:
        """The same with every tensor changed that goes to the device."""
        return self if self.content is None else replace(self, content=self.content.each(change))

    def seen(self, change: Callable[[Any], Visual]) -> Draft:
        """The same with its visual part changed, in nothing that ranks have agreed on."""
        if self.content is None:
            return self
        return replace(self, content=replace(self.content, visual=change(self.content.visual)))


@dataclass(frozen=True, eq=False)
class _Content:
    """What one rank knows of the batch before it has heard of the others.

    With ``frames="all"`` the visual arguments are cut to this rank's already.
    """

    place: tuple[int, int]
    frames: str
    text: Text
    visual: Visual

    @classmethod
    def of(
        cls,
        family: Family,
        batch: Mapping[str, Any],
        model: Any,
        *,
        place: tuple[int, int],
        frames: str,
    ) -> _Content:
        rank, size = place
        batch = {key: value for key, value in batch.items() if value is not None}
        _check_keys(batch, family, frames)
        text = family.text(batch, model).dealt(size)
        visual = family.visual(batch, text, model)
        if visual.encoded and frames == "local":
            raise ValueError(
                f'got {family.features_key} with frames="local"; expected the features of the '
                'whole batch with frames="all", or the local frames themselves'
            )
        # With frames="local" the units at hand are this rank's from the first on.
        part = visual.at_hand if frames == "local" else visual.part
        return cls(place, frames, text, part(rank, size))

    def each(self, change: Callable[[Tensor], Tensor]) -> _Content:
        arguments = {
            key: change(value) if isinstance(value, Tensor) else value  # the host reads it
            for key, value in self.visual.arguments.items()
        }
        visual = replace(self.visual, arguments=arguments)
        return replace(self, text=self.text.each(change), visual=visual)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        record = {
            "frames": self.frames,
            "shape of input_ids": list(self.text.shape),
            "contents of the text (a checksum)": self.text.digest(),
            ITEMS_KEY: self.text.items,
            **self.visual.shared_record(),
        }
        if self.frames == "all":
            record["number of images"] = self.visual.count
            record["whether they are features already"] = self.visual.encoded
        return record

    def record(self) -> dict[str, Any]:
        record = {**self.shared_record(), **self.visual.record()}
        if self._tells_padding:
            valid = self.visual.valid_parts(self.text.shape[0])
            record |= {"parts": valid.shape[2], "valid": pack_tiles(valid)}
        return record

    def finish(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        family: Family,
        model: Any,
        channel: Channel,
        always_vision: bool,
    ) -> Any:
        """This rank's shard on the model's device, knowing how many units each rank holds."""
        (rank, size), device = self.place, device_of(model)
        text = self.text.zigzag(size) if zigzags(family, model) and size > 1 else self.text
        here = text.part(rank, size)
        part = self._part(records, family=family, model=model, always_vision=always_vision)
        keyword = self._keyword(text, part, channel=channel, device=device)
        channel.scattered = None if keyword.order is None else keyword.text_lengths[rank]
        beside = part.visual.beside(rank, text, here)
        shard = {**text.shard(here), **part.arguments, **beside}
        moved = {key: move(value, device) for key, value in shard.items()}
        return {**moved, **family.always, KEYWORD: keyword}

    def _keyword(
        self, text: Text, part: _Part, *, channel: Channel, device: torch.device
    ) -> ShardedBatch:
        lengths, mask = text.lengths(channel.size), part.row_mask
        keyword = ShardedBatch.of(
            channel=channel,
            text_lengths=lengths,
            kv_lengths=part.kv_lengths,
            text_rule=text.by_rank(text.visibility(), keys=True),
            cross_rule=text.by_rank(part.rule),
            row_mask=mask if mask is None or text.held is None else mask[:, text.held],
            device=device,
            others=part.visual.layouts(text, channel=channel, lengths=lengths, device=device),
            order=text.order(),
        )
        return replace(keyword, among=self.visual.among(channel.size), units=part.units)

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
        """The whole text on the model's device, and what generation begins with beside it."""
        (rank, size), device = self.place, device_of(model)
        part = self._part(records, family=family, model=model, always_vision=always_vision)
        if self.text.stays_sharded:
            beside = part.visual.beside(rank, self.text, self.text.part(rank, size))
            return sharded_prompt(
                self.text,
                part.visual,
                {**part.arguments, **beside},
                keyword=self._keyword(self.text, part, channel=channel, device=device),
                device=device,
            )
        beside = part.visual.beside(rank, self.text, slice(0, self.text.shape[1]))
        # The text's own are transformers', which makes more of them for more tokens and rows.
        named = self.text.named
        others = {key: value for key, value in beside.items() if key not in named}
        arguments = {**part.arguments, **others}
        rule = part.rule
        if rule is not None and part.kv_lengths is not None:
            rule = rule.part(slice(None), span(part.kv_lengths, rank))
        positions = part.visual.prompt_positions(self.text)
        split, held = None, None
        long = self.text.shape[1] >= SPLIT_TOKENS or text_keys == SHARDED
        if size > 1 and long and family.splits_prompt:
            split = self._keyword(self.text, part, channel=channel, device=device)
            split = replace(split, split=True)
            held = Held.of(self.text, split.text_lengths, rank)
        prompt = Prompt(
            channel=channel,
            device=device,
            shape=self.text.shape,
            arguments={key: move(value, device) for key, value in arguments.items()},
            kv_lengths=part.kv_lengths,
            rule=rule,
            row_mask=part.row_mask,
            positions=positions,
            split=split,
            text=held,
            text_keys=text_keys,
            others=part.visual.layouts(
                self.text, channel=channel, lengths=(self.text.shape[1],) * size, device=device
            ),
            prefix=self.text.prefix,
        )
        given = named | ({} if positions is None else {"position_ids": positions})
        return {k: move(v, device) for k, v in given.items() if v is not None}, prompt

    def _part(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        family: Family,
        model: Any,
        always_vision: bool,
    ) -> _Part:
        """This rank's part of what is visual, and who sees it."""
        rank, size = self.place
        visual = self.visual.settled(records)
        shares = tuple(int(record["share"]) for record in records)
        if self.frames == "all":
            shares = visual.shares(size)
        arguments: dict[str, Any] = {}
        kv_lengths, rule, row_mask = None, None, None
        if visual.runs is not None:
            visual.runs.check_images(sum(shares))
        if sum(shares) > 0 or visual.has_more:
            if sum(shares) > 0 or always_vision:
                blank = shares[rank] == 0 and not visual.encoded
                arguments = family.blank(model) if blank else dict(visual.arguments)
            kv_lengths = visual.lengths(shares)
            rule = visual.rule(self._valid(shares, records))
            if visual.runs is not None:
                row_mask = ~visual.runs.sees_nothing
        elif always_vision:
            # Where others have features, a batch without images has some of length 0.
            arguments = dict(visual.arguments) if visual.encoded else family.blank(model)
            kv_lengths = (0,) * size
            row_mask = torch.zeros(self.text.shape).bool()
        if not visual.attended:
            kv_lengths, row_mask = None, None
        return _Part(visual, arguments, kv_lengths, rule, row_mask, shares[rank])

    @property
    def _tells_padding(self) -> bool:
        return self.frames == "local" and self.visual.tells_padding

    def _valid(self, shares: tuple[int, ...], records: Sequence[Mapping[str, Any]]) -> Any:
        """bool ``[B, N, parts]`` of all units."""
        batch_size = self.text.shape[0]
        if not self._tells_padding:
            return self.visual.valid_parts(batch_size)
        parts = [
            unpack_tiles(record["valid"], (batch_size, share, record["parts"]))
            for share, record in zip(shares, records, strict=True)
            if share > 0
        ]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class _Part:
    """What is visual of one rank: its arguments of the model, visual tokens by rank, the rule of
    the whole text over all of them, which tokens see any, bool ``[B, T]``, and how many units."""

    visual: Visual
    arguments: Mapping[str, Any]
    kv_lengths: tuple[int, ...] | None
    rule: Visibility | None
    row_mask: Tensor | None
    units: int


def _check_keys(batch: Mapping[str, Any], family: Family, frames: str) -> None:
    if frames not in ("all", "local"):
        raise ValueError(f'got frames={frames!r}; expected "all" or "local"')
    keys = (*TEXT_KEYS, ITEMS_KEY, *family.keys)
    for key in batch:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1) or ["input_ids"]
            raise ValueError(
                f"got {key!r} in the batch; expected only {', '.join(keys)} (nearest: "
                f"{near[0]!r}): remove it, or pass it to the model yourself"
            )


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model computes."""
    parameter = next(model.parameters())
    # A parameter that ZeRO-3 keeps elsewhere tells nothing of where the model computes.
    if hasattr(parameter, "ds_id"):
        return torch.device(get_accelerator().current_device_name())
    return parameter.device
