"""Families whose models with random weights come from a module of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_lvx.models.contract import Family
from ds_lvx.models.size import Size


class Sizes(Protocol):
    """The module: see `ds_lvx.models.contract.Family` for what each part does."""

    def config_of(self, size: Size) -> Any: ...

    def size_of(self, config: Any) -> Size: ...

    def random_frames(
        self, config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
    ) -> dict[str, Tensor]: ...


class Sized(Family):
    """One that can be cut to a size.

    Attributes:
        sized: the module; None, as a family from outside may have it: it lacks these parts.
    """

    sized: Sizes | None = None

    def config(self, size: Size) -> Any:
        return self._sizes("config").config_of(size)

    def size(self, config: Any = None) -> Size:
        return self._sizes("size").size_of(config)

    def random_frames(
        self, config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
    ) -> dict[str, Tensor]:
        return self._sizes("random_frames").random_frames(
            config, text_tokens=text_tokens, total=total, frames=frames, seed=seed
        )

    def has(self, part: str) -> bool:
        return super().has(part) and not (self.sized is None and part in _OF_MODULE)

    def _sizes(self, part: str) -> Any:
        if self.sized is None:
            raise self.lacks(part, "a model with random weights")
        return self.sized


class Makes(Sizes, Protocol):
    """The module of models whose code is at hand."""

    def tiny(self) -> tuple[Any, Any]: ...


class Made(Sized):
    """One whose models are made as well, and have no gates.

    Attributes:
        of_class: of its models.
    """

    sized: Makes | None = None
    of_class: Any

    def build(self, config: Any, *, gate: float, dtype: torch.dtype) -> Any:
        return self.of_class._from_config(config, dtype=dtype)

    def tiny(self) -> tuple[Any, Any]:
        return self._sizes("tiny").tiny()


_OF_MODULE = ("config", "size", "random_frames", "build", "tiny")
