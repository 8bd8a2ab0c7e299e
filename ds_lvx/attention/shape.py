"""The shape of one attention call, as the planner is asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

STREAMED_TOKENS = 16_384
"""Tokens of a chunk of features that come from the host, where nothing else is asked for."""


@dataclass(frozen=True)
class AttentionShape:
    """One attention call.

    Attributes:
        batch: samples.
        q_lengths, kv_lengths: queries and keys by rank.
        heads, kv_heads, head_dim: of the layer.
        element_bytes: of q, k and v.
        recompute: K and V are projected again in backward (lvx only).
        visibility: a bare operator with a rule, whose shares the ranks gather first.
        backward: is run too.
        features_dim: width of what K and V are projected from; 0 leaves the projection out.
        gradients: products of that projection in backward: of features, and of weights.
        seen: of all pairs of a query and a key those that a kernel computes, as in a window.
    """

    batch: int
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2
    recompute: bool = False
    visibility: bool = False
    backward: bool = True
    features_dim: int = 0
    gradients: int = 2
    seen: float = 1.0

    def __post_init__(self) -> None:
        if not self.q_lengths or len(self.q_lengths) != len(self.kv_lengths):
            raise ValueError(
                f"q_lengths, kv_lengths: got {len(self.q_lengths)} and {len(self.kv_lengths)} "
                "lengths; expected one of each for every rank"
            )
        if min(self.batch, self.heads, self.kv_heads, self.head_dim, self.element_bytes) < 1:
            raise ValueError(
                "batch, heads, kv_heads, head_dim, element_bytes: got "
                f"{(self.batch, self.heads, self.kv_heads, self.head_dim, self.element_bytes)}; "
                "expected at least 1 each"
            )

    @classmethod
    def even(
        cls, *, queries: int, keys: int, ranks: int, heads: int, kv_heads: int, head_dim: int
    ) -> AttentionShape:
        """One sample, bf16, forward and backward, in equal shards (the last may be shorter)."""
        lengths = [tuple(evenly(total, ranks)) for total in (queries, keys)]
        return cls(1, lengths[0], lengths[1], heads, kv_heads, head_dim)

    @property
    def ranks(self) -> int:
        """That share the sequence."""
        return len(self.q_lengths)


ACROSS = ("ring", "lvx")
"""What may run across a hybrid's subgroups."""


@dataclass(frozen=True)
class Hybrid:
    """Ulysses inside subgroups of adjacent ranks, and another method across them.

    Attributes:
        ulysses: ranks of a subgroup, which share the heads.
        across: one of `ACROSS`.
    """

    ulysses: int
    across: str

    @property
    def name(self) -> str:
        """``"hybrid 4 ring"``: the planner's word for it, before the schedule of lvx."""
        return f"hybrid {self.ulysses} {self.across}"

    def longest(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """How long the shards of each rank are made, by rank: as the longest of its subgroup.

        At least 1, which sees and is seen by nobody: no message is empty.
        """
        by_group = [lengths[i : i + self.ulysses] for i in range(0, len(lengths), self.ulysses)]
        return tuple(max(1, *shards) for shards in by_group for _ in shards)

    def together(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """What a subgroup holds then, by subgroup."""
        return tuple(self.ulysses * each for each in self.longest(lengths)[:: self.ulysses])


UNDIVIDED_BYTES = {"cpu": 2**15, "cuda": 2**22}
"""Of a rank's queries: up to so many, more messages cost more than they hide."""
_FIRST_SHARE = 8  # of the first and of the last group: one of so many heads


def head_groups(*, kv_heads: int, q_bytes: int, on_cpu: bool) -> tuple[int, ...]:
    """Heads of K and V that the gather schedule of lvx attends to together, group after group.

    What cannot hide is the first group's transfer here and the last one's home. A kernel on an
    eighth of the heads is long enough to hide the transfer of the others where keys are many.

    Args:
        kv_heads: of K and V; a group has at least one.
        q_bytes: of the longest shard of q.
        on_cpu: where the kernels run.

    Returns:
        Sizes that add up to ``kv_heads``; the same on every rank.
    """
    if kv_heads < 2 or q_bytes <= UNDIVIDED_BYTES["cpu" if on_cpu else "cuda"]:
        return (kv_heads,)
    edge = max(kv_heads // _FIRST_SHARE, 1)
    middle = kv_heads - 2 * edge
    return (edge, middle, edge) if middle else (edge, edge)


AT_ONCE_BYTES = 2**20
"""Of the parts of all ranks together: up to so many, one message takes less than two."""


def goes_at_once(out_bytes: float, ranks: int) -> bool:
    """Whether queries that every rank holds are so few that their parts are gathered whole.

    Args:
        out_bytes: of out, as parts are merged (fp32).
        ranks: that send one.
    """
    return out_bytes * ranks <= AT_ONCE_BYTES


def leaving_groups(*, kv_heads: int, q_bytes: int, on_cpu: bool) -> tuple[int, ...]:
    """`head_groups` where all heads arrive together, as in Ulysses: only the last group is small.

    Args:
        kv_heads: of K and V that a rank attends to.
        q_bytes: of the queries that it attends to, padding included.
        on_cpu: where the kernels run.
    """
    *others, last = head_groups(kv_heads=kv_heads, q_bytes=q_bytes, on_cpu=on_cpu)
    return (sum(others), last) if others else (last,)


def head_slices(sizes: Sequence[int], share: int) -> list[tuple[slice, slice]]:
    """The heads of q and those of K and V of each group.

    Args:
        sizes: heads of K and V by group.
        share: heads of q that use one of them.
    """
    return [
        (slice(first * share, last * share), slice(first, last))
        for first, last in pairwise(accumulate(sizes, initial=0))
    ]


def head_layout(heads: int, kv_heads: int, ranks: int) -> tuple[int, int]:
    """How often Ulysses repeats K and V heads, and how many heads of zeros it adds then.

    With fewer K/V heads than ranks each is repeated, by the least factor that gives every rank
    one and keeps groups of query heads whole; what still does not divide is padded.
    """
    group = heads // kv_heads
    enough = [f for f in range(1, group + 1) if group % f == 0 and kv_heads * f >= ranks]
    even = [f for f in enough if kv_heads * f % ranks == 0]
    repeats = even[0] if kv_heads < ranks and even else enough[0]
    return repeats, -kv_heads * repeats % ranks


def recurrent_groups(key_heads: int, value_heads: int, ranks: int) -> tuple[int, int]:
    """How many groups of heads that run together a head of keys stands in, where layers carry a
    state, and how many heads of values a group has.

    A group is a head of keys with its heads of values. Where a rank would have more of the latter
    than it must, it is one of these.
    """
    ratio = value_heads // key_heads
    if -(-key_heads // ranks) * ratio <= -(-value_heads // ranks):
        return 1, ratio
    return ratio, 1


def check_heads(num_heads: int, ranks: int) -> None:
    """Raise a ValueError where there are fewer query heads than ranks to split them over."""
    if num_heads < ranks:
        raise ValueError(
            f"ulysses: got {num_heads} query heads for {ranks} ranks; expected at least one "
            "head a rank; use a smaller sequence_parallel_size, or the methods 'lvx' or 'ring'"
        )


def evenly(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` that differ by one at most."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]
