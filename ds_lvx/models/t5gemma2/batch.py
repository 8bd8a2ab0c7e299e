"""T5Gemma2's batches: an encoder's rows of text and image tokens, and a decoder's text.

Each row is cut by itself, beside its images and never through one, into a part for each rank.
Padding, on either side, is left out first. So an image's tokens are on the rank that encodes it.

Shapes: ``B`` samples, ``S`` tokens of a row, ``T`` of the decoder's text, ``P`` visual tokens of an
image, ``N`` images of all samples, ``n_r`` tokens of the longest part on rank r: others are padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.cuts import span, split
from ds_lvx.models.samples import images_at_hand
from ds_lvx.models.text import IGNORED_LABEL, ITEMS_KEY, TEXT_KEYS, Here, Text
from ds_lvx.models.visual import COUNTS, PIXELS, Visual
from ds_lvx.models.words import check_tokens

DECODER = "decoder_"
KEYS = (PIXELS, COUNTS, "token_type_ids", *(f"{DECODER}{key}" for key in TEXT_KEYS[:3]))
"""``token_type_ids`` come from the processor and say nothing that the model reads."""
PLACES = "image_places"
"""Where this rank's visual tokens go in its part of the rows, ``[B * n_r]``: int64 ``[images P]``.
"""
FULL, SLIDING = "full_attention", "sliding_attention"
_PADS = -1


class Answer(Text):
    """The decoder's text. Its labels are those of its own tokens: nothing is shifted any more."""

    prefix = DECODER
    unlearnt = 0

    def lengths(self, size: int) -> tuple[int, ...]:
        """Tokens by rank: some have none where an answer has fewer than there are ranks."""
        super().lengths(1)
        return split(self.shape[1], size)

    def shard(self, here: Here) -> dict[str, Any]:
        """The model's arguments for the shard ``here``, with its positions in the whole."""
        positions = self.position_ids
        if positions is None:
            positions = torch.arange(self.shape[1], device=self.input_ids.device)[None]
        shard: dict[str, Any] = {
            f"{DECODER}input_ids": self.input_ids[:, here],
            f"{DECODER}position_ids": positions[:, here],
        }
        if self.labels is not None:
            shard["labels"] = self.labels[:, here].contiguous()
            shard[ITEMS_KEY] = self.divisor
        return shard


def answer(batch: Mapping[str, Any], model: Any) -> Answer:
    """The decoder's text: as given, or the labels of the whole batch, a token later.

    Raises:
        ValueError: neither is there, or their shapes differ.
    """
    first = f"{DECODER}input_ids"
    labels = batch.get("labels")
    if first not in batch and not (isinstance(labels, Tensor) and labels.ndim == 2):
        raise ValueError(
            f"got neither labels [batch, seqlen] nor {first}; expected one of them: what the "
            "decoder is to say"
        )
    given = dict(batch)
    if first not in batch:
        given[first] = _shifted(given["labels"], model.config.decoder)
    return Answer.of(given)


def _shifted(labels: Tensor, config: Any) -> Tensor:
    """Labels a token later, as the model's ``prepare_decoder_input_ids_from_labels`` has them."""
    ids = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=int(config.bos_token_id))
    return ids.masked_fill(ids == IGNORED_LABEL, int(config.pad_token_id))


@dataclass(frozen=True, eq=False)
class Cut:
    """Who holds what of the encoder's rows.

    Attributes:
        column: int64 ``[B, n_0 + n_1 + ...]``, of every token of every rank, ranks in order: its
            place in its row, or -1 where a part is padded.
        lengths: ``n_r`` of every rank.
        held: int64 ``[ranks, B]``, images of a sample on a rank.
    """

    column: Tensor
    lengths: tuple[int, ...]
    held: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Tensor, Tensor]], ranks: int, *, unit: int, held: Tensor | None
    ) -> Cut:
        """Cut rows into parts of about as many tokens.

        Args:
            rows: of each sample the places of its tokens, int64, and which are visual, bool.
            ranks: parts of a row.
            unit: P.
            held: int64 ``[ranks, B]`` where the images are on their ranks already.
        """
        parts = [
            _cut(visual, ranks, unit, None if held is None else held[:, sample].tolist())
            for sample, (_, visual) in enumerate(rows)
        ]
        ends = torch.tensor([end for end, _ in parts])
        most = ends.diff(dim=1).amax(dim=0)
        column = torch.full((len(rows), int(most.sum())), _PADS)
        firsts = (most.cumsum(0) - most).tolist()
        for sample, (places, _) in enumerate(rows):
            pieces = places.split(ends[sample].diff().tolist())
            for first, piece in zip(firsts, pieces, strict=True):
                column[sample, first : first + len(piece)] = piece
        images = torch.tensor([before for _, before in parts]).diff(dim=1).T
        return cls(column, tuple(most.tolist()), images)


def _cut(
    visual: Tensor, ranks: int, unit: int, held: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Where the parts of a row begin and end, in tokens and in images; ``ranks + 1`` numbers each.

    Args:
        visual: bool, the row's tokens that are visual.
        ranks: parts of it.
        unit: P.
        held: images of each part; None: as balances best.
    """
    length = len(visual)
    places = visual.nonzero()[:, 0]
    images = places.view(len(places) // unit, unit)
    # Before each image, and behind the last, is a gap in which a row can be cut.
    low = torch.cat((torch.zeros(1, dtype=torch.int64), images[:, -1] + 1))
    high = torch.cat((images[:, 0], torch.tensor([length])))
    ends, before = [0], [0]
    for part in range(1, ranks):
        wanted = torch.tensor(length * part // ranks)
        nearest = torch.minimum(torch.maximum(wanted, low), high)
        gap = int((nearest - wanted).abs().argmin()) if held is None else sum(held[:part])
        ends.append(int(nearest[gap]))
        before.append(gap)
    return [*ends, length], [*before, len(images)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows(Visual):
    """The encoder's rows, their images, and who holds which.

    Attributes:
        rows: the encoder's text, on the CPU.
        visual: bool ``[B, S]``, tokens that stand for images.
        here: int64 ``[B]``, images of each sample whose pixels are at hand.
        queries: T.
        windows: of the sliding layers of encoder and decoder; None: all layers see everything.
        dealt: who holds what; None as long as that is not known.
    """

    rows: Text
    visual: Tensor
    here: Tensor
    queries: int
    windows: tuple[int | None, int | None]
    dealt: Cut | None = None

    def part(self, rank: int, size: int) -> Rows:
        """This rank's images, of pixels that are those of all."""
        self._check(self.here)
        dealt = self._deal(size)
        ranks = torch.arange(size).repeat(len(self.here))
        holder = ranks.repeat_interleave(dealt.held.T.flatten())
        mine = {key: value[holder == rank] for key, value in self.arguments.items()}
        return replace(self, dealt=dealt, arguments=mine)

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        return {**super().shared_record(), "contents of the encoder's rows": self.rows.digest()}

    def record(self) -> dict[str, Any]:
        """What the other ranks must hear of: how many images are here, where they do not know."""
        alone = {} if self.dealt is not None else {COUNTS: self.here.tolist()}
        return {**super().record(), **alone}

    def settled(self, records: Sequence[Mapping[str, Any]]) -> Rows:
        """With the cut, where images are on their ranks: those of a sample in order."""
        if self.dealt is not None:
            return self
        held = torch.tensor([record[COUNTS] for record in records])
        self._check(held.sum(dim=0))
        return replace(self, dealt=self._deal(len(records), held))

    def shares(self, parts: int) -> tuple[int, ...]:
        """Images by rank."""
        return tuple(self._settled.held.sum(dim=1).tolist())

    def lengths(self, shares: Sequence[int] = ()) -> tuple[int, ...]:
        """Tokens of a row by rank, ``n_r``."""
        return self._settled.lengths

    def rule(self, valid: Tensor) -> Visibility:
        """Of the decoder's text over the encoder's rows: all but padding."""
        keys = torch.where(self._keys() == EVERYTHING, EVERYTHING, 0).to(torch.int32)
        start = torch.zeros(len(keys), self.queries, dtype=torch.int32)
        return Visibility(start, start + 1, keys)

    def layouts(
        self, text: Text, *, channel: Channel, lengths: tuple[int, ...], device: torch.device
    ) -> Mapping[str, Layout]:
        """Of the encoder's rows over themselves, and of the decoder's text in a window."""
        of_rows, of_text = self.windows
        own = self.lengths()
        rules = {f"encoder {FULL}": (own, self._seen(None))}
        if of_rows is not None:
            rules[f"encoder {SLIDING}"] = own, self._seen(of_rows)
        # In generation every rank has all of the decoder's text, and its keys are cached.
        if of_text is not None and sum(lengths) == text.shape[1]:
            causal = text.by_rank(text.visibility(), keys=True)
            assert causal is not None, "the decoder's text is cut"
            rules[SLIDING] = lengths, _recent(causal, of_text)
        return {
            name: Layout.of_batch(channel, each, each, rule, device=device)
            for name, (each, rule) in rules.items()
        }

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """This rank's part of the rows, and where its images go in it."""
        column = self._settled.column[:, span(self.lengths(), rank)]
        pads, at = column == _PADS, column.clamp(min=0)
        positions = self.rows.position_ids
        if positions is None:
            positions = torch.arange(self.rows.shape[1])[None]
        visual = self.visual.gather(1, at) & ~pads
        return {
            "input_ids": self.rows.input_ids.gather(1, at).masked_fill(pads, 0),
            "position_ids": positions.expand(self.rows.shape).gather(1, at),
            PLACES: visual.flatten().nonzero()[:, 0],
        }

    @property
    def _settled(self) -> Cut:
        assert self.dealt is not None, "part() or settled() comes first"
        return self.dealt

    def _deal(self, ranks: int, held: Tensor | None = None) -> Cut:
        mask = self.rows.attention_mask
        there = torch.ones_like(self.visual) if mask is None else (mask != 0) | self.visual
        places = [row.nonzero()[:, 0] for row in there]
        rows = [(each, row[each]) for each, row in zip(places, self.visual, strict=True)]
        return Cut.of(rows, ranks, unit=self.unit_tokens, held=held)

    def _keys(self) -> Tensor:
        """int32, the place of every token in its row; beyond everything where nobody sees it."""
        column = self._settled.column
        hidden = column == _PADS
        if self.rows.attention_mask is not None:
            hidden |= self.rows.attention_mask.gather(1, column.clamp(min=0)) == 0
        return column.masked_fill(hidden, EVERYTHING).to(torch.int32)

    def _seen(self, window: int | None) -> Visibility:
        """Of the rows over themselves: all, or a window around each token.

        Source: transformers, ``t5gemma2.sliding_window_mask_function`` with ``is_causal=False``.
        """
        column = self._settled.column.to(torch.int32)
        if window is None:
            start, end = torch.zeros_like(column), torch.full_like(column, EVERYTHING)
        else:
            start, end = column - (window + 1) // 2 + 1, column + window // 2 + 1
        pads = column == _PADS
        return Visibility(start.masked_fill(pads, 0), end.masked_fill(pads, 0), self._keys())

    def _check(self, found: Tensor) -> None:
        """Compare images by sample, int64 ``[B]``, with the image tokens of the rows."""
        counts = self.visual.sum(dim=1) // self.unit_tokens
        if not torch.equal(found, counts):
            raise ValueError(
                f"got {PIXELS} of {found.tolist()} images by sample, and image tokens of "
                f"{counts.tolist()}; expected {self.unit_tokens} tokens for each image: pass the "
                'images of all ranks, or frames="local" and on all ranks together all'
            )


def _recent(rule: Visibility, window: int) -> Visibility:
    """Causal attention to the last ``window`` tokens, as transformers' sliding mask has it."""
    return replace(rule, q_start=torch.maximum(rule.q_start, rule.q_end - window))


def encoder_layout(batch: ShardedBatch, layer_type: str) -> Layout:
    """Of the encoder's rows over themselves, in a layer of a type."""
    return batch.others[f"encoder {layer_type}"]


def decoder_layout(batch: ShardedBatch, layer_type: str) -> Layout:
    """Of the decoder's text over itself, in a layer of a type."""
    return batch.others[layer_type] if layer_type == SLIDING else batch.text


def visual(batch: Mapping[str, Any], text: Text, model: Any) -> Rows:
    """The encoder's side of a batch, as Gemma 3's processor has it.

    Raises:
        ValueError: rows, pixels and decoder's text that do not fit each other or the model.
    """
    encoder = model.config.encoder
    rows = Text.of({key: batch.get(key) for key in TEXT_KEYS[:3]}).each(lambda t: t.cpu())
    if isinstance(model, nn.Module):
        inside: Any = model.model
        check_tokens(rows.input_ids, inside.encoder)
    if rows.shape[0] != text.shape[0]:
        raise ValueError(
            f"got input_ids of {rows.shape[0]} samples and {text.shape[0]} for the decoder; "
            "expected as many"
        )
    visual, unit = rows.input_ids == encoder.image_token_id, image_tokens(model.config)
    tokens = visual.sum(dim=1)
    if bool((tokens % unit).any()):
        raise ValueError(
            f"got {tokens.tolist()} image tokens by sample; expected multiples of {unit}, the "
            "visual tokens of an image: use the processor that belongs to the model"
        )
    count = _check_pixels(batch.get(PIXELS), encoder.vision_config)
    return Rows(
        count=count,
        unit_tokens=unit,
        arguments={PIXELS: batch[PIXELS]} if PIXELS in batch else {},
        has_more=True,
        rows=rows,
        visual=visual,
        here=images_at_hand(batch.get(COUNTS), count, tokens // unit),
        queries=text.shape[1],
        windows=(_window(encoder.text_config), _window(model.config.decoder)),
    )


def _window(config: Any) -> int | None:
    return int(config.sliding_window) if SLIDING in config.layer_types else None


def _check_pixels(pixels: Any, vision: Any) -> int:
    """How many images there are."""
    if pixels is None:
        return 0
    found: Any = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    side, images = vision.image_size, found[0] if isinstance(found, tuple) and found else 0
    expected = (images, vision.num_channels, side, side)
    if found != expected:
        raise ValueError(
            f"got {PIXELS} {found}; expected {('images', *expected[1:])}, all samples' one after "
            "the other: use the processor that belongs to the model"
        )
    return int(images)


def image_tokens(config: Any) -> int:
    """Visual tokens of an image."""
    return int(config.encoder.mm_tokens_per_image)


def blank(config: Any) -> dict[str, Tensor]:
    """One blank image."""
    vision = config.encoder.vision_config
    return {PIXELS: torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)}
