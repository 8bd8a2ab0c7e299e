"""The pieces of an attention call: their sizes, and how long a rank takes over each."""

from __future__ import annotations

from ds_lvx.attention.shape import AttentionShape, head_groups
from ds_lvx.plan.cluster import Cluster, KernelTime
from ds_lvx.plan.messages import Messages
from ds_lvx.plan.transfers import Ranks, Timeline

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
    """Of one pass of a call on a cluster.

    Attributes:
        timeline: what the rank spends on the pieces.
        message: bytes of what travels.
        n: ranks.
        queries, keys: of all ranks; ``most_`` of the rank with most, ``mean_`` of a rank.
    """

    def __init__(
        self, shape: AttentionShape, cluster: Cluster, timeline: Timeline | None = None
    ) -> None:
        self.shape, self.device = shape, cluster.device
        self.timeline = Timeline() if timeline is None else timeline
        self.message = Messages(shape)
        self.ranks = Ranks(cluster, shape.ranks)
        self.n = shape.ranks
        self.queries, self.keys = sum(shape.q_lengths), sum(shape.kv_lengths)
        self.most_queries, self.most_keys = max(shape.q_lengths), max(shape.kv_lengths)
        self.mean_queries, self.mean_keys = self.queries / self.n, self.keys / self.n
        self._scale = shape.element_bytes / cluster.device.element_bytes

    @property
    def head_shares(self) -> tuple[float, ...]:
        """Of the gather schedule's groups; what recomputes K and V attends to all heads at once."""
        if self.shape.recompute:
            return (1.0,)
        sizes = head_groups(
            kv_heads=self.shape.kv_heads,
            q_bytes=int(self.message.rows(self.most_queries)),
            on_cpu=self.device.on_cpu,
        )
        return tuple(size / self.shape.kv_heads for size in sizes)

    def of_q(self, queries: float) -> float:
        """Numbers of q."""
        return self.shape.batch * queries * self.shape.heads * self.shape.head_dim

    def of_k_and_v(self, keys: float) -> float:
        """Numbers of K and V together, or of their gradients."""
        return 2 * self.shape.batch * keys * self.shape.kv_heads * self.shape.head_dim

    def attend_s(
        self, kernel: KernelTime, queries: float, keys: float, *, share: float = 1.0
    ) -> float:
        """A kernel on so many queries and keys, for a share of the heads."""
        return kernel.seconds(
            queries,
            keys,
            width=self.of_q(1) * share,
            kv_width=self.of_k_and_v(1) / 2 * share,
            scale=self._scale,
        )

    def touch_s(self, numbers: float, *kinds: str) -> float:
        """Elementwise operations on so many numbers; their names are those of a table above."""
        nbytes = sum(_TOUCHES[kind][0] for kind in kinds)
        operations = sum(_TOUCHES[kind][1] for kind in kinds)
        device = self.device
        return operations * device.operation_s + numbers * nbytes / device.stream_bytes_per_s

    def project_s(self, keys: float, *, backward: bool = False) -> float:
        """Projecting K and V of so many features; in backward also their gradients' products."""
        products = 2 if backward and self.shape.features_train else 1
        operations = 2 * products * self.shape.features_dim * self.of_k_and_v(keys)
        return self._scale * operations / self.device.matmul_flops

    # ---- and on the timeline

    def attend(
        self, kernel: KernelTime, queries: float, keys: float, *, share: float = 1.0
    ) -> None:
        """Spend `attend_s`."""
        self.timeline.compute(self.attend_s(kernel, queries, keys, share=share), "kernel")

    def touch(self, numbers: float, *kinds: str) -> None:
        """Spend `touch_s`."""
        self.timeline.compute(self.touch_s(numbers, *kinds), "other")

    def project(self, *, backward: bool = False) -> None:
        """Spend `project_s` on this rank's keys."""
        self.timeline.compute(self.project_s(self.most_keys, backward=backward), "projection")
