"""The forwards of a generation: all ranks have the whole text, each the keys of its own units.

The first forward of the model runs the prompt, the others a token each. Text attends to itself on
every rank, as the model does alone, or its keys stay sharded as well
(`ds_lvx.models.generating.text_keys`). With each token the ranks say what they compute, and at the
end what they return.

Shapes: ``B`` samples, ``C`` rows of each, ``s`` tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.schedules.replicated import say
from ds_lvx.attention.witness import Witness
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule
from ds_lvx.models.batch import RECENT, ShardedBatch, move
from ds_lvx.models.cached import causal
from ds_lvx.models.cuts import span
from ds_lvx.models.decoding_keys import DecodingKeys
from ds_lvx.models.generating import text_keys
from ds_lvx.models.generating.drift import ENDED, FAILED, difference
from ds_lvx.models.generating.further import Further
from ds_lvx.models.generating.prompt import LAST, WHOLE, Kept, Part, Prompt
from ds_lvx.models.generating.text_keys import SHARDED
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.text import digest


class Decoding:
    """The state of one generation on one rank.

    Attributes:
        keys: what this rank keeps for the layers.
        step: forwards that have begun, less the prompt's: the tokens that a row has been fed.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.step = -1
        self._prompt = prompt
        self._later: ShardedBatch | None = None
        self._in_forward = False
        self._split: tuple[int, ...] | None = None  # tokens by rank of the prompt that runs
        self._part: Part | None = None  # of the prompt that runs
        self._further: Further | None = None  # the text behind a cache that runs
        kept: Kept = (prompt, {}, None) if prompt.kept is None else prompt.kept
        self._first, keys, stand_in = kept
        self.keys = DecodingKeys(prompt.shape[0], self._first.shape[1], prompt.device)
        self.keys.by_layer, self.keys.stand_in = dict(keys), stand_in

    @property
    def channel(self) -> Channel:
        """The sequence-parallel group."""
        return self._prompt.channel

    @property
    def is_between(self) -> bool:
        """A forward is over, and none runs."""
        return self.step >= 0 and not self._in_forward

    @property
    def is_dealt(self) -> bool:
        """A rank has its part of the prompt, which is to run."""
        return self._prompt.part is not None

    @property
    def wanted(self) -> Tensor | None:
        """Which of this rank's tokens of a prompt need logits, int64, in a forward of such a part;
        else None."""
        return None if self._part is None else self._part.arguments["logits_to_keep"]

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
        if self.step == 0 and not given.get("output_hidden_states"):
            self._further = self._prompt.further
        if self._prompt.is_behind and self._further is None:
            self.keys.behind = self._rule_behind(given)
            self.keys.recent = self._recent_behind(given)
        if self.step == 0:
            records = self.channel.agree({"rows of the batch": len(input_ids)}, wrong)
            require_same(records, records[0], what="ds_lvx.generate")
            self.keys.copies = len(input_ids) // self._prompt.shape[0]
            arguments = {**self._prompt.arguments, **self._first_batch(given)}
            self._prompt, self._first = self._prompt.without_units(), self._first.without_units()
            return arguments
        if wrong is not None:
            raise wrong
        if self._later is None:
            self._later = self._batch(LAST)
        step = move(torch.tensor([self.step], dtype=torch.int64, device="cpu"), input_ids.device)
        numbers = torch.cat([step, input_ids[:, 0].to(torch.int64)])
        self.keys.witness = Witness(numbers, self._compare)
        return {KEYWORD: self._in_windows(self._later, given)}

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

    def _rule_behind(self, given: Mapping[str, Any], window: int | None = None) -> Rule | None:
        ids: Tensor = given["input_ids"]
        length = self.keys.first_tokens
        mask = given["attention_mask"][:, length:] if self._prompt.gaps else None
        past = given["past_key_values"].get_seq_length() - length
        return causal(mask, ids, past=past, window=window)

    def _recent_behind(self, given: Mapping[str, Any]) -> tuple[int, Rule | None]:
        """See `DecodingKeys.recent`."""
        assert self._prompt.text is not None, "it is behind one"
        window = self._prompt.text.window
        if window is None:
            return 0, None
        past = given["past_key_values"].get_seq_length() - self.keys.first_tokens
        return max(past - window + 1, 0), self._rule_behind(given, window)

    def _in_windows(self, batch: ShardedBatch, given: Mapping[str, Any]) -> ShardedBatch:
        """With what this forward's tokens see in layers with a window."""
        prompt, copies = self._prompt, self.keys.copies
        if not prompt.is_behind or prompt.text is None or prompt.text.window is None:
            return batch
        layout = prompt.text.recent(
            self.channel,
            given["input_ids"].shape[1],
            past=given["past_key_values"].get_seq_length(),
            copies=copies,
            device=prompt.device,
        )
        return replace(batch, others={**batch.others, RECENT: layout})

    def _batch(self, tokens: slice) -> ShardedBatch:
        return self._prompt.batch(tokens, copies=self.keys.copies, decoding=self.keys)

    def _first_batch(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword of the prompt's forward, and the part of its text where that is split."""
        self._part = self._prompt.part
        if self._part is not None:
            keyword = replace(self._part.keyword, decoding=self.keys)
            return {**self._part.arguments, KEYWORD: keyword}
        if self._further is not None:
            self.keys.run = self._further.run
            return self._cut(given, self._further.keyword)
        if self._prompt.split is not None and given.get("output_hidden_states"):
            self._whole_text()
        split = self._prompt.split
        if split is None:
            return {KEYWORD: self._in_windows(self._batch(WHOLE), given)}
        self._split = split.text_lengths
        return self._cut(given, split)

    def _cut(self, given: Mapping[str, Any], keyword: ShardedBatch) -> dict[str, Any]:
        """This rank's part of a text that is split."""
        # Rows of a sample are the same until tokens are chosen.
        ids = given["input_ids"][:: self.keys.copies]
        positions = given.get("position_ids")
        if positions is None:
            positions = keyword.past + torch.arange(ids.shape[1], device=ids.device)[None]
        here = span(keyword.text_lengths, self.channel.rank)
        return {
            "input_ids": ids[:, here],
            "position_ids": positions[..., :: self.keys.copies, here],
            KEYWORD: replace(keyword, decoding=self.keys),
        }

    def _whole_text(self) -> None:
        """Every rank has the whole text."""
        self._prompt, self._first = (
            replace(prompt, split=None, text=None) for prompt in (self._prompt, self._first)
        )
        self.keys.only_of_images()

    def end_forward(self, cache: Any, output: Any) -> None:
        """A forward of the model is over: after that of the prompt all layers have their keys.

        Args:
            cache: transformers' own.
            output: of the model. After a prompt that was split, every rank gets the logits of its
                last token, and in the cache K and V of all where they do not stay sharded.

        Collectives: after such a prompt those of `text_keys.gather`, and an all-gather of logits;
            after one that stays sharded that of logits alone.
        """
        self._in_forward, self.keys.features = False, None
        lengths, self._split = self._split, None
        part, self._part = self._part, None
        further, self._further = self._further, None
        if part is not None:
            output.logits = part.logits(output.logits, self.keys.copies)
            text_keys.leave_behind(cache, self.keys.first_tokens)
        if further is not None:
            self._settle_further(cache, further)
        elif lengths is not None:
            self._settle_split(cache, lengths)
        else:
            return
        last = [output.logits[:, -1:].contiguous()]
        everyones = self.channel.gather_rows(last, [1], (1,) * self.channel.size).wait()[0]
        output.logits = everyones[:, -1:].repeat_interleave(self.keys.copies, dim=0)

    def _settle_split(self, cache: Any, lengths: tuple[int, ...]) -> None:
        """Leave keys of a prompt that was split where they stay."""
        rows = self._prompt.shape[0] * self.keys.copies
        if text_keys.stay(self._prompt.text_keys, cache, self.keys.first_tokens, rows):
            text_keys.leave_behind(cache, self.keys.first_tokens)
        else:
            text_keys.gather(cache, self.channel, lengths, copies=self.keys.copies)
            self._whole_text()

    def _settle_further(self, cache: Any, further: Further) -> None:
        """Likewise of a text behind a cache: sharded if those before it are, or all are large."""
        held, first = further.held, self._first
        samples = first.shape[0]
        if first.text is None and not text_keys.stay(first.text_keys, cache, held.tokens, samples):
            lengths = further.keyword.text_lengths
            text_keys.gather(cache, self.channel, lengths, copies=1, past=further.whole)
            self.keys.only_of_images()
            return
        text_keys.leave_behind(cache, held.tokens)
        self.keys.first_tokens = held.tokens
        self._first = replace(first, text=held, shape=(samples, held.tokens))
        self._prompt = replace(self._prompt, text=held, gaps=False)

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
        goes_on = self.keys.copies == 1 and not self._prompt.prefix
        return (self._first, dict(self.keys.by_layer), self.keys.stand_in) if goes_on else None

    def release(self) -> None:
        """Let go of the keys."""
        self.keys.release()
        self._later = None

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
        rows = self._prompt.shape[0] * self.keys.copies
        numbers = torch.zeros(1 + rows, dtype=torch.int64, device="cpu")
        numbers[0], numbers[1] = state, number
        numbers = move(numbers, self._prompt.device)
        like = self.keys.message(of_text=self._prompt.text is not None)
        if like is not None:
            say(self.channel, like, Witness(numbers, compare))
            return
        one_each = (1,) * self.channel.size
        compare(self.channel.gather_rows([numbers[None]], [0], one_each).wait()[0])

    def _compare(self, everyones: Tensor) -> None:
        said = everyones.tolist()
        if any(each != said[0] for each in said):
            raise RuntimeError(f"ds_lvx.generate: {difference(said)}")
