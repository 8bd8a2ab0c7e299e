"""The peer of models whose visual tokens stand among the text's: embeddings gathered on every rank.

So do trainers that split such a sample for Ulysses (LongVILA's; verl's has them without asking, as
every rank runs the whole tower): a rank encodes its share of the units, all ranks gather what all
towers made, each puts it into the embeddings of the whole text and cuts its own of contiguous,
equal pieces out of that. In backward gradients of the features are summed where they were made.
Everything else is as of `ds_lvx.models.concatenated`, so that nothing but this differs.

Legend: ``B`` rows, ``T`` tokens of a row, ``V`` visual tokens of all rows, n ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ds_lvx.attention.sequence import gather_shards
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.batch import Sequences
from ds_lvx.models.concatenated.deal import TEXT, Deal
from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Deep, Embed, Encoded
from ds_lvx.models.cuts import span, split
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.registry import FAMILIES
from ds_lvx.models.text import Here, Text


def instead_of(model_type: str) -> AbstractContextManager[None]:
    """While the context is open, models of a type are sharded as such trainers do it.

    Raises:
        ValueError: of a type whose visual tokens do not stand among the text's.
    """
    family = FAMILIES.named(model_type)
    if not isinstance(family, Concatenated):
        raise ValueError(
            f"gathered: got a model of type {model_type!r}; expected one whose visual tokens stand "
            "among the text's, whose embeddings others gather"
        )
    return FAMILIES.instead(model_type, type("Gathered", (_Gathered, type(family)), {}))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pieces(Sequences):
    """Rows in contiguous pieces, one a rank; the units too, whatever their tokens."""

    def dealt(self, size: int) -> Self:
        """The same for ``size`` ranks.

        Raises:
            ValueError: rows that are padded: the peer measures full ones.
        """
        rows, length = self.shape
        if self.attention_mask is not None and not bool(self.attention_mask.all()):
            raise ValueError("gathered: got an attention_mask with padding; expected full rows")
        counts = torch.tensor(split(len(self.units), size))
        owner = torch.arange(size).repeat_interleave(counts).tolist()
        column = torch.arange(length).repeat(rows, 1)
        return replace(self, deal=Deal(tuple(owner), column, split(length, size)))

    def shard(self, here: Here) -> dict[str, Any]:
        """As of `Sequences`, but all of ``input_ids``."""
        return {**super().shard(here), "input_ids": self.input_ids}

    def places(self, here: Here) -> Tensor:
        """Of all units, in the whole rows: int64 ``[V]``."""
        return (self.number != TEXT).flatten().nonzero()[:, 0]


class _EmbedWhole(Embed):
    """Embeddings of the whole text with all features in it, of which a piece goes on.

    Collectives: an all-gather of this rank's features, of ``hidden`` numbers a token; in backward
    every rank sends the others' gradients home. As many again for each deep feature.
    """

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        found = super().__call__(module, args, kwargs)
        if found is None:
            return None
        batch, whole = found[1][KEYWORD], found[1]["inputs_embeds"]
        here = span(batch.text_lengths, batch.channel.rank)
        if batch.deep is not None:
            batch = replace(batch, deep=_of_piece(batch.deep, whole.shape[1], here))
        # Contiguous, so that the whole is not kept for the first layer's backward.
        piece = whole[:, here].contiguous()
        return args, {**found[1], KEYWORD: batch, "inputs_embeds": piece}

    def encoded(self, module: nn.Module, units: Mapping[str, Any], batch: ShardedBatch) -> Encoded:
        """Of the units of all ranks; a blank one counts for nothing."""
        assert batch.among is not None
        where: dict[str, Any] = {"channel": batch.channel, "lengths": batch.among}
        own, made = batch.among[batch.channel.rank], super().encoded(module, units, batch)
        features, *deep = (
            gather_shards(each[:own], 0, wants_grad=each.requires_grad, **where)
            for each in (made.features, *made.deep)
        )
        return Encoded(features, deep)


class _Gathered(Concatenated):
    """What differs of a family, in front of its own class."""

    embed = _EmbedWhole

    def text(self, batch: Mapping[str, Any], model: Any) -> Text:
        return _Pieces(**vars(super().text(batch, model)))

    def owned(self, tokens: Sequence[int], rank: int, size: int) -> list[int]:
        part = span(split(len(tokens), size), rank)
        return [*range(part.start, part.stop)]


def _of_piece(deep: Deep, length: int, here: slice) -> Deep:
    """The deep features of the tokens of a piece of each row of ``length`` tokens."""
    row, column = deep.places // length, deep.places % length
    mine = ((column >= here.start) & (column < here.stop)).nonzero()[:, 0]
    there = row * (here.stop - here.start) + column - here.start
    return Deep(there[mine], tuple(each[mine] for each in deep.features))
