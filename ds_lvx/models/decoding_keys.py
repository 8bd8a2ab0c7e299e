"""K and V that a rank keeps in a generation, and attention to those of all ranks.

A layer's are projected once, in the prompt's forward, from this rank's features or from its part of
the text, and stay here; queries are the same on all ranks, whose parts of the result meet by the
schedule ``replicated``. Rows of one sample (beams, sequences to return) share its keys: they are
further queries, and no cache of keys is repeated or put in another order.

Shapes: ``B`` samples, ``C`` rows of each, ``T`` tokens of the prompt, ``s`` of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.merge import merged
from ds_lvx.attention.witness import Witness
from ds_lvx.kernels.rule import Rule
from ds_lvx.models.cached import attend_cached
from ds_lvx.models.layers import LayerPlan

LayerKey: TypeAlias = tuple[str, str]
"""Kind and name of a layer."""


class DecodingKeys:
    """What layers ask of a generation.

    Args:
        samples: B.
        first_tokens: T of the first prompt, also where a later one goes on from its cache.
        device: where the model computes.

    Attributes:
        by_layer: K and V ``[B, s_kv, H_kv, D]``: ``cross``, of this rank's visual tokens; ``self``,
            of its part of a text that stays sharded. Of layers that carry a state, ``recurrent``,
            that behind the first prompt, the same on every rank.
        stand_in: what is in the place of features, ``[B, 0, hidden]``, once they came.
        features: this rank's, ``[B, s_kv, hidden]``, in the prompt's forward.
        copies: C.
        witness: what goes with the next message.
        behind: of this forward's tokens over those behind the prompt; None: all see all.
        recent: in layers with a window, the first of those that any of them sees, and the rule from
            there on.
        run: see `ds_lvx.models.generating.further.Further`, while such a text runs.
    """

    def __init__(self, samples: int, first_tokens: int, device: torch.device) -> None:
        self.first_tokens = first_tokens
        self.by_layer: dict[LayerKey, tuple[Tensor, Tensor]] = {}
        self.stand_in: Tensor | None = None
        self.features: Tensor | None = None
        self.copies = 1
        self.witness: Witness | None = None
        self.behind: Rule | None = None
        self.recent: tuple[int, Rule | None] = (0, None)
        self.run = slice(0)
        self._samples, self._device = samples, device
        self._likes: dict[str, Tensor] = {}  # queries of one token a row, by kind of layer

    def keep(
        self, features: Tensor | None, by_sample: Callable[[Tensor, int], Tensor], *, copies: int
    ) -> Tensor:
        """Keep the visual features until layers have their keys.

        Args:
            features: what the text model got.
            by_sample: brings those of so many samples into the shape ``[B, s_kv, hidden]``.
            copies: rows of a sample in this forward.

        Returns:
            What the text model gets in their place: ``[rows, 0, hidden]``.
        """
        if self.stand_in is None:
            assert features is not None, "the prompt's forward encodes the units"
            kept = self.features = by_sample(features, self._samples)
            self.stand_in = kept.new_empty((self._samples, 0, *kept.shape[2:]), device=self._device)
        return self.stand_in.repeat_interleave(copies, dim=0)

    def attend(
        self,
        plan: LayerPlan,
        layout: Layout,
        q: Tensor,
        *,
        project_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
        scale: float,
        schedule: str = "replicated",
        returns_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the same queries on every rank over the visual tokens of all, or over those
        of a text that stays sharded.

        Args:
            plan, layout: the layer, and its layout in this forward.
            q: ``[B * C, s, H, D]``.
            project_kv: features ``[B, s_kv, hidden]`` to K and V, in the prompt's forward.
            scale: factor of the scores.
            schedule: of lvx; ``gather`` where the queries are those of a part of the text.
            returns_lse: somebody reads lse, which is nothing to rely on else.

        Returns:
            out ``[B * C, s, H, D]``, lse ``[B * C, H, s]``.
        """
        key = plan.kind, plan.name
        if key not in self.by_layer:
            assert self.features is not None, "every layer runs with the prompt"
            self.by_layer[key] = project_kv(self.features.to(q.device))
        k, v = self.by_layer[key]
        (rows, tokens, heads, head_dim), samples = q.shape, k.shape[0]
        # Rows of a sample lie side by side: they are queries over the same keys.
        together = q.reshape(samples, -1, heads, head_dim)
        self._expect(plan, q, samples=samples)
        witness, self.witness = self.witness, None
        call = Call(
            layout,
            kernel=layout.kernel(plan.kernel, q),
            softmax_scale=scale,
            schedule=schedule,
            wants_lse=returns_lse,
            witness=witness,
        )
        out, lse = lvx.attend(call, together, k, v)
        if rows == samples or not returns_lse:
            return out.reshape(q.shape), lse
        by_row = lse.unflatten(2, (-1, tokens)).transpose(1, 2).reshape(rows, heads, tokens)
        return out.reshape(q.shape), by_row

    def attend_behind(
        self,
        plan: LayerPlan,
        layout: Layout,
        q: Tensor,
        keys: tuple[Tensor, Tensor],
        *,
        scale: float,
        is_recent: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attention behind a prompt that stays sharded: to it, and to what every rank has.

        Args:
            plan, layout, q, scale: as of `attend`.
            keys: K and V ``[B * C, t, H_kv, D]`` of the tokens behind the prompt.
            is_recent: the layer has a window.

        Returns:
            out ``[B * C, s, H, D]``, lse ``[B * C, H, s]``.
        """
        kernel = layout.kernel(plan.kernel, q)
        first, rule = self.recent if is_recent else (0, self.behind)
        k, v = (each[:, first:] for each in keys)
        local = attend_cached(q, (k, v), rule, scale=scale, kernel=kernel)
        sharded = self.attend(plan, layout, q, project_kv=_held, scale=scale)
        return merged([sharded, local])

    def attend_further(
        self,
        plan: LayerPlan,
        layout: Layout,
        q: Tensor,
        keys: tuple[Tensor, Tensor],
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Attention of this rank's part of a text behind a cache to all of the text so far.

        Args:
            plan, layout, q, scale: as of `attend`.
            keys: K and V ``[B, t, H_kv, D]`` of tokens that every rank has, and behind them of this
                part.

        Returns:
            out ``[B, s, H, D]``, lse ``[B, H, s]``.
        """
        name, tokens = (plan.kind, plan.name), q.shape[1]
        held = self.by_layer.get(name, (keys[0][:, :0], keys[1][:, :0]))
        k, v = (
            torch.cat((x, new[:, self.run], new[:, new.shape[1] - tokens :]), dim=1)
            for x, new in zip(held, keys, strict=True)
        )
        self.by_layer[name] = k, v
        return self.attend(plan, layout, q, project_kv=_held, scale=scale, schedule="gather")

    def hold(self, plan: LayerPlan, q: Tensor, keys: tuple[Tensor, Tensor]) -> None:
        """Keep a layer's keys of this rank's part of the prompt's text.

        Args:
            plan: the layer.
            q: ``[B, s, H, D]``.
            keys: K and V ``[B, s, H_kv, D]``.
        """
        self._expect(plan, q, samples=len(q))
        self.by_layer[plan.kind, plan.name] = keys

    def _expect(self, plan: LayerPlan, q: Tensor, *, samples: int) -> None:
        """Know what a message of a layer is like, for the first of a token."""
        if plan.kind not in self._likes:
            self._likes[plan.kind] = q.new_empty(samples, self.copies, *q.shape[2:])

    def message(self, *, of_text: bool) -> Tensor | None:
        """A tensor like the queries of one token a row whose message is a token's first; None where
        no layer sends any.

        Args:
            of_text: layers of the text send one, too.
        """
        sent = (like for kind, like in self._likes.items() if kind == "cross" or of_text)
        return next(sent, None)

    def hold_state(self, plan: LayerPlan, state: tuple[Tensor, Tensor]) -> None:
        """Keep a layer's state behind the first prompt, to which a cache can go back."""
        self.by_layer.setdefault((plan.kind, plan.name), state)

    def only_of_images(self) -> None:
        """Let go of the keys of the text."""
        self.by_layer = {key: keys for key, keys in self.by_layer.items() if key[0] == "cross"}

    def release(self) -> None:
        """Let go of all keys, to which a forward's keyword may still refer."""
        self.by_layer, self.features = {}, None


def _held(features: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("the prompt's forward has left the keys of every layer")
