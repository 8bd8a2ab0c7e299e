"""Attention to keys that every rank has in transformers' cache, in a forward of generation.

Shapes: ``R`` rows of a forward, ``s`` tokens of it, ``t`` tokens that a rank has keys of, with
those of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.kernels.interface import Kernel, Problem
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import EVERYTHING, Visibility


def attend_cached(
    q: Tensor, keys: tuple[Tensor, Tensor], rule: Rule | None, *, scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Attention to keys that every rank has.

    Args:
        q: ``[R, s, H, D]``.
        keys: K and V ``[R, t, H_kv, D]``.
        rule: None where all see all.
        scale: factor of the scores.
        kernel: for these queries.

    Returns:
        out ``[R, s, H, D]``, lse ``[R, H, s]``.
    """
    problem = Problem(q, *keys, rule, softmax_scale=scale)
    out, lse = kernel.forward(problem)
    return out.to(q.dtype), lse


@dataclass(frozen=True, eq=False)
class Cached:
    """What a layer of text that every rank has attends by in a forward of generation.

    Attributes:
        cache: transformers' own, of K and V after rotary embedding.
        number: of the layer.
        rule: of the tokens of this forward over the text so far; None where all see all.
    """

    cache: Any
    number: int
    rule: Rule | None

    def attend(
        self, q: Tensor, keys: tuple[Tensor, Tensor], *, scale: float, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        """Attention to the text so far.

        Args:
            q: ``[R, s, H, D]``.
            keys: K and V ``[R, s, H_kv, D]`` of these tokens, which the cache takes.
            scale: factor of the scores.
            kernel: for these queries.

        Returns:
            out ``[R, s, H, D]``, lse ``[R, H, s]``.
        """
        new = [each.transpose(1, 2) for each in keys]
        k, v = (each.transpose(1, 2) for each in self.cache.update(*new, self.number))
        return attend_cached(q, (k, v), self.rule, scale=scale, kernel=kernel)


def causal(
    attention_mask: Tensor | None, x: Tensor, *, past: int, window: int | None = None
) -> Rule | None:
    """Tokens behind ``past`` others over all of these; None where all see all.

    Args:
        attention_mask: ``[R, t]``, 0 at padding, which nobody sees; None without.
        x: ``[R, s, ...]``, of the tokens.
        past: t - s.
        window: a token sees so many, with itself, and the cache has dropped what none sees.
    """
    (rows, tokens), device = x.shape[:2], x.device
    chosen = tokens == 1
    if attention_mask is None and chosen:
        return None
    # Of the prompt the host knows the rule; for a token that is chosen nobody waits.
    where = device if chosen else torch.device("cpu")
    first = 0 if window is None else max(past - window + 1, 0)
    index = torch.arange(first, past + tokens, dtype=torch.int32, device=where)
    keys = index.expand(rows, -1)
    if attention_mask is not None:
        keys = keys.masked_fill(attention_mask[:, first:].to(where) == 0, EVERYTHING)
    end = (index[-tokens:] + 1).expand(rows, -1)
    start = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    visibility = Visibility(start, end, keys)
    return Rule(visibility) if chosen else Rule.on(visibility, device)
