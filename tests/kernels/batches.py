"""Batches as models and methods make them, by name: who sees what, and which calls cover it.

A call is written ``queries x keys``; ``causal`` where query i of it sees keys 0 to i, ``all keys``
where it reads keys as they lie although others gather theirs, ``of samples`` where there are
several. Those ``in one launch`` are one call together. What a call counts is gathered where a line
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx import Visibility
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.zigzag import dealt as zigzag
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.cover import Cover
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import EVERYTHING
from ds_lvx.models.concatenated.deal import PADS, TEXT, Deal

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """A rule and the calls that cover it; no calls: none does within the bound."""

    sees: Visibility
    calls: list[str] | None


def rows(*samples: tuple[Tensor, Tensor, Tensor]) -> Visibility:
    """A rule of ``(q_start, q_end, kv_pos)`` of each sample."""
    return Visibility(*(torch.stack(parts).int() for parts in zip(*samples, strict=True)))


def tiles(frames: int, *, of: int, valid: int, patches: int = 10) -> Tensor:
    """Positions of frames of ``of`` tiles, of which the first ``valid`` are no padding."""
    position = torch.full((frames, of), -1)
    position[:, :valid] = torch.arange(frames)[:, None]
    return position.flatten().repeat_interleave(patches)


def text(length: int, *, documents: int = 1, padding: slice | None = None) -> Visibility:
    """Causal text, packed documents of equal length, some keys dropped."""
    index = torch.arange(length)
    size = length // documents
    keys = index.clone()
    if padding is not None:
        keys[padding] = -1
    return rows((index // size * size, index + 1, keys))


def branches(prompt: int, *said: int) -> Visibility:
    """Causal texts that begin with the same prompt, one behind the other."""
    first, length = prompt, prompt + sum(said)
    index = torch.arange(length)
    gap_start, gap_end = torch.zeros_like(index), torch.zeros_like(index)
    for each in said:
        gap_start[first : first + each], gap_end[first : first + each] = prompt, first
        first += each
    parts = (torch.zeros_like(index), index + 1, index, gap_start, gap_end)
    return Visibility(*(part.int()[None] for part in parts))


def see_all(start: Tensor, end: Tensor, which: slice) -> tuple[Tensor, Tensor]:
    """The same ranges, but some queries see every key, padding too."""
    start, end = start.clone(), end.clone()
    start[which], end[which] = -1, EVERYTHING
    return start, end


def prefix(queries: int, frames: int) -> tuple[Tensor, Tensor]:
    """Every query sees frames 0 to its own."""
    return torch.zeros(queries, dtype=torch.int64), torch.arange(queries) * frames // queries + 1


def own(queries: int, frames: int) -> tuple[Tensor, Tensor]:
    """Every query sees its own frame."""
    frame = torch.arange(queries) * frames // queries
    return frame, frame + 1


def pictures(length: int, *images: slice, window: int | None = None) -> Visibility:
    """Causal text, in which the tokens of an image see each other, whole or in a window."""
    index = torch.arange(length)
    end = index + 1
    for image in images:
        end[image] = image.stop
    start = index * 0 if window is None else (index - window + 1).clamp(min=0)
    return rows((start, end, index))


def ring(sees: Visibility, lengths: tuple[int, ...], queries: int, keys: int) -> Visibility:
    """One rank's queries over the keys of one rank, as ring attention asks."""
    layout = Layout(Channel(None), lengths, lengths, Rule(sees), device=CPU)
    rule = layout.rule(queries=queries, keys=keys)
    if rule is None:
        return Visibility.all(len(sees.kv_pos), lengths[queries], lengths[keys], device=CPU)
    return rule.visibility


def ulysses(sees: Visibility, lengths: tuple[int, ...]) -> Visibility:
    """All queries over all keys, as Ulysses asks."""
    layout = Layout(Channel(None), lengths, lengths, Rule(sees), device=CPU)
    rule = layout.arrival(len(sees.kv_pos)).rule
    assert rule is not None
    return rule.visibility


def dealt(sees: Visibility, held: Sequence[Tensor]) -> Visibility:
    """The same as Ulysses asks of ranks that hold these rows of it."""
    order = torch.cat(list(held))
    return ulysses(sees.part(order, order), tuple(map(len, held)))


def among(frames: int, *, of: int, length: int, ranks: int) -> list[Tensor]:
    """Who holds which rows of a text with visual tokens in its midst."""
    number = torch.full((1, length), TEXT)
    number[0, 3 : 3 + frames * of] = torch.arange(frames).repeat_interleave(of)
    deal = Deal.of(torch.ones_like(number, dtype=torch.bool), number, [of] * frames, ranks)
    parts = deal.column[0].split(list(deal.lengths))
    return [part[part != PADS] for part in parts]


def shuffled(sees: Visibility) -> Visibility:
    """The same with keys in another order."""
    order = torch.randperm(sees.kv_pos.shape[1], generator=torch.Generator().manual_seed(0))
    return Visibility(sees.q_start, sees.q_end, sees.kv_pos[:, order])


def joined(one: Visibility, other: Visibility) -> Visibility:
    """Both as samples of one batch."""
    names = ("q_start", "q_end", "kv_pos")
    return Visibility(*(torch.cat((getattr(one, n), getattr(other, n))) for n in names))


_SIX = torch.arange(6)
_TURNS = torch.tensor([0, 2, 4, 1, 3, 5])
_ALL_FRAMES = (torch.zeros(9, dtype=torch.int64), torch.full((9,), 5))
_BLIND = own(20, 4)[1].masked_fill(torch.arange(20) % 7 == 3, 0)


def calls_of(cover: Cover) -> list[str]:
    """A cover in words."""
    found = []
    for name, order in (("queries", cover.queries), ("keys", cover.keys)):
        if order is not None:
            found.append(f"gather {order.places.shape[1]} {name}")
    if cover.sequences is not None:
        found.append("in one launch")
    for each in cover.rectangles:
        batch, queries, keys = (
            f"{s.start}:{s.stop}" for s in (each.batch, each.queries, each.keys)
        )
        line = f"{queries} x {keys}"
        line += " causal" * each.causal + " all keys" * (each in cover.whole)
        found.append(line + (f" of samples {batch}" if cover.shape[0] > 1 else ""))
    return found


BATCHES: dict[str, Batch] = {
    "all visible": Batch(Visibility.all(2, 5, 12, device=CPU), ["0:5 x 0:12 of samples 0:2"]),
    "mllama, one video": Batch(rows((*_ALL_FRAMES, tiles(5, of=4, valid=4))), ["0:9 x 0:200"]),
    "mllama, one video, padding tiles": Batch(
        rows((*_ALL_FRAMES, tiles(5, of=4, valid=1))), ["gather 50 keys", "0:9 x 0:50"]
    ),
    "two videos, padding tiles": Batch(
        joined(
            rows((*_ALL_FRAMES, tiles(5, of=4, valid=1))),
            rows((*_ALL_FRAMES, tiles(5, of=4, valid=3))),
        ),
        ["gather 150 keys", "0:9 x 0:50 of samples 0:1", "0:9 x 0:150 of samples 1:2"],
    ),
    "text before the first image": Batch(
        rows((*see_all(*_ALL_FRAMES, slice(0, 2)), tiles(5, of=4, valid=1, patches=400))),
        ["gather 2000 keys", "2:9 x 0:2000", "0:2 x 0:8000 all keys"],
    ),
    "text between images that sees all": Batch(
        rows((*see_all(*own(20, 4), slice(10, 12)), tiles(4, of=2, valid=2))),
        ["0:5 x 0:20", "5:10 x 20:40", "10:12 x 0:80", "12:15 x 40:60", "15:20 x 60:80"],
    ),
    "interleaved": Batch(
        rows((*own(20, 4), tiles(4, of=1, valid=1))),
        ["in one launch", "0:5 x 0:10", "5:10 x 10:20", "10:15 x 20:30", "15:20 x 30:40"],
    ),
    "interleaved, text that sees nothing": Batch(
        rows((own(20, 4)[0], _BLIND, tiles(4, of=2, valid=2, patches=100))),
        [
            "gather 17 queries",
            "in one launch",
            "0:4 x 0:200",
            "4:9 x 200:400",
            "9:13 x 400:600",
            "13:17 x 600:800",
        ],
    ),
    "prefix of frames": Batch(
        rows((*prefix(12, 4), tiles(4, of=1, valid=1, patches=300))),
        ["0:12 x 0:300", "3:12 x 300:600", "6:12 x 600:900", "9:12 x 900:1200"],
    ),
    "prefix of frames, padding tiles": Batch(
        rows((*see_all(*prefix(12, 4), slice(0, 1)), tiles(4, of=3, valid=1, patches=100))),
        [
            "1:12 x 0:100",
            "3:12 x 300:400",
            "6:12 x 600:700",
            "9:12 x 900:1000",
            "0:1 x 0:1200 all keys",
        ],
    ),
    "prefix of frames, many queries": Batch(
        rows((*prefix(400, 4), tiles(4, of=1, valid=1, patches=2))),
        ["0:100 x 0:2", "100:200 x 0:4", "200:300 x 0:6", "300:400 x 0:8"],
    ),
    "a frame that nobody sees": Batch(
        rows((torch.tensor([0, 0, 2, 2]), torch.tensor([1, 1, 4, 4]), tiles(4, of=1, valid=1))),
        ["0:2 x 0:10", "2:4 x 20:40"],
    ),
    "ragged shard: parts of three frames": Batch(
        rows((*prefix(12, 4), tiles(4, of=1, valid=1)[7:23])),
        ["0:3 x 0:3", "3:6 x 0:13", "6:12 x 0:16"],
    ),
    "few queries": Batch(
        rows((*prefix(2, 2), tiles(2, of=2, valid=1, patches=50))), ["0:2 x 0:50", "1:2 x 100:150"]
    ),
    "decoding one query": Batch(
        rows((torch.tensor([0]), torch.tensor([31]), torch.arange(40))), ["0:1 x 0:31"]
    ),
    "text only": Batch(text(24), ["0:24 x 0:24 causal"]),
    "text, right padding": Batch(
        text(24, padding=slice(20, 24)), ["0:20 x 0:20 causal", "20:24 x 0:20"]
    ),
    "text, left padding": Batch(text(24, padding=slice(0, 5)), ["5:24 x 5:24 causal"]),
    "text, one sample padded": Batch(
        joined(text(24), text(24, padding=slice(0, 5))),
        ["0:24 x 0:24 causal of samples 0:1", "5:24 x 5:24 causal of samples 1:2"],
    ),
    "packed": Batch(
        text(24, documents=3),
        ["in one launch", "0:8 x 0:8 causal", "8:16 x 8:16 causal", "16:24 x 16:24 causal"],
    ),
    "packed, many documents": Batch(
        text(80, documents=40),
        ["in one launch", *(f"{n}:{n + 2} x {n}:{n + 2} causal" for n in range(0, 80, 2))],
    ),
    "packed, too many documents": Batch(text(600, documents=300), None),
    "text in the order of a shuffle": Batch(
        shuffled(text(24)), ["gather 24 keys", "0:24 x 0:24 causal"]
    ),
    "text whose queries and keys lie in turns": Batch(
        rows((_SIX * 0, _TURNS + 1, _TURNS)),
        ["gather 6 queries", "gather 6 keys", "0:6 x 0:6 causal"],
    ),
    "queries in turns over two frames": Batch(
        rows((_SIX % 2, _SIX % 2 + 1, tiles(2, of=1, valid=1))),
        ["gather 6 queries", "in one launch", "0:3 x 0:10", "3:6 x 10:20"],
    ),
    "ring, text, own keys of rank 2": Batch(ring(text(24), (9, 8, 7), 2, 2), ["0:7 x 0:7 causal"]),
    "ring, text, keys of an earlier rank": Batch(ring(text(24), (9, 8, 7), 2, 0), ["0:7 x 0:9"]),
    "ring, text, keys of a later rank": Batch(ring(text(24), (9, 8, 7), 0, 1), []),
    "ring, packed, over the seam": Batch(
        ring(text(24, documents=2), (9, 8, 7), 1, 1),
        ["in one launch", "0:3 x 0:3 causal", "3:8 x 3:8 causal"],
    ),
    "ulysses, text, ragged": Batch(ulysses(text(24), (9, 8, 7)), ["0:24 x 0:24 causal"]),
    "ulysses, packed, ragged": Batch(
        ulysses(text(24, documents=2), (9, 8, 7)),
        ["in one launch", "0:12 x 0:12 causal", "12:24 x 12:24 causal"],
    ),
    "ulysses, text, zigzag": Batch(dealt(text(23), zigzag(23, 3)), ["0:23 x 0:23 causal"]),
    "ulysses, packed, zigzag": Batch(
        dealt(text(24, documents=2), zigzag(24, 4)),
        ["in one launch", "0:12 x 0:12 causal", "12:24 x 12:24 causal"],
    ),
    "ulysses, frames among the text": Batch(
        dealt(text(40), among(5, of=4, length=40, ranks=3)), ["0:40 x 0:40 causal"]
    ),
    "completions of a prompt": Batch(
        branches(16, 4, 4, 2),
        ["0:20 x 0:20 causal", "20:24 x 20:24 causal", "20:26 x 0:16", "24:26 x 24:26 causal"],
    ),
    "ring, completions, keys of their prompt": Batch(
        ring(branches(16, 4, 4, 2), (16, 10), 1, 0), ["0:10 x 0:16"]
    ),
    "ulysses, completions of a prompt with frames": Batch(
        dealt(branches(30, 4, 4, 2), among(5, of=4, length=40, ranks=3)),
        ["0:34 x 0:34 causal", "34:38 x 34:38 causal", "34:40 x 0:30", "38:40 x 38:40 causal"],
    ),
    "queries without keys": Batch(rows((_SIX, _SIX + 1, _SIX[:0])), []),
    "keys without queries": Batch(rows((_SIX[:0], _SIX[:0], _SIX)), []),
    "nobody sees anything": Batch(rows((_SIX + 9, _SIX + 10, _SIX)), []),
    "images in a text that see themselves": Batch(
        pictures(24, slice(4, 8), slice(12, 16)),
        [
            "0:4 x 0:4 causal",
            "4:24 x 0:8",
            "8:12 x 8:12 causal",
            "12:24 x 8:16",
            "16:24 x 16:24 causal",
        ],
    ),
    "images that see themselves in a window": Batch(
        pictures(24, slice(4, 8), slice(12, 16), window=6), None
    ),
    "a window that slides": Batch(
        rows((torch.arange(40) - 3, torch.arange(40) + 1, torch.arange(40))), None
    ),
}
