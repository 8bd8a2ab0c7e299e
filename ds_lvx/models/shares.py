"""What each rank holds of a batch, and what one rank would hold of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import Layer, LayerPlan
from ds_lvx.models.patch import Patch

_HEADER = ("", "text tokens", "visual tokens", "K and V", "features", "activations")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Share:
    """What a rank holds of a batch.

    Attributes:
        text_tokens, visual_tokens: of all samples, padding included.
        kv_bytes: K and V of the attention to visual tokens (to the text, where these stand in it):
            of all layers that keep them for backward, and of one that projects them again.
        features_bytes: the visual features that these layers share.
        activation_bytes: what autograd kept from forward to backward, counted; None: it was not.
    """

    text_tokens: int
    visual_tokens: int
    kv_bytes: int
    features_bytes: int
    activation_bytes: int | None = None


def shares(patch: Patch, batch: ShardedBatch, *, samples: int, element_bytes: int) -> list[Share]:
    """By rank, and last what one rank would hold of the same batch. Communicates with nobody.

    Args:
        patch: of the model.
        batch: the keyword ``ds_lvx`` of a shard.
        samples: of the batch.
        element_bytes: of an activation.
    """
    text = list(batch.text_lengths)
    none = [0] * len(text)
    visual = none if batch.kv_lengths is None else list(batch.kv_lengths)
    among = none if batch.among is None else list(batch.among)
    layers = list(zip(patch.layers, patch.plans, strict=True))
    kind = "cross" if batch.among is None else "self"
    width = max((layer.features_dim for layer, _ in layers if layer.kind == kind), default=0)
    ranks = list(zip(text, visual, among, strict=True))
    found = []
    for queries, keys, images in [*ranks, (sum(text), sum(visual), sum(among))]:
        tokens = samples * keys + images
        found.append(
            Share(
                text_tokens=samples * queries - images,
                visual_tokens=tokens,
                kv_bytes=samples * element_bytes * _kv_bytes(layers, queries, keys),
                features_bytes=element_bytes * tokens * width,
            )
        )
    return found


def _kv_bytes(layers: Sequence[tuple[Layer, LayerPlan]], queries: int, keys: int) -> int:
    """Elements of K and V of one sample."""
    crosses = any(layer.kind == "cross" for layer, _ in layers)
    kept, passing = 0, 0
    for layer, plan in layers:
        if layer.kind != ("cross" if crosses else "self"):
            continue
        tokens = keys if crosses else queries
        width = 2 * layer.num_kv_heads * layer.head_dim
        if plan.recompute_kv:
            passing = max(passing, width * min(tokens, plan.chunk_tokens() or tokens))
        else:
            kept += width * tokens
    return kept + passing


def counted(found: Sequence[Share], activation_bytes: Sequence[int]) -> list[Share]:
    """The shares with the activations of every rank; one rank would hold those of all."""
    every = [*activation_bytes, sum(activation_bytes)]
    return [replace(share, activation_bytes=n) for share, n in zip(found, every, strict=True)]


class Saved:
    """What autograd has saved.

    Attributes:
        bytes: of tensors other than parameters, each storage once.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor; returns it."""
        storage = tensor.untyped_storage()
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not is_weight and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def saved() -> Iterator[Saved]:
    """Count what autograd saves in here, to be let go in backward."""
    count = Saved()
    with torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor):
        yield count


def share_table(found: Sequence[Share]) -> str:
    """A line for each rank of a group, and one for what one rank would hold."""
    names = [*(f"rank {rank}" for rank in range(len(found) - 1)), "one rank would hold"]
    header = _HEADER if found[0].activation_bytes is not None else _HEADER[:-1]
    rows = [header, *((name, *_cells(share)) for name, share in zip(names, found, strict=True))]
    width = max(len(name) for name in names)
    lines = (
        "  ".join([row[0].ljust(width), *(c.rjust(13) for c in row[1:])]).rstrip() for row in rows
    )
    return "\n".join(lines)


def shared_rows(batch: ShardedBatch, rows: int) -> str:
    """As how many rows those run that begin alike.

    Args:
        batch: the keyword.
        rows: of the model's ``input_ids``.
    """
    came = rows if batch.unmerged is None else len(batch.unmerged)
    return f"share_prefixes: its {came} rows run as {rows}"


def _cells(share: Share) -> tuple[str, ...]:
    sizes = (share.kv_bytes, share.features_bytes, share.activation_bytes)
    tokens = (f"{share.text_tokens:,}", f"{share.visual_tokens:,}")
    return (*tokens, *(_size(size) for size in sizes if size is not None))


def _size(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:,.{0 if power == 0 else 1}f} {_UNITS[power]}"
