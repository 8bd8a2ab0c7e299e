"""The pieces of a forward or a backward: what travels, and how long a rank takes over the rest.

Legend: B batch, n ranks, s queries and t keys of a rank, H query heads, K key/value heads, D
head_dim, e bytes an element. lse, delta and what is reduced are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ds_lvx.attention.shape import AttentionShape, Hybrid, head_layout
from ds_lvx.distributed.alignment import padded as aligned
from ds_lvx.plan.cluster import Cluster, KernelTime
from ds_lvx.plan.transfers import Ranks, Timeline, Transfer

FP32_BYTES = 4

_TOUCHES = {
    "encode": (30, 8),
    "decode": (14, 2),
    "merge": (28, 8),
    "merge stacked": (12, 7),
    "sum stacked": (4, 1),
    "delta": (12, 4),
    "add fp32": (12, 1),
    "add 16 bits to fp32": (10, 1),
    "add 16 bits": (6, 1),
    "cast": (6, 1),
    "copy": (4, 1),
    "around an all-to-all": (8, 2),
}
"""Bytes that elementwise operations read and write for a number, and how many these are.

Counted in ds_lvx/attention/wire.py, kernels/merge.py and attention/common.py.
"""


class Pieces:
    """Of one pass on a cluster: numbers of tensors, bytes of messages, and what its ``device``
    spends on them, on a ``timeline``.

    ``n`` ranks have ``queries`` and ``keys``; the rank with most has ``most_queries`` and
    ``most_keys``. ``stride`` is as of `Ranks`.
    """

    def __init__(
        self,
        shape: AttentionShape,
        cluster: Cluster,
        *,
        backward: bool,
        timeline: Timeline | None = None,
        stride: int = 1,
    ) -> None:
        self.shape, self.backward = shape, backward
        self.device = cluster.device
        self.timeline = Timeline() if timeline is None else timeline
        self.ranks = Ranks(cluster, shape.ranks, stride)
        self.n = shape.ranks
        self.queries, self.keys = sum(shape.q_lengths), sum(shape.kv_lengths)
        self.most_queries, self.most_keys = max(shape.q_lengths), max(shape.kv_lengths)
        self.mean_queries, self.mean_keys = self.queries / self.n, self.keys / self.n
        device = cluster.device
        self.kernel = device.backward if backward else device.partial  # on a part of the keys
        self.whole = device.backward if backward else device.whole  # on all of them
        self._scale = shape.element_bytes / cluster.device.element_bytes

    # ---- numbers and bytes of so many queries or keys

    def of_q(self, queries: float) -> float:
        """Numbers of q, dout, or what is as large."""
        return self.shape.batch * queries * self.shape.heads * self.shape.head_dim

    def of_k_and_v(self, keys: float) -> float:
        """Numbers of K and V together, or of their gradients."""
        return 2 * self.shape.batch * keys * self.shape.kv_heads * self.shape.head_dim

    def q_bytes(self, queries: float) -> float:
        """q, dout, or what is as large."""
        return self.of_q(queries) * self.shape.element_bytes

    def kv_bytes(self, keys: float) -> float:
        """K and V, or their gradients."""
        return self.of_k_and_v(keys) * self.shape.element_bytes

    def lse_bytes(self, queries: float) -> float:
        """lse, or delta."""
        return self.shape.batch * queries * self.shape.heads * FP32_BYTES

    @property
    def query(self) -> list[float]:
        """Bytes of a query on its way to other ranks' keys: q; in backward q, dout, lse, delta."""
        q, lse = self.q_bytes(1), self.lse_bytes(1)
        return [q, q, lse, lse] if self.backward else [q]

    @property
    def part(self) -> list[float]:
        """Likewise of a result on its way home: lse and out; in backward dq."""
        return [*([] if self.backward else [self.lse_bytes(1)]), self.q_bytes(1)]

    def shares(self, groups: Callable[..., tuple[int, ...]], kv_heads: int) -> tuple[float, ...]:
        """Of some heads, those of each group that a rule of `ds_lvx.attention.shape` makes."""
        q_bytes = int(self.q_bytes(self.most_queries))
        sizes = groups(kv_heads=kv_heads, q_bytes=q_bytes, on_cpu=self.device.on_cpu)
        return tuple(size / kv_heads for size in sizes)

    def beside(self, shape: AttentionShape, *, stride: int = 1) -> Pieces:
        """Those of another call in this pass, on the same timeline."""
        cluster, timeline = self.ranks.cluster, self.timeline
        return Pieces(shape, cluster, backward=self.backward, timeline=timeline, stride=stride)

    # ---- seconds

    def attend_s(
        self, queries: float, keys: float, *, share: float = 1.0, kernel: KernelTime | None = None
    ) -> float:
        """A kernel (`kernel` where none is given) on so many queries and keys, for some heads."""
        return (self.kernel if kernel is None else kernel).seconds(
            queries,
            keys * self.shape.seen,
            width=self.of_q(1) * share,
            kv_width=self.of_k_and_v(1) / 2 * share,
            scale=self._scale,
        )

    def touch_s(self, numbers: float, *kinds: str) -> float:
        """Elementwise operations on so many numbers; their names are those of a table above."""
        nbytes, operations = map(sum, zip(*(_TOUCHES[kind] for kind in kinds), strict=True))
        device = self.device
        return operations * device.operation_s + numbers * nbytes / device.stream_bytes_per_s

    def project_s(self, keys: float, *, gradients: bool = False) -> float:
        """Projecting K and V of so many features, or the products for their gradients."""
        products = self.shape.gradients if gradients else 1
        operations = 2 * products * self.shape.features_dim * self.of_k_and_v(keys)
        return self._scale * operations / self.device.matmul_flops

    # ---- and on the timeline

    def attend(self, queries: float, keys: float, **options: Any) -> None:
        """Spend `attend_s`."""
        self.timeline.compute(self.attend_s(queries, keys, **options), "kernel")

    def touch(self, numbers: float, *kinds: str) -> None:
        """Spend `touch_s`."""
        self.timeline.compute(self.touch_s(numbers, *kinds), "other")

    def project(self, *, gradients: bool = False) -> None:
        """Spend `project_s` on this rank's keys."""
        self.timeline.compute(self.project_s(self.most_keys, gradients=gradients), "projection")

    def send(self, transfer: Transfer) -> None:
        """Post a transfer and wait for it."""
        self.timeline.wait(self.timeline.post(transfer))


def message_bytes(tensors: list[float]) -> int:
    """Bytes of tensors as one message, or of a row of it (`ds_lvx.distributed.bundles`)."""
    return sum(aligned(map(int, tensors)))


def padded(shape: AttentionShape) -> AttentionShape:
    """The call as Ulysses runs it: shards as long as the longest, heads repeated or padded."""
    repeats, padding = head_layout(shape.heads, shape.kv_heads, shape.ranks)
    return replace(
        shape,
        q_lengths=(max(shape.q_lengths),) * shape.ranks,
        kv_lengths=(max(shape.kv_lengths),) * shape.ranks,
        heads=shape.heads + padding * (shape.heads // (shape.kv_heads * repeats)),
        kv_heads=shape.kv_heads * repeats + padding,
    )


def subgroup(shape: AttentionShape, hybrid: Hybrid, number: int) -> AttentionShape:
    """What the ranks of one of a hybrid's subgroups hold."""
    first, last = number * hybrid.ulysses, (number + 1) * hybrid.ulysses
    return replace(
        shape,
        q_lengths=hybrid.longest(shape.q_lengths)[first:last],
        kv_lengths=hybrid.longest(shape.kv_lengths)[first:last],
    )


def across(shape: AttentionShape, hybrid: Hybrid) -> AttentionShape:
    """The call over a hybrid's subgroups, each as one rank with a share of the heads."""
    inside = padded(subgroup(shape, hybrid, 0))
    return replace(
        shape,
        q_lengths=hybrid.together(shape.q_lengths),
        kv_lengths=hybrid.together(shape.kv_lengths),
        heads=inside.heads // hybrid.ulysses,
        kv_heads=inside.kv_heads // hybrid.ulysses,
        features_dim=0,
    )
