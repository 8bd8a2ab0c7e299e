"""The text of a batch: checked, in which part of it each rank has, and what of it sees what.

Shapes: ``B`` samples, ``T`` text tokens of the whole sequence, ``s`` of a rank's shard.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_lvx.attention.zigzag import dealt
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.cuts import span, split
from ds_lvx.models.prefixes import Branches, Merge, find

IGNORED_LABEL = -100
TEXT_KEYS = ("input_ids", "attention_mask", "position_ids", "labels")
ITEMS_KEY = "num_items_in_batch"

Here: TypeAlias = slice | Tensor
"""A rank's part of the text: neighbouring tokens, or int64 ``[s]``, their places."""


@dataclass(frozen=True, eq=False)
class Text:
    """The whole text of a batch, as the caller gave it and on the device where it lies.

    Attributes:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, nonzero where there is a token, or None.
        position_ids: ``[B, T]`` or ``[1, T]``, or None.
        labels: ``[B, T]``, -100 where nothing is to be learnt, or None.
        items: what the sum of the losses is divided by; None: the labelled tokens of this batch.
        held: int64 ``[T]``, the tokens of all ranks, one rank after the other; None: in order.
        window: in layers with one a token sees so many, with itself; None: no layer has one.
        branches: of rows that several which begin alike were made to; None: they are as they came.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor | None
    items: float | None = None
    held: Tensor | None = None
    window: int | None = None
    branches: Branches | None = None
    stays_sharded: ClassVar[bool] = False
    """In generation a rank keeps the keys of its part of a prompt, and none has all."""
    prefix: ClassVar[str] = ""
    """Of the model's names of all but ``labels``: a decoder's are others than its encoder's."""
    whole: ClassVar[bool] = False
    """Every rank runs all of it."""
    unlearnt: ClassVar[int] = 1
    """First labels of a row that count for nothing: the first token is predicted by nobody."""

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Self:
        """Take the text out of a batch.

        Raises:
            ValueError: a tensor is missing, has another shape than ``input_ids`` or no integers; a
                ``num_items_in_batch`` that is no number from 0 on.
        """
        first, *others = (f"{cls.prefix}{key}" for key in TEXT_KEYS[:3])
        input_ids = batch.get(first)
        if not is_integer(input_ids) or input_ids.ndim != 2:
            raise ValueError(
                f"got {first} {described(input_ids)}; expected integers [batch, seqlen]: pass the "
                'batch as the processor returns it, with return_tensors="pt"'
            )
        others.append(TEXT_KEYS[3])
        for key in others:
            one_row = key.endswith("position_ids")
            _check_like(key, batch.get(key), input_ids, first=first, one_row=one_row)
        attention_mask, position_ids, labels = (batch.get(key) for key in others)
        labels = None if labels is None else labels.long()  # cross-entropy takes nothing narrower
        items = None if batch.get(ITEMS_KEY) is None else _items(batch[ITEMS_KEY])
        return cls(input_ids, attention_mask, position_ids, labels, items)

    @property
    def named(self) -> dict[str, Tensor | None]:
        """Its tensors but the labels, as the model names them."""
        return {f"{self.prefix}{key}": getattr(self, key) for key in TEXT_KEYS[:3]}

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, T)``."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    @property
    def labelled(self) -> int:
        """Tokens that are learnt."""
        return int(self.labelled_tokens[:, self.unlearnt :].sum())

    @property
    def labelled_tokens(self) -> Tensor:
        """bool ``[B, T]``: those with a label."""
        if self.labels is None:
            return torch.zeros(self.shape, dtype=torch.bool)
        return self.labels != IGNORED_LABEL

    @property
    def learnt(self) -> Tensor:
        """bool ``[B, T]``: tokens whose next one is learnt."""
        return F.pad(self.labelled_tokens[:, 1:], (0, 1), value=False)

    def dealt(self, size: int) -> Self:
        """The same for ``size`` ranks, where who holds what has to be found once."""
        return self

    def zigzag(self, size: int) -> Self:
        """The same with an early and a late piece on each of ``size`` ranks
        (`ds_lvx.attention.zigzag`); a text of a class that cuts it otherwise stays as it is."""
        length = self.shape[1]
        cut_evenly = self.order() is None and self.lengths(size) == split(length, size)
        return replace(self, held=torch.cat(dealt(length, size))) if cut_evenly else self

    def order(self) -> Tensor | None:
        """See `ds_lvx.models.batch.ShardedBatch.order`."""
        return None if self.held is None else self.held.argsort().expand(self.shape)

    def merged(self) -> dict[str, Any]:
        """``unmerged`` and ``branches`` of `ds_lvx.models.batch.ShardedBatch`, where rows that
        begin alike are one."""
        if self.branches is None:
            return {}
        order = self.order()
        held = torch.ones(self.shape) if order is None else order >= 0
        until = F.pad(held.long().cumsum(dim=1), (1, 0))
        lengths = [
            row[[0, *starts, -1]].diff().tolist()
            for row, starts in zip(until, self.branches.starts, strict=True)
        ]
        return {"unmerged": self.branches.unmerged, "branches": lengths}

    def alike(
        self,
        columns: Sequence[Tensor],
        *,
        present: Tensor,
        ends: Tensor | None = None,
        together: Sequence[int] | None = None,
    ) -> Merge | None:
        """Rows of a text on the CPU that begin alike and are to be one; None where there are none.

        Args:
            columns: what tokens must have in common beside what they are here.
            present, ends, together: see `ds_lvx.models.prefixes.find`.

        Raises:
            ValueError: as there.
        """
        own = [self.input_ids, *columns]
        if self.attention_mask is not None:
            own.append(self.attention_mask)
        if self.position_ids is not None:
            positions = self.position_ids.expand(*self.position_ids.shape[:-2], *self.shape)
            own += positions.reshape(-1, *self.shape)
        how = {"present": present, "learnt": self.learnt, "kept": present | self.labelled_tokens}
        return find(own, **how, ends=ends, together=together)

    def joined(self, rows: Merge, positions: Tensor | None = None) -> Self:
        """The same with rows that begin alike as one, on the CPU.

        Args:
            rows: which these are.
            positions: the model's own, int ``[..., B, T]``; None: those that it has, or places.
        """
        mask = self.attention_mask
        if mask is None and bool(rows.pads.any()):
            mask = torch.ones(self.shape, dtype=torch.int64)
        if positions is None:
            positions = self.position_ids
        if positions is None:
            positions = torch.arange(self.shape[1])[None]
        return replace(
            self,
            input_ids=rows.taken(self.input_ids, int(self.input_ids[0, 0])),
            attention_mask=None if mask is None else rows.taken(mask, 0),
            position_ids=rows.taken(positions, 0),
            labels=None if self.labels is None else rows.taken(self.labels, IGNORED_LABEL),
            branches=rows.branches,
        )

    def by_rank(self, rule: Visibility | None, *, keys: bool = False) -> Visibility | None:
        """A rule of the text's queries (and ``keys``) in order, or None, by the order of ranks."""
        if rule is None or self.held is None:
            return rule
        return rule.part(self.held, self.held if keys else slice(None)).contiguous()

    def lengths(self, size: int) -> tuple[int, ...]:
        """Tokens by rank, of ``size`` ranks.

        Raises:
            ValueError: there are fewer tokens than ranks.
        """
        length = self.shape[1]
        if length < size:
            raise ValueError(
                f"got {length} text tokens for {size} ranks; expected at least one "
                "token a rank: use longer texts or a smaller sequence_parallel_size"
            )
        return split(length, size)

    def part(self, rank: int, size: int) -> Here:
        """A rank's part of it."""
        here = span(self.lengths(size), rank)
        return here if self.held is None else self.held[here]

    @property
    def divisor(self) -> float:
        """What the sum of the losses is divided by."""
        given = self.labelled if self.items is None else self.items
        # No label at all: the sum of the losses is 0, and so is the loss.
        return given if given > 0 else 1

    def check_items(self) -> None:
        """Refuse a sum of losses that would be divided by nothing.

        Raises:
            ValueError: a ``num_items_in_batch`` of 0 where something is learnt.
        """
        if self.items == 0 and self.labelled > 0:
            raise ValueError(
                f"got {ITEMS_KEY} 0; expected a number above 0 for a batch of {self.labelled} "
                "labelled tokens: those that the loss is a mean of"
            )

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        parts = {key: getattr(self, key) for key in TEXT_KEYS}
        changed: dict[str, Any] = {k: change(v) for k, v in parts.items() if v is not None}
        return replace(self, **changed)

    def digest(self) -> int:
        """A checksum of the whole text, equal on all ranks that were given the same."""
        return digest(*(getattr(self, key) for key in TEXT_KEYS))

    def visibility(self) -> Visibility | None:
        """Causal attention of the whole text; padding and packing as transformers has them.

        A key that ``attention_mask`` drops is invisible. Without ``attention_mask``, positions
        that do not go up by one start a new document, which sees nothing of those before it
        (transformers' ``find_packed_sequence_indices``). Of rows that begin alike and are one, each
        sees what they share and its own.
        """
        batch, length = self.shape
        index = torch.arange(length, dtype=torch.int32)
        start = torch.zeros(batch, length, dtype=torch.int32)
        keys = index.expand(batch, length)
        if self.attention_mask is not None:
            keys = keys.masked_fill(self.attention_mask.cpu() == 0, -1)
        begins = self.begins
        if begins is not None:
            start = (index * begins).cummax(dim=-1).values.to(torch.int32).expand(batch, length)
        end = (index + 1).expand(batch, length)
        queries = [start, end]
        if self.branches is not None:
            gaps = self.branches.gap_start, self.branches.gap_end
            queries += [each.to(torch.int32) for each in gaps]
        return Visibility.of(queries, keys)

    @property
    def begins(self) -> Tensor | None:
        """Where a further sample of a row begins, bool, of ``position_ids``' shape, on the CPU;
        None where every row has one."""
        if self.attention_mask is not None or self.position_ids is None:
            return None
        if self.branches is not None:
            return None
        begins = self.position_ids.cpu().diff(dim=-1) != 1
        return F.pad(begins, (1, 0)) if bool(begins.any()) else None

    def refuse_packed(self) -> None:
        """Refuse samples packed into a row, for models that would not keep them apart.

        Raises:
            NotImplementedError: positions start anew within a row.
        """
        if self.begins is not None:
            raise NotImplementedError(
                "got position_ids that start anew within a row, without attention_mask; the "
                "model's own attention does not keep packed samples apart: give each sample a row "
                "of its own, or attention_mask beside them, and a token sees all before it"
            )

    def shard(self, here: Here) -> dict[str, Any]:
        """The model's text arguments for the shard ``here``.

        Positions are those in the whole sequence. The labels are shifted over the whole sequence
        before they are cut, so that the last token of a shard still learns the first of the next;
        ``num_items_in_batch`` counts the labels of the whole batch, where the caller gave none.
        """
        positions = self.position_ids
        if positions is None:
            positions = torch.arange(self.shape[1], device=self.input_ids.device)[None]
        shard: dict[str, Any] = {
            "input_ids": self.input_ids[:, here],
            "position_ids": positions[:, here],
        }
        if self.labels is not None:
            shifted = F.pad(self.labels[:, 1:], (0, 1), value=IGNORED_LABEL)
            shard["labels"] = self.labels[:, here]
            shard["shift_labels"] = shifted[:, here].contiguous()
            shard[ITEMS_KEY] = self.divisor
        return shard


def digest(*tensors: Tensor | None) -> int:
    """CRC-32 of the values of small tensors, the same for int32 and int64."""
    value = 0
    for tensor in tensors:
        if tensor is None:
            value = zlib.crc32(b"none", value)
        else:
            value = zlib.crc32(tensor.detach().cpu().to(torch.int64).numpy().tobytes(), value)
    return value


def _items(given: Any) -> float:
    """``num_items_in_batch`` as a number; a ValueError where it is none from 0 on."""
    value = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(
            f"got {ITEMS_KEY} {given!r}; expected a number above 0 (0 where nothing is learnt): "
            "the labelled tokens that the loss is a mean of"
        )
    return value


def _check_like(key: str, value: Any, input_ids: Tensor, *, first: str, one_row: bool) -> None:
    if value is None:
        return
    allowed = [tuple(input_ids.shape)] + [(1, input_ids.shape[1])] * one_row
    fits = isinstance(value, Tensor) and tuple(value.shape) in allowed
    if not fits or not (key.endswith("attention_mask") or is_integer(value)):
        raise ValueError(
            f"got {key} {described(value)}; expected the shape of {first}, {allowed[0]}, and "
            "integers but in a mask: the whole sequence, neither cut nor expanded"
        )


def is_integer(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of integers, as embeddings take them."""
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def described(value: Any) -> str:
    """Its shape, and its dtype where that is none of integers; or what it is but a tensor."""
    if not isinstance(value, Tensor):
        return f"of {type(value).__name__}"
    return f"{tuple(value.shape)}{'' if is_integer(value) else f' of {value.dtype}'}"
