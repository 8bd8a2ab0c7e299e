"""Random tensors for a comparison: the same for every method, on any number of ranks.

Each shard is drawn by itself, so a rank draws only its own, and one process can draw them all.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_lvx.attention.zigzag import dealt
from ds_lvx.config.registry import FLOATS
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.cuts import split
from ds_lvx.plan.units import at_least

VISIBILITIES = ("all", "causal", "frames", "prefix")
ORDERS = ("contiguous", "zigzag")
FRAMES = 16
FRAMES_SEEN = 4


@dataclass(frozen=True)
class Shape:
    """One attention over a whole sequence; it is split over the ranks as evenly as it goes."""

    # Of all ranks together.
    seqlen_q: int = 256
    seqlen_kv: int = 32768
    # As in `ds_lvx.lv_xattn`.
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "bfloat16"  # its name in torch
    # ``"all"``; ``"causal"``, where the last query sees all keys and the others their share from
    # the front; ``"frames"``, where the keys are frames and a query sees four in a row, later ones
    # the later the query is; ``"prefix"``, where it sees all frames up to its own.
    visibility: str = "all"
    # Width of the features that K and V are projected from; None for K and V as they are.
    features_dim: int | None = None
    frames: int = FRAMES  # that the keys are
    # ``"contiguous"``, or ``"zigzag"``: an early and a late piece of a causal text on each rank.
    order: str = ORDERS[0]

    def __post_init__(self) -> None:
        at_least(1, **{name: n for name, n in vars(self).items() if isinstance(n, int)})
        if self.heads % self.kv_heads:
            raise ValueError(
                f"--kv-heads: got {self.kv_heads} for {self.heads} query heads; expected a divisor "
                f"of {self.heads}"
            )
        for name, known in {"dtype": FLOATS, "visibility": VISIBILITIES, "order": ORDERS}.items():
            got = getattr(self, name)
            if got not in known:
                raise ValueError(f"--{name}: got {got!r}; expected one of {list(known)}")

    @property
    def tensor_dtype(self) -> torch.dtype:
        """As torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class Shards:
    """The tensors of some shards. All but ``dout`` and ``visibility`` are leaves."""

    q: Tensor  # [batch, seqlen_q, heads, head_dim]
    dout: Tensor  # the same
    # ``{"k": ..., "v": ...}``, each ``[batch, seqlen_kv, kv_heads, head_dim]``; or ``{"features":
    # ..., "k_proj": ..., "v_proj": ...}``, ``[batch, seqlen_kv, features_dim]`` and twice
    # ``[features_dim, kv_heads * head_dim]``.
    keys: dict[str, Tensor]
    head_dim: int  # of keys that are projected
    visibility: Visibility | None  # of these queries over these keys
    over_all: Visibility | None  # of these queries over the shards' keys, one after the other

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        return {"q": self.q, **self.keys}

    @property
    def is_projected(self) -> bool:
        """Whether K and V come from features."""
        return "features" in self.keys

    def k_and_v(self) -> tuple[Tensor, Tensor]:
        """K and V, projected where there are features."""
        if self.is_projected:
            return self.project(self.keys["features"])
        return self.keys["k"], self.keys["v"]

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of features."""
        k, v = (
            (features @ self.keys[name]).unflatten(-1, (-1, self.head_dim))
            for name in ("k_proj", "v_proj")
        )
        return k, v

    def in_float64(self) -> Shards:
        """The same values, exactly, as leaves of their own."""
        keys = {name: _leaf(tensor.double()) for name, tensor in self.keys.items()}
        return replace(self, q=_leaf(self.q.double()), dout=self.dout.double(), keys=keys)

    def results(self, out: Tensor) -> dict[str, Tensor]:
        """``out``, and every gradient that its backward gives by ``dout``; takes them off."""
        out.backward(self.dout)
        gradients = {f"d{name}": leaf.grad for name, leaf in self.leaves.items()}
        self.clear()
        return {"out": out.detach()} | {n: g for n, g in gradients.items() if g is not None}

    def clear(self) -> None:
        """Take the gradients off."""
        for leaf in self.leaves.values():
            leaf.grad = None


def make_shards(
    shape: Shape,
    *,
    ranks: int,
    shards: Sequence[int],
    device: torch.device,
    of_queries: Sequence[int] | None = None,
) -> Shards:
    """The tensors of some shards of ``ranks``, in order; of all, they are the whole sequence.

    With ``of_queries`` the queries are of other shards than the keys. Shards of keys differ in
    scale, from half to one and a half: their parts of a result then have a different lse, and a
    merge that ignored it would be wrong by far.
    """
    q_lengths, kv_lengths = split(shape.seqlen_q, ranks), split(shape.seqlen_kv, ranks)
    own = shards if of_queries is None else of_queries

    def draw(name: str, lengths: Sequence[int], *size: int) -> Tensor:
        parts = []
        for shard in shards if lengths is kv_lengths else own:
            wide = _randn((shape.batch, lengths[shard], *size), f"{name} {shard}", device)
            if name in ("k", "features"):
                wide *= 0.5 + shard / max(ranks - 1, 1)
            parts.append(wide.to(shape.tensor_dtype))
        return torch.cat(parts, dim=1)

    queries = (q_lengths, shape.heads, shape.head_dim)
    if shape.features_dim is None:
        one = (kv_lengths, shape.kv_heads, shape.head_dim)
        keys = {name: _leaf(draw(name, *one)) for name in ("k", "v")}
    else:
        keys = {"features": _leaf(draw("features", kv_lengths, shape.features_dim))}
        size = (shape.features_dim, shape.kv_heads * shape.head_dim)
        for name in ("k_proj", "v_proj"):
            weight = _randn(size, name, device) * shape.features_dim**-0.5
            keys[name] = _leaf(weight.to(shape.tensor_dtype))

    def places(lengths: Sequence[int], shards: Sequence[int]) -> Tensor:
        """Of the shards' rows, in the whole sequence."""
        every = torch.arange(sum(lengths))
        zigzag = shape.order == "zigzag"
        parts = dealt(sum(lengths), ranks) if zigzag else every.split(list(lengths))
        return torch.cat([parts[shard] for shard in shards]).to(device)

    rows = places(q_lengths, own)
    return Shards(
        _leaf(draw("q", *queries)),
        draw("dout", *queries),
        keys,
        shape.head_dim,
        visibility(shape, rows, places(kv_lengths, shards)),
        visibility(shape, rows, places(kv_lengths, range(ranks))),
    )


def _randn(size: Sequence[int], name: str, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(size), generator=generator, device=device)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def visibility(shape: Shape, rows: Tensor, keys: Tensor) -> Visibility | None:
    """Of queries over keys, by their places in the whole sequence; None: all see all."""
    if shape.visibility == "all":
        return None
    start, position = torch.zeros_like(rows), keys * shape.frames // shape.seqlen_kv
    if shape.visibility == "causal":
        end, position = (rows + 1) * shape.seqlen_kv // shape.seqlen_q, keys
    elif shape.visibility == "prefix":
        end = rows * shape.frames // shape.seqlen_q + 1
    else:
        start = rows * (shape.frames - FRAMES_SEEN) // max(shape.seqlen_q - 1, 1)
        end = start + FRAMES_SEEN
    parts = (part.to(torch.int32).repeat(shape.batch, 1) for part in (start, end, position))
    return Visibility(*parts)
