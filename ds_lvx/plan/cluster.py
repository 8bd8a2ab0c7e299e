"""A cluster as the planner sees it: what one device computes, and what the links carry.

The numbers come from data sheets (`from_card`) or were measured (`ds_lvx.plan.profile`). Which of
both they are, and what they rest on, stands in `Cluster.source`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any

from ds_lvx.plan.cards import Card
from ds_lvx.plan.units import at_least

# What well-written programs reach of a data sheet; docs/planning.md has the sources.
FORWARD_SHARE = 0.6
BACKWARD_SHARE = 0.5
MATMUL_SHARE = 0.7
MEMORY_SHARE = 0.85
LINK_SHARE = 0.8

PCIE_BYTES_PER_S = 32e9
"""PCIe 4.0 with 16 lanes, one way: neighbours without NVLink."""
NETWORK_BYTES_PER_S = 25e9
"""200 Gbit/s a node, one way, where nothing is said about the network."""
WITHIN_LATENCY_S = 10e-6
ACROSS_LATENCY_S = 20e-6
_HOP_SHARE = 0.2
_PEER_SHARE = 0.1
_LAUNCH_S = 5e-6
_OPERATOR_S = 50e-6
LAYER_S = 3e-4
TOKEN_S = 2e-3
_TILE_ROWS = 64
_FILLED_SHARE = 0.92
_SAME_SHAPE = 1e-4  # squared octaves


@dataclass(frozen=True)
class Wire:
    """One kind of transfer."""

    bytes_per_s: float  # that a rank sends, one way; of large transfers
    latency_s: float  # until a message of no length has arrived
    # Bytes and seconds that were measured, both ascending, the latency not included: between them,
    # smaller transfers may be slower than the rate says.
    points: tuple[tuple[float, float], ...] = ()

    def busy_s(self, nbytes: float) -> float:
        """How long so many bytes keep the link busy."""
        begin, begun = 0.0, 0.0
        for end, ended in self.points:
            if nbytes <= end:
                return begun + (ended - begun) * (nbytes - begin) / (end - begin)
            begin, begun = end, ended
        return begun + (nbytes - begin) / self.bytes_per_s


@dataclass(frozen=True)
class Link:
    """What joins ranks, by the kind of transfer; on real networks the kinds differ."""

    shift: Wire  # from rank to rank, point to point
    gather: Wire  # a hop of an all-gather
    exchange: Wire  # an all-to-all; its latency counts once for each peer
    shifts: Wire  # two shifts, to both sides, of many such pairs that overlap; bytes of both
    # By how much a shift under way slows down what the rank computes. Nothing on a GPU; on a CPU
    # somebody has to send.
    drag_s: float = 0.0
    # Of the rank, that each byte sent takes besides, as one comes in for it. Nothing on a GPU.
    processor_s: float = 0.0

    @classmethod
    def of(cls, bytes_per_s: float, latency_s: float) -> Link:
        """A link of one rate; ``latency_s`` is that of a message from rank to rank.

        Inside one collective a hop costs less, because nothing is started for it.
        """
        return cls(
            shift=Wire(bytes_per_s, latency_s),
            gather=Wire(bytes_per_s, _HOP_SHARE * latency_s),
            exchange=Wire(bytes_per_s, _PEER_SHARE * latency_s),
            shifts=Wire(bytes_per_s, latency_s),
        )


@dataclass(frozen=True)
class KernelTime:
    """How long one attention kernel takes: a cost a call, and terms by shape."""

    call_s: float  # of a call on next to nothing
    # Of a query row against a key, for one number of head_dim (``B s t H D`` of them).
    pair_s: float
    key_s: float  # of a number of K, and of V beside it (``B t K D`` of them)
    row_s: float  # of a number of q (``B s H D`` of them)
    # Computing and moving K and V hide each other (a GPU); else they add up.
    overlapped: bool = False
    tile_rows: int = 1  # queries are computed in so many at a time
    # What the terms miss, such as caches: queries, numbers of K, and measured over fitted at that
    # shape. Between the shapes it is interpolated.
    ratios: tuple[tuple[float, float, float], ...] = ()

    def seconds(
        self, queries: float, keys: float, *, width: float, kv_width: float, scale: float = 1.0
    ) -> float:
        """A call; ``width`` and ``kv_width`` are the numbers of a query and a key: B H D, B K D."""
        tiles = -(-queries // self.tile_rows) * self.tile_rows
        computing, moving = tiles * keys * width * self.pair_s, keys * kv_width * self.key_s
        shape = max(computing, moving) if self.overlapped else computing + moving
        fitted = self.call_s + scale * (shape + queries * width * self.row_s)
        return fitted * self._ratio(queries, keys * kv_width)

    def _ratio(self, queries: float, numbers: float) -> float:
        """The mean of the logarithms, weighted by the inverse square of the distance in octaves."""
        total = weights = 0.0
        for near_queries, near_numbers, ratio in self.ratios:
            across = log2(max(queries, 1.0) / near_queries)
            along = log2(max(numbers, 1.0) / near_numbers)
            weight = 1 / (across * across + along * along + _SAME_SHAPE)
            total += weight * log2(ratio)
            weights += weight
        return 2 ** (total / weights) if weights else 1.0


@dataclass(frozen=True)
class Device:
    """One GPU, or one rank on a CPU, while all its neighbours work too."""

    name: str  # of the card
    memory_bytes: int  # of the device
    whole: KernelTime  # attention whose result is final
    partial: KernelTime  # attention whose result is still to be merged
    backward: KernelTime  # of attention
    matmul_flops: float  # multiplications and additions a second, in large matrix products
    stream_bytes_per_s: float  # read and written together by elementwise operations
    operation_s: float  # of a small operation
    call_s: float  # of an operator's call, forward or backward, beside all kernels and messages
    element_bytes: int = 2  # that the times were taken with; others are scaled
    # The kernels while all neighbours are idle, where these matter.
    whole_alone: KernelTime | None = None
    backward_alone: KernelTime | None = None
    alone: float = 1.0  # share of the time that all else takes then
    # Of a step on one token: bytes a second of weights in its products (None: as elementwise
    # operations read), and what the host takes for a layer of text and beside all layers.
    weights_bytes_per_s: float | None = None
    layer_s: float = LAYER_S
    token_s: float = TOKEN_S
    # Likewise for a layer whose keys are sharded: its operations, the call, packing and merge, but
    # not the collective (None: as a layer of text, and by its operations).
    cross_layer_s: float | None = None
    # Of a call of generate until its first forward begins.
    begin_s: float = 0.0
    # Of a byte of memory that is written for the first time, besides. Nothing on a GPU, whose
    # allocator keeps what was freed.
    new_byte_s: float = 0.0

    @property
    def limit_bytes(self) -> int:
        """Of its memory, what a plan may fill; the rest is the driver's and the allocator's."""
        return int(_FILLED_SHARE * self.memory_bytes)

    @property
    def on_cpu(self) -> bool:
        """Whether this is a rank on a CPU."""
        return self.name.partition(" ")[0] == "cpu"


@dataclass(frozen=True)
class Cluster:
    """Devices and what joins them."""

    device: Device  # every rank's
    gpus: int  # in all
    gpus_per_node: int  # adjacent ranks of a node
    within: Link  # inside a node; a rank's own
    across: Link  # between nodes; a node's, which its ranks share
    source: str  # where the numbers come from

    def __post_init__(self) -> None:
        at_least(1, gpus=self.gpus, gpus_per_node=self.gpus_per_node)

    def with_gpus(self, gpus: int, gpus_per_node: int | None = None) -> Cluster:
        """The same devices and links, as many as given."""
        per_node = self.gpus_per_node if gpus_per_node is None else gpus_per_node
        return replace(self, gpus=gpus, gpus_per_node=min(per_node, gpus))

    def groups(self, only: int | None = None) -> list[int]:
        """How many ranks can share a sample: what divides the GPUs, or ``only``.

        Raises:
            ValueError: ``only`` does not divide them.
        """
        divisors = [each for each in range(1, self.gpus + 1) if self.gpus % each == 0]
        if only is not None and only not in divisors:
            raise ValueError(f"group: got {only} for {self.gpus} GPUs; expected one of {divisors}")
        return divisors if only is None else [only]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cluster:
        """From `record`.

        Raises:
            ValueError: the record is not one of a cluster.
        """
        from pydantic import TypeAdapter, ValidationError  # takes as long as a whole plan

        try:
            return TypeAdapter(cls).validate_python(record)
        except ValidationError as error:
            raise ValueError(
                f"got a record that is not a cluster's ({error.errors()[0]['loc']} is amiss); "
                "expected what ds-lvx plan --calibrate writes"
            ) from error


def from_card(
    card: Card,
    *,
    gpus: int,
    gpus_per_node: int = 8,
    within: Link | None = None,
    across: Link | None = None,
) -> Cluster:
    """A cluster by its card's data sheet; else with NVLink (or PCIe) and 200 Gbit/s a node."""
    nvlink = LINK_SHARE * (card.link_bytes_per_s or PCIE_BYTES_PER_S)
    network = LINK_SHARE * NETWORK_BYTES_PER_S
    return Cluster(
        device=_device(card),
        gpus=gpus,
        gpus_per_node=min(gpus_per_node, gpus),
        within=Link.of(nvlink, WITHIN_LATENCY_S) if within is None else within,
        across=Link.of(network, ACROSS_LATENCY_S) if across is None else across,
        source=card.source,
    )


def _device(card: Card) -> Device:
    memory = MEMORY_SHARE * card.memory_bytes_per_s

    def kernel(launches: int, *, flops: float, key_bytes: int, row_bytes: int) -> KernelTime:
        return KernelTime(
            call_s=launches * _LAUNCH_S,
            pair_s=flops / card.matrix_flops,
            key_s=key_bytes / memory,
            row_s=row_bytes / memory,
            overlapped=True,
            tile_rows=_TILE_ROWS,
        )

    # Forward: 4 operations a pair, K and V read once (2 bytes each). Backward: 10, and dk, dv are
    # written as well.
    forward = kernel(1, flops=4 / FORWARD_SHARE, key_bytes=4, row_bytes=4)
    return Device(
        name=card.name,
        memory_bytes=card.memory_bytes,
        whole=forward,
        partial=forward,
        backward=kernel(3, flops=10 / BACKWARD_SHARE, key_bytes=8, row_bytes=10),
        matmul_flops=MATMUL_SHARE * card.matrix_flops,
        stream_bytes_per_s=memory,
        operation_s=_LAUNCH_S,
        call_s=_OPERATOR_S,
    )
