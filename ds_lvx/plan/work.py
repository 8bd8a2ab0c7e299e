"""The sizes of an attention call, and how long a rank takes over its pieces."""

from __future__ import annotations

from ds_lvx.attention.shape import AttentionShape, head_groups
from ds_lvx.plan.cluster import Cluster, KernelTime
from ds_lvx.plan.transfers import Ranks

FP32_BYTES = 4

# Bytes that elementwise operations read and write for a number, and how many operations these are:
# counted in ds_lvx/attention/wire.py, kernels/merge.py and attention/common.py.
ENCODE = (30, 8)
DECODE = (14, 2)
MERGE = (28, 8)
MERGE_STACKED = (12, 7)
SUM_STACKED = (4, 1)
DELTA = (12, 4)
ADD_FP32 = (12, 1)
ADD_16_TO_FP32 = (10, 1)
CAST = (6, 1)
COPY = (4, 1)


class Work:
    """The sizes of a call, and how long a rank takes over its pieces."""

    def __init__(self, shape: AttentionShape, cluster: Cluster) -> None:
        self.shape = shape
        self.device = cluster.device
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
            q_bytes=int(self.sent(self.rows(self.most_queries))),
            on_cpu=self.device.on_cpu,
        )
        return tuple(size / self.shape.kv_heads for size in sizes)

    # ---- numbers and bytes

    def rows(self, queries: float) -> float:
        """Numbers of q."""
        return self.shape.batch * queries * self.shape.heads * self.shape.head_dim

    def numbers(self, keys: float) -> float:
        """Numbers of K."""
        return self.shape.batch * keys * self.shape.kv_heads * self.shape.head_dim

    def statistics(self, queries: float) -> float:
        """Bytes of lse, or of delta."""
        return self.shape.batch * queries * self.shape.heads * FP32_BYTES

    def ranges(self, queries: float) -> float:
        """Bytes of the visibility of queries."""
        return 8 * self.shape.batch * queries if self.shape.visibility else 0

    def positions(self, keys: float) -> float:
        """Bytes of the visibility of keys."""
        return 4 * self.shape.batch * keys if self.shape.visibility else 0

    def sent(self, numbers: float) -> float:
        """Bytes of so many numbers of q, k or v."""
        return numbers * self.shape.element_bytes

    # ---- seconds

    def attend(
        self, kernel: KernelTime, queries: float, keys: float, *, share: float = 1.0
    ) -> float:
        """A kernel on so many queries and keys, for a share of the heads."""
        return kernel.seconds(
            queries,
            keys,
            width=self.rows(1) * share,
            kv_width=self.numbers(1) * share,
            scale=self._scale,
        )

    def touch(self, numbers: float, *kinds: tuple[int, int]) -> float:
        """Elementwise operations on so many numbers."""
        nbytes = sum(each for each, _ in kinds)
        operations = sum(count for _, count in kinds)
        device = self.device
        return operations * device.operation_s + numbers * nbytes / device.stream_bytes_per_s

    def projection(self, keys: float, *, backward: bool = False) -> float:
        """Projecting K and V of so many features; in backward also their gradients' products."""
        products = 1
        if backward:
            products = 2 if self.shape.features_train else 1
        operations = 4 * products * self.shape.features_dim * self.numbers(keys)
        return self._scale * operations / self.device.matmul_flops
