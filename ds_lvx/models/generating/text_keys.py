"""Keys of a long prompt's text, in generation: on the rank that made them, or all on every rank.

A prompt that runs split leaves each rank with K and V of its own tokens. Either they are gathered,
so that a new token attends to the text without a message, or they stay, and a layer of the text
sends one message a token, as those that attend to images do. Keys of the tokens behind it are in
transformers' cache then, whole on every rank: each attends to them by itself, as a further part of
one softmax. So beams change places in that cache alone.

Shapes: ``B`` samples, ``R`` rows of the model, ``T`` tokens of the prompt, ``s`` of this rank,
``t`` tokens behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.cuts import span
from ds_lvx.models.generating import limits
from ds_lvx.models.text import Text

BESIDE = "ds_lvx"
"""Of transformers' cache: the attribute that has what goes with it."""
AUTO, SHARDED, WHOLE = WORDS = ("auto", "sharded", "whole")


class Piece(NamedTuple):
    """Neighbouring tokens of a text.

    Attributes:
        tokens: how many.
        lengths: rows of keys by rank, in the order in which ranks hold them.
    """

    tokens: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Held:
    """Tokens whose keys stay on the ranks that made them; a token behind sees all.

    Attributes:
        pieces: one behind the other. In all but the first each rank has a run of neighbours.
        kv_pos: int32 ``[B, s]`` on the CPU: places of this rank's tokens, a piece behind the other,
            below 0 of padding.
        window: see `Text`.
    """

    pieces: tuple[Piece, ...]
    kv_pos: Tensor
    window: int | None = None

    @classmethod
    def of(cls, text: Text, lengths: tuple[int, ...], rank: int) -> Self:
        """Those of a text.

        Args:
            text: the whole text, causal.
            lengths: tokens by rank, in the order in which ranks hold them.
            rank: this one.
        """
        seen = text.by_rank(text.visibility(), keys=True)
        assert seen is not None, "causal"
        mine = seen.kv_pos[:, span(lengths, rank)]
        return cls((Piece(text.shape[1], lengths),), mine, text.window)

    @classmethod
    def nothing(cls, samples: int) -> Self:
        """No token of so many samples."""
        return cls((), torch.zeros(samples, 0, dtype=torch.int32, device="cpu"))

    @property
    def tokens(self) -> int:
        """Of the text so far, T."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of keys by rank."""
        return tuple(map(sum, zip(*(piece.lengths for piece in self.pieces), strict=True)))

    def more(self, lengths: tuple[int, ...], mask: Tensor | None, rank: int) -> Self:
        """The same with further tokens behind.

        Args:
            lengths: of the runs that ranks hold.
            mask: of the text up to there at least, 0 at padding; None without.
            rank: this one.
        """
        here = span(lengths, rank)
        first = self.tokens + here.start
        places = torch.arange(first, first + lengths[rank], dtype=torch.int32, device="cpu")
        places = places.repeat(len(self.kv_pos), 1)
        if mask is not None:
            padding = mask[:, first : first + lengths[rank]].cpu() == 0
            places = places.masked_fill(padding, -1)
        piece = Piece(sum(lengths), lengths)
        return replace(
            self, pieces=(*self.pieces, piece), kv_pos=torch.cat((self.kv_pos, places), dim=1)
        )

    def layout(self, channel: Channel, queries: int, device: torch.device) -> Layout:
        """Of so many tokens behind, of each sample and the same on every rank."""
        start = torch.zeros(len(self.kv_pos), queries, dtype=torch.int32, device="cpu")
        return self._layout(channel, start, device)

    def recent(
        self, channel: Channel, queries: int, *, past: int, copies: int, device: torch.device
    ) -> Layout:
        """The same in layers with a window, which see the last of them or none.

        Args:
            channel, device: as of `layout`.
            queries: tokens behind, of each row.
            past: tokens before these.
            copies: rows of a sample.
        """
        assert self.window is not None, "no layer has one"
        first = past - self.window + 1
        start = torch.arange(first, first + queries, dtype=torch.int32, device="cpu").clamp(min=0)
        return self._layout(channel, start.repeat(len(self.kv_pos), copies), device)

    def _layout(self, channel: Channel, start: Tensor, device: torch.device) -> Layout:
        end, queries = torch.full_like(start, self.tokens), start.shape[1]
        rule = Rule.on(Visibility(start, end, self.kv_pos), device)
        return Layout(
            channel,
            (queries,) * channel.size,
            self.lengths,
            rule,
            device=device,
            first_query=channel.rank * queries,
            first_key=sum(self.lengths[: channel.rank]),
        )

    def until(self, tokens: int, rank: int) -> Self:
        """The first tokens alone, where a piece that is cut has runs of neighbours."""
        pieces = []
        for piece in self.pieces:
            pieces.append(piece if piece.tokens <= tokens else _cut(piece, tokens))
            tokens -= pieces[-1].tokens
        found = replace(self, pieces=tuple(pieces))
        return replace(found, kv_pos=self.kv_pos[:, : found.lengths[rank]])


def _cut(piece: Piece, tokens: int) -> Piece:
    """Its first tokens."""
    ends = accumulate(piece.lengths)
    kept = (n - max(end - tokens, 0) for n, end in zip(piece.lengths, ends, strict=True))
    return Piece(tokens, tuple(max(n, 0) for n in kept))


def tokens_of(layer: Any) -> int:
    """Tokens whose keys a layer of transformers' cache counts; of a state it counts none."""
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0


def has_states(cache: Any) -> bool:
    """Whether layers of transformers' cache have a state of the text in place of its keys."""
    return not all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def filled(cache: Any) -> list[int]:
    """Numbers of the layers that have keys in transformers' cache."""
    return [n for n, layer in enumerate(cache.layers) if tokens_of(layer) > 0]


def stay(setting: str, cache: Any, tokens: int, rows: int) -> bool:
    """Whether keys stay on the ranks that made them; the same on every rank.

    Args:
        setting: one of `WORDS`.
        cache: transformers' own, with K and V ``[B, H_kv, s, D]`` of some tokens.
        tokens: T, of all ranks.
        rows: R, which share the keys of their sample only as long as these are sharded.
    """
    if setting != AUTO:
        return setting == SHARDED
    layers = [cache.layers[number] for number in filled(cache)]
    each = (x[0, :, 0] for layer in layers for x in (layer.keys, layer.values))
    return rows * tokens * sum(x.nbytes for x in each) > limits.SHARDED_BYTES


def gather(
    cache: Any, channel: Channel, lengths: Sequence[int], *, copies: int, past: int = 0
) -> None:
    """Put K and V of all ranks' tokens into transformers' cache.

    Args:
        cache: with those of this rank's.
        channel: the sequence-parallel group.
        lengths: tokens by rank.
        copies: rows of a sample, each of which gets its own.
        past: tokens before these that every rank has.

    Collectives: for each layer an all-gather of ``2 (n-1) B s K D e`` bytes.
    """
    for number in filled(cache):
        layer = cache.layers[number]
        mine = [x[:, :, past:] for x in (layer.keys, layer.values)]
        found = channel.gather_rows(mine, [2, 2], tuple(lengths)).wait()
        if past > 0:
            both = zip((layer.keys, layer.values), found, strict=True)
            found = [torch.cat((x[:, :, :past], new), dim=2) for x, new in both]
        layer.keys, layer.values = found
        if copies > 1:
            layer.batch_repeat_interleave(copies)


class Behind(DynamicLayer):
    """A layer of transformers' cache that counts a prompt whose keys are elsewhere.

    Args:
        tokens: T.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def get_seq_length(self) -> int:
        """Tokens so far, with those of the prompt."""
        return self.tokens + self.held

    @property
    def held(self) -> int:
        """Tokens whose keys are here."""
        keys: Tensor | None = self.keys
        return 0 if keys is None or keys.ndim < 4 else int(keys.shape[-2])

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put rows in the order of beams."""
        if self.held > 0:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        if self.held > 0:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        if self.held > 0:
            super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove``, where those here end of the prompt's."""
        held = self.held
        super().crop(max(tokens_to_remove, -held))
        self.tokens += min(tokens_to_remove + held, 0)


def leave_behind(cache: Any, tokens: int) -> None:
    """Let transformers' cache count a text's tokens in place of keeping their keys.

    What went with the cache goes with it no more.

    Args:
        cache: with keys of these, or of some.
        tokens: T.
    """
    vars(cache).pop(BESIDE, None)
    cache.layers[:] = [Behind(tokens) if tokens_of(layer) > 0 else layer for layer in cache.layers]
