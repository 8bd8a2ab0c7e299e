"""What the model's own forward would do otherwise with a rank's part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.concatenated.batch import PLACES
from ds_lvx.models.patch import KEYWORD, Hook


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a tower made of a rank's units.

    Attributes:
        features: ``[tokens, hidden]``, in the order of the units.
        deep: further features, ``[tokens, hidden]`` each, that layers of the text add.
    """

    features: Tensor
    deep: Sequence[Tensor] = field(default_factory=tuple)


Encode: TypeAlias = "Callable[[Any, Mapping[str, Any]], Encoded]"
"""The model that the hook is on, and the model's arguments of units -> what its tower makes."""


class Embed(Hook):
    """A forward pre-hook of the model that has tower and text: embeddings of this rank's tokens.

    The tower runs once, on this rank's units, and what it makes goes to their places here; nothing
    is sent. A rank without units has a blank one, which goes nowhere.

    Args:
        encode: runs the tower. It gets no keyword of the forward but the units' own.
        takes: the units' arguments; the first has their pixels.
    """

    def __init__(self, encode: Encode, takes: Collection[str]) -> None:
        self._encode, self._takes = encode, tuple(takes)

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        if batch is None:
            return None
        given = dict(kwargs)
        embed: Any = module.get_input_embeddings()  # type: ignore[operator]
        embedded = embed(given.pop("input_ids"))
        units = {key: given.pop(key, None) for key in self._takes}
        places = given.pop(PLACES, None)  # none of a token that is generated
        if units[self._takes[0]] is not None:
            made = self.encoded(module, units, batch)
            embedded = placed(embedded, made.features, places)
            deep = [each if len(places) > 0 else each[:0] for each in made.deep]
            batch = replace(batch, deep=Deep(places, tuple(deep)) if deep else None)
        return args, {**given, KEYWORD: batch, "inputs_embeds": embedded}

    def encoded(self, module: nn.Module, units: Mapping[str, Any], batch: ShardedBatch) -> Encoded:
        """What goes to its places: of this rank's units."""
        return self._encode(module, units)


@dataclass(frozen=True, eq=False)
class Deep:
    """Features that layers of the text add to this rank's tokens: `Encoded.deep`, and where.

    Attributes:
        places: int64, in the part of the rows, ``[B * n_r]``.
        features: ``[tokens, hidden]`` each; of a blank unit none, which leaves gradients of 0.
    """

    places: Tensor
    features: tuple[Tensor, ...]


def placed(embedded: Tensor, features: Tensor, places: Tensor) -> Tensor:
    """Embeddings ``[B, n_r, hidden]`` with features ``[tokens, hidden]`` at their places."""
    features = features.to(embedded.dtype)
    if len(places) == 0:
        return embedded + features[:0].sum()  # of a blank unit: gradients of 0, and not none
    return embedded.flatten(0, 1).index_copy(0, places, features).view_as(embedded)
