"""The text of mPLUG-Owl3 in generation: whole on every rank, with transformers' cache.

The keys of the text so far are the same on every rank, and each attends to them by itself; in a
hyper layer they are one part of a softmax whose other part is that of the images, of all ranks.

Shapes: ``R`` rows, ``s`` tokens of a forward, ``t`` tokens so far, with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_lvx.kernels.rule import Rule
from ds_lvx.models.behind import attend_cached


@dataclass(frozen=True, eq=False)
class Cached:
    """What a layer attends by in a forward of generation.

    Attributes:
        cache: transformers' own, of the text's K and V after rotary embedding.
        number: of the layer.
        rule: of the tokens of this forward over the text so far; None where all see all.
        norm: of the layer, through which features go before they are K and V of images.
    """

    cache: Any
    number: int
    rule: Rule | None
    norm: nn.Module

    def attend(
        self, q: Tensor, keys: tuple[Tensor, Tensor], *, scale: float, kernel: str
    ) -> tuple[Tensor, Tensor]:
        """Attention to the text so far.

        Args:
            q: ``[R, s, H, D]``.
            keys: K and V ``[R, s, H_kv, D]`` of these tokens, which the cache takes.
            scale: factor of the scores.
            kernel: its name.

        Returns:
            out ``[R, s, H, D]``, lse ``[R, H, s]``.
        """
        new = [each.transpose(1, 2) for each in keys]
        k, v = (each.transpose(1, 2) for each in self.cache.update(*new, self.number))
        return attend_cached(q, (k, v), self.rule, scale=scale, kernel=kernel)
