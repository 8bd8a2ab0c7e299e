"""Generation on the ranks of a group: all have the whole text, each the keys of its own units.

The first forward of the model runs the prompt, the others a token each. K and V of cross-attention
are projected once a layer, from this rank's features, and stay here; queries are the same on all
ranks, whose parts of the result meet by the schedule ``replicated``. Text attends to itself on
every rank, as the model does alone, or its keys stay sharded as well (`ds_lvx.models.text_keys`).
Rows of one sample (beams, sequences to return) share its keys: they are further queries, and no
cache of keys is repeated or put in another order.

Shapes: ``B`` samples, ``C`` rows of each, ``T`` tokens of the prompt, ``s`` of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.merge import merge_attention
from ds_lvx.attention.schedules.replicated import say
from ds_lvx.attention.witness import Witness
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.rule import Rule
from ds_lvx.models import text_keys
from ds_lvx.models.batch import ShardedBatch, move
from ds_lvx.models.behind import Part, attend_cached, causal, leave_behind
from ds_lvx.models.cuts import span
from ds_lvx.models.drift import ENDED, FAILED, difference
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.prompt import LAST, WHOLE, Kept, LayerKey, Prompt
from ds_lvx.models.text import digest
from ds_lvx.models.text_keys import SHARDED


class Decoding:
    """The state of one generation on one rank.

    Attributes:
        keys: K and V ``[B, s_kv, H_kv, D]`` by kind and name of a layer: ``cross``, of this rank's
            visual tokens; ``self``, of its part of a text that stays sharded.
        step: forwards that have begun, less the prompt's: the tokens that a row has been fed.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.keys: dict[LayerKey, tuple[Tensor, Tensor]] = {}
        self.step = -1
        self._first, self._prompt = prompt, prompt
        self._copies = 1
        self._later: ShardedBatch | None = None
        self._features: Tensor | None = None
        self._stand_in: Tensor | None = None
        self._witness: Witness | None = None
        self._likes: dict[str, Tensor] = {}  # queries of one token a row, by kind of layer
        self._in_forward = False
        self._split: tuple[int, ...] | None = None  # tokens by rank of the prompt that runs
        self._part: Part | None = None  # of the prompt that runs
        self._behind: Rule | None = None  # of this forward's tokens over those behind the prompt
        if prompt.kept is not None:
            self._first, keys, self._stand_in = prompt.kept
            self.keys = dict(keys)

    @property
    def channel(self) -> Channel:
        """The sequence-parallel group."""
        return self._prompt.channel

    @property
    def copies(self) -> int:
        """C."""
        return self._copies

    @property
    def first_tokens(self) -> int:
        """T of the first prompt, also where a later one goes on from its cache."""
        return self._first.shape[1]

    # ---- a forward

    def begin(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments for a forward of the model.

        Args:
            given: its arguments, ``input_ids [B * C, s]`` among them.

        Raises:
            ValueError: other tokens than those of the prompt, or more than one of each row.

        Collectives: an agreement on the control plane before the prompt, in which a rank that has
            failed before says so.
        """
        input_ids: Tensor = given[f"{self._prompt.prefix}input_ids"]
        self.step += 1
        self._in_forward = True
        wrong = self._wrong_shape(input_ids) or self._wrong_output(given)
        if self._prompt.is_behind:
            self._behind = self._rule_behind(given)
        if self.step == 0:
            records = self.channel.agree({"rows of the batch": len(input_ids)}, wrong)
            require_same(records, records[0], what="ds_lvx.generate")
            self._copies = len(input_ids) // self._prompt.shape[0]
            arguments = {**self._prompt.arguments, **self._first_batch(given)}
            self._prompt, self._first = self._prompt.without_units(), self._first.without_units()
            return arguments
        if wrong is not None:
            raise wrong
        if self._later is None:
            self._later = self._batch(LAST)
        step = move(torch.tensor([self.step], dtype=torch.int64), input_ids.device)
        numbers = torch.cat([step, input_ids[:, 0].to(torch.int64)])
        self._witness = Witness(numbers, self._compare)
        return {KEYWORD: self._later}

    def _wrong_shape(self, input_ids: Tensor) -> ValueError | None:
        samples, length = self._prompt.shape
        if self._prompt.kept is not None and len(input_ids) != samples:
            return ValueError(
                f"got {len(input_ids)} rows for past_key_values of {samples} samples; expected one "
                "row a sample: no beams and one sequence each, or leave past_key_values out"
            )
        expected = length if self.step == 0 else 1
        if input_ids.shape[1] == expected and len(input_ids) % samples == 0:
            return None
        return ValueError(
            f"got input_ids {tuple(input_ids.shape)} in forward {self.step} of a generation; "
            f"expected {expected} tokens a row, of {samples} samples: use a way to generate that "
            "runs the prompt once and then token by token"
        )

    def _wrong_output(self, given: Mapping[str, Any]) -> NotImplementedError | None:
        prompt = self._prompt
        cut = prompt.among or prompt.prefix or (prompt.split and prompt.text_keys == SHARDED)
        if not (cut and given.get("output_hidden_states")):
            return None
        return NotImplementedError(
            "got output_hidden_states=True for a prompt whose tokens are sharded; no rank has "
            "those of all tokens: leave it out"
        )

    def _rule_behind(self, given: Mapping[str, Any]) -> Rule | None:
        ids: Tensor = given["input_ids"]
        length = self._first.shape[1]
        mask = given["attention_mask"][:, length:] if self._prompt.gaps else None
        return causal(mask, ids, past=given["past_key_values"].get_seq_length() - length)

    def _batch(self, tokens: slice) -> ShardedBatch:
        return self._prompt.batch(tokens, copies=self._copies, decoding=self)

    def _first_batch(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword of the prompt's forward, and the part of its text where that is split."""
        self._part = self._prompt.part
        if self._part is not None:
            keyword = replace(self._part.keyword, decoding=self)
            return {**self._part.arguments, KEYWORD: keyword}
        if self._prompt.split is not None and given.get("output_hidden_states"):
            self._whole_text()
        split = self._prompt.split
        if split is None:
            return {KEYWORD: self._batch(WHOLE)}
        self._split = split.text_lengths
        # Rows of a sample are the same until tokens are chosen.
        ids = given["input_ids"][:: self._copies]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        here = span(split.text_lengths, self.channel.rank)
        return {
            "input_ids": ids[:, here],
            "position_ids": positions[..., :: self._copies, here],
            KEYWORD: replace(split, decoding=self),
        }

    def _whole_text(self) -> None:
        """Every rank has the whole text."""
        self._prompt, self._first = (
            replace(prompt, split=None, text=None) for prompt in (self._prompt, self._first)
        )
        self.keys = {key: keys for key, keys in self.keys.items() if key[0] == "cross"}

    def end_forward(self, cache: Any, output: Any) -> None:
        """A forward of the model is over: after that of the prompt all layers have their keys.

        Args:
            cache: transformers' own.
            output: of the model. After a prompt that was split, every rank gets the logits of its
                last token, and in the cache K and V of all where they do not stay sharded.

        Collectives: after such a prompt those of `ds_lvx.models.text_keys.gather`, and an
            all-gather of logits; after one that stays sharded that of logits alone.
        """
        self._in_forward, self._features = False, None
        lengths, self._split = self._split, None
        part, self._part = self._part, None
        if part is not None:
            output.logits = part.logits(output.logits, self._copies)
            leave_behind(cache, self.first_tokens)
        if lengths is None:
            return
        rows = self._prompt.shape[0] * self._copies
        if text_keys.stay(self._prompt.text_keys, cache, self.first_tokens, rows):
            leave_behind(cache, self.first_tokens)
        else:
            text_keys.gather(cache, self.channel, lengths, self._copies)
            self._whole_text()
        last = [output.logits[:, -1:].contiguous()]
        everyones = self.channel.gather_rows(last, [1], (1,) * self.channel.size).wait()[0]
        output.logits = everyones[:, -1:].repeat_interleave(self._copies, dim=0)

    def keep(self, features: Tensor | None, by_sample: Callable[[Tensor, int], Tensor]) -> Any:
        """Keep the visual features until layers have their keys.

        Args:
            features: what the text model got.
            by_sample: brings those of so many samples into the shape ``[B, s_kv, hidden]``.

        Returns:
            What the text model gets in their place: ``[rows, 0, hidden]``; None without images.
        """
        if self._prompt.kv_lengths is None:
            return None
        samples = self._prompt.shape[0]
        if self._stand_in is None:
            assert features is not None, "the prompt's forward encodes the units"
            kept = self._features = by_sample(features, samples)
            self._stand_in = kept.new_empty(
                (samples, 0, *kept.shape[2:]), device=self._prompt.device
            )
        return self._stand_in.repeat_interleave(1 if self._split else self._copies, dim=0)

    def attend(
        self,
        plan: LayerPlan,
        batch: ShardedBatch,
        q: Tensor,
        *,
        project_kv: Callable[[Tensor], tuple[Tensor, Tensor]],
        scale: float,
        returns_lse: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the same queries on every rank over the visual tokens of all, or over those
        of a text that stays sharded.

        Args:
            plan, batch: the layer, and the keyword of this forward.
            q: ``[B * C, s, H, D]``.
            project_kv: features ``[B, s_kv, hidden]`` to K and V, in the prompt's forward.
            scale: factor of the scores.
            returns_lse: somebody reads lse, which is nothing to rely on else.

        Returns:
            out ``[B * C, s, H, D]``, lse ``[B * C, H, s]``.
        """
        key = plan.kind, plan.name
        if key not in self.keys:
            assert self._features is not None, "every layer runs with the prompt"
            self.keys[key] = project_kv(self._features.to(q.device))
        k, v = self.keys[key]
        rows, tokens, heads, head_dim = q.shape
        # Rows of a sample lie side by side: they are queries over the same keys.
        together = q.reshape(len(k), -1, heads, head_dim)
        self._expect(plan, q, samples=len(k))
        layout = batch.layout(plan.kind)
        kind = ("kernel", plan.kernel, q.dtype, head_dim, q.device)
        witness, self._witness = self._witness, None
        call = Call(
            layout,
            kernel=layout.settled(kind, lambda: kernel_for(plan.kernel, q)),
            softmax_scale=scale,
            schedule="gather" if batch.split else "replicated",
            wants_lse=returns_lse,
            witness=witness,
        )
        out, lse = lvx.attend(call, together, k, v)
        if not returns_lse:
            return out.reshape(q.shape), lse
        by_row = lse.unflatten(2, (-1, tokens)).transpose(1, 2).reshape(rows, heads, tokens)
        return out.reshape(q.shape), by_row

    def hold(self, plan: LayerPlan, q: Tensor, keys: tuple[Tensor, Tensor]) -> None:
        """Keep a layer's keys of this rank's part of the prompt's text.

        Args:
            plan: the layer.
            q: ``[B, s, H, D]``.
            keys: K and V ``[B, s, H_kv, D]``.
        """
        self._expect(plan, q, samples=len(q))
        self.keys[plan.kind, plan.name] = keys

    def _expect(self, plan: LayerPlan, q: Tensor, *, samples: int) -> None:
        """Know what a message of a layer is like, for the first of a token (`say`)."""
        if plan.kind not in self._likes:
            self._likes[plan.kind] = q.new_empty(samples, self._copies, *q.shape[2:])

    def attend_behind(
        self,
        plan: LayerPlan,
        batch: ShardedBatch,
        q: Tensor,
        keys: tuple[Tensor, Tensor],
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Attention behind a prompt that stays sharded: to it, and to what every rank has.

        Args:
            plan, batch, q, scale: as of `attend`.
            keys: K and V ``[B * C, t, H_kv, D]`` of the tokens behind the prompt.

        Returns:
            out ``[B * C, s, H, D]``, lse ``[B * C, H, s]``.
        """
        local = attend_cached(q, keys, self._behind, scale=scale, kernel=plan.kernel)
        sharded = self.attend(plan, batch, q, project_kv=_held, scale=scale)
        return merge_attention([sharded, local])

    # ---- the end

    def finish(self, sequences: Tensor) -> None:
        """Compare what the ranks return.

        Args:
            sequences: int ``[rows, tokens]``.

        Raises:
            RuntimeError: on all ranks, when they chose different tokens.

        Collectives: one message like that of a layer.
        """
        self._say(ENDED, digest(sequences), self._compare)

    def kept(self) -> Kept | None:
        """What another generation goes on with; None where samples have several rows, or where
        another question is another text for an encoder."""
        goes_on = self._copies == 1 and not self._prompt.prefix
        return (self._first, dict(self.keys), self._stand_in) if goes_on else None

    def release(self) -> None:
        """Let go of the keys, which a forward's keyword may still refer to."""
        self.keys, self._later, self._features = {}, None, None

    def fail(self, error: Exception, *, waits: bool) -> None:
        """Let the other ranks know that this one stops; then they stop as well.

        What fails inside a forward they are not told: they may be in any of its messages.

        Args:
            error: why.
            waits: ranks run the same forwards to the end (ZeRO-3), and hear nothing between them.
        """
        if self.step < 0:
            self.channel.agree({}, error)
        elif not self._in_forward and not waits:
            self._say(FAILED, 0, lambda everyones: None)

    def _say(self, state: int, number: int, compare: Callable[[Tensor], None]) -> None:
        if self.channel.size == 1:
            return
        rows = self._prompt.shape[0] * self._copies
        numbers = torch.zeros(1 + rows, dtype=torch.int64)
        numbers[0], numbers[1] = state, number
        numbers = move(numbers, self._prompt.device)
        for kind, like in self._likes.items():  # in the order of a forward
            if kind == "cross" or self._prompt.text is not None:
                say(self.channel, like, Witness(numbers, compare))
                return
        one_each = (1,) * self.channel.size
        compare(self.channel.gather_rows([numbers[None]], [0], one_each).wait()[0])

    def _compare(self, everyones: Tensor) -> None:
        said = everyones.tolist()
        if any(each != said[0] for each in said):
            raise RuntimeError(f"ds_lvx.generate: {difference(said)}")


def _held(features: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("the prompt's forward has left the keys of every layer")
