"""A rank's part of a batch before the ranks have agreed on it.

It is what a rank can do by itself, checks, checksums, cutting, all of it on the CPU and without a
word to other ranks, so that a data loader's worker can make it. What comes then is in
`ds_lvx.models.shard`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.models.contract import Family
from ds_lvx.models.prefixes import TOGETHER
from ds_lvx.models.prepare import shares_prefixes
from ds_lvx.models.text import IGNORED_LABEL, ITEMS_KEY, TEXT_KEYS, Text, digest
from ds_lvx.models.visual import Visual, pack_tiles, unpack_tiles
from ds_lvx.models.words import check_labels, check_tokens


@dataclass(frozen=True, eq=False)
class Draft:
    """What `ds_lvx.sharding.draft_batch` returns: one rank's part before the ranks agreed on it.

    What was wrong with the batch comes out where the ranks agree, so that all of them hear of it.
    """

    content: Content | None
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
        any_label: bool = False,
        apart: bool = False,
    ) -> Draft:
        """The draft of the rank at ``place``, its number and how many there are.

        Args:
            family, batch, model, frames: as in `ds_lvx.sharding.draft_batch`.
            place: of the rank.
            whole_text: every rank will have all of the text, which may have any length.
            any_label: what learns from the labels takes those beyond the head as well.
            apart: rows that begin alike stay rows of their own, whatever the config says.
        """
        try:
            content = Content.of(
                family,
                batch,
                model,
                place=place,
                frames=frames,
                any_label=any_label,
                apart=apart,
            )
            content.text.lengths(1 if whole_text else place[1])  # there have to be enough tokens
            return cls(content)
        # Whatever it is: the other ranks must not wait for this one.
        except Exception as caught:  # noqa: BLE001
            return cls(None, caught)

    def checked(self) -> Content:
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
            but: rows as they came and tokens of samples of which nothing is learnt, the same on
                every rank.
        """
        content = self.checked()
        text = content.text
        if but and text.labels is not None:
            labels = text.labels.clone()
            for row, tokens in but:
                if text.branches is None:
                    labels[row, tokens] = IGNORED_LABEL
                else:  # what is learnt is no other row's
                    there = text.branches.unmerged[row, tokens]
                    labels.view(-1)[there[there >= 0]] = IGNORED_LABEL
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


@dataclass(frozen=True, eq=False)
class Content:
    """What one rank knows of the batch before it has heard of the others.

    With ``frames="all"`` the visual arguments are cut to this rank's already.

    Attributes:
        came: what must be the same on every rank of the text in rows as they came.
    """

    place: tuple[int, int]
    frames: str
    came: Mapping[str, Any]
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
        any_label: bool = False,
        apart: bool = False,
    ) -> Content:
        """See `Draft.of`."""
        rank, size = place
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"got a batch of type {type(batch).__name__}; expected what the processor returns, "
                "tensors by name, such as input_ids"
            )
        batch = {key: value for key, value in batch.items() if value is not None}
        together = batch.pop(TOGETHER, None)
        _check_keys(batch, family, frames)
        text = given = family.text(batch, model)
        shares = frames == "all" and not apart and shares_prefixes(family, model)
        together = None if together is None else together.tolist()
        shares = shares or together is not None
        if shares:
            text = family.share_prefixes(text, batch, model, together=together)
        text = text.dealt(size)
        text.check_items()
        visual = family.visual(batch, text, model)
        if isinstance(model, nn.Module):  # a data worker may have its config alone
            inside = family.text_model(model)
            check_tokens(given.input_ids, inside, replaced=visual.replaced)
            if not any_label:
                check_labels(given, model, inside)
        if visual.encoded and frames == "local":
            raise ValueError(
                f'got {family.features_key} with frames="local"; expected the features of the '
                'whole batch with frames="all", or the local frames themselves'
            )
        if shares and visual.attended:
            text, visual = visual.share(text, together)
        # With frames="local" the units at hand are this rank's from the first on.
        part = visual.at_hand if frames == "local" else visual.part
        came = {
            "shape of input_ids": list(given.shape),
            "contents of the text (a checksum)": given.digest(),
        }
        return cls(place, frames, came, text, part(rank, size))

    def each(self, change: Callable[[Tensor], Tensor]) -> Content:
        """See `Draft.each`."""
        arguments = {
            key: change(value) if isinstance(value, Tensor) else value  # the host reads it
            for key, value in self.visual.arguments.items()
        }
        visual = replace(self.visual, arguments=arguments)
        return replace(self, text=self.text.each(change), visual=visual)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        branches = self.text.branches
        unmerged = None if branches is None else branches.unmerged
        record = {
            "frames": self.frames,
            **self.came,
            "rows that begin alike, images included (a checksum)": digest(unmerged),
            ITEMS_KEY: self.text.items,
            **self.visual.shared_record(),
        }
        if self.frames == "all":
            record["number of images"] = self.visual.count
            record["whether they are features already"] = self.visual.encoded
        return record

    def record(self) -> dict[str, Any]:
        """See `Draft.record`."""
        record = {**self.shared_record(), **self.visual.record()}
        if self._tells_padding:
            valid = self.visual.valid_parts(self.text.shape[0])
            record |= {"parts": valid.shape[2], "valid": pack_tiles(valid)}
        return record

    @property
    def _tells_padding(self) -> bool:
        return self.frames == "local" and self.visual.tells_padding

    def valid(self, shares: tuple[int, ...], records: Sequence[Mapping[str, Any]]) -> Any:
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
