"""Layers that carry a state along the text: what a rank computes, sends and keeps.

The tokens of all heads become all tokens of some, and what these give goes home
(`ds_lvx.attention.recurrent`). Counted is Gated DeltaNet by chunks of 64 tokens, in fp32, as
transformers has it in PyTorch; docs/planning.md has the formulas.

Legend: K heads of keys, of Dk numbers, V of values, of Dv; n ranks, e bytes an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_lvx.attention.shape import AttentionShape, recurrent_groups
from ds_lvx.models.dimensions import RecurrentLayers
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import Cost
from ds_lvx.plan.pieces import FP32_BYTES, Pieces

_CHUNK = 64
_SMALL_NUMBERS = 8.5 + 1 / _CHUNK
"""Of a token and head of values that the rule keeps, in fp32: decays, betas, factors of norms."""


def spread(layers: RecurrentLayers, ranks: int) -> RecurrentLayers:
    """The layers as ranks run them: heads of keys are repeated where ranks would have unlike work,
    and some run a group of heads that others have, too."""
    copies, values = recurrent_groups(layers.kv_heads, layers.heads, ranks)
    groups = -(-layers.kv_heads * copies // ranks) * ranks
    return replace(layers, kv_heads=groups, heads=groups * values)


def sent_numbers(layers: RecurrentLayers) -> tuple[int, int]:
    """Numbers of a token that come to its heads, with decay and beta, and that go home."""
    return layers.channels + 2 * layers.heads, layers.values


def cost(
    layers: RecurrentLayers, cluster: Cluster, lengths: Sequence[int], *, element_bytes: int
) -> Cost:
    """Predict a layer without its products with weights: the rule, and what travels around it.

    Args:
        layers: whose layer it is.
        cluster: the ranks are adjacent.
        lengths: tokens of each rank.
        element_bytes: e.
    """
    wide = spread(layers, len(lengths))
    shape = AttentionShape(
        1, tuple(lengths), tuple(lengths), wide.heads, wide.kv_heads, wide.head_dim, element_bytes
    )
    passes = []
    for backward in (False, True):
        pieces = Pieces(shape, cluster, backward=backward)
        arriving, leaving = sent_numbers(wide)[:: -1 if backward else 1]
        _travel(pieces, arriving)
        pieces.timeline.compute(_rule_s(wide, pieces) * (1 + backward), "kernel")
        _travel(pieces, leaving)
        passes.append(pieces.timeline.result())
    return Cost(*passes)


def _travel(pieces: Pieces, numbers: int) -> None:
    """An all-to-all of so many numbers a token."""
    if pieces.n == 1:
        return
    mine = pieces.most_queries * numbers
    pieces.touch(mine, "around an all-to-all")
    pieces.send(pieces.ranks.exchange(mine * pieces.shape.element_bytes / pieces.n))


def _rule_s(wide: RecurrentLayers, pieces: Pieces) -> float:
    """A forward of a rank's heads over all tokens: its products, and writing what is kept."""
    tokens, device = pieces.queries * wide.heads / pieces.n, pieces.device
    computing = rule_operations(wide) / device.matmul_flops
    return tokens * (computing + _rule_bytes(wide) / device.stream_bytes_per_s)


def rule_operations(layers: RecurrentLayers) -> int:
    """Of a token and head of values, in forward: in its chunk ``K K^T`` and ``Q K^T``, triangular
    solutions for K and V, and the pairs' V; keys, queries and new values with the state."""
    keys, values = layers.key_dim, layers.head_dim
    return 2 * (_CHUNK * (3 * keys + 2 * values) + 3 * keys * values)


def _rule_bytes(layers: RecurrentLayers) -> float:
    """Kept of a token and head of values, in fp32: 8 tensors of keys and queries, 3 of values, 5 of
    a chunk's pairs, and the state before each chunk."""
    keys, values = layers.key_dim, layers.head_dim
    numbers = 8 * keys + 3 * values + 5 * _CHUNK + keys * values / _CHUNK + _SMALL_NUMBERS
    return FP32_BYTES * numbers


def kept_bytes(layers: RecurrentLayers, *, ranks: int, element_bytes: int) -> float:
    """Of a token, by a layer that is not checkpointed, beside what its MLP keeps: its input, what
    goes into the convolution and comes out, the rule, and the gated norm behind it."""
    wide = spread(layers, ranks)
    numbers = layers.hidden + 2 * wide.channels + 3 * layers.values
    norm = FP32_BYTES * (3 * layers.values + layers.heads)
    return element_bytes * numbers + norm + wide.heads * _rule_bytes(wide)


def checkpointed_bytes(layers: RecurrentLayers, *, ranks: int, element_bytes: int) -> int:
    """Of a token, by a checkpointed layer: its input, and what came by all-to-alls, which must not
    be sent again."""
    arrived = sum(sent_numbers(spread(layers, ranks))) if ranks > 1 else 0
    return element_bytes * (layers.hidden + arrived)


def state_bytes(layers: RecurrentLayers, *, element_bytes: int) -> int:
    """Of a row, behind the text: the last tokens' channels, and the state in fp32."""
    memory = layers.heads * layers.key_dim * layers.head_dim
    return element_bytes * layers.channels * layers.kernel + FP32_BYTES * memory
