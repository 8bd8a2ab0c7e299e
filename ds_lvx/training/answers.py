"""Answers that a model in training gives to its evaluation data, beside their references."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ds_lvx
from ds_lvx.data.batch import Batch
from ds_lvx.data.chat import Chats, Conversation
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import told
from ds_lvx.models.generating.started import begins_with
from ds_lvx.models.precision import training_dtype
from ds_lvx.training.asking import Prompts, question, reference
from ds_lvx.training.ending import raise_if_asked
from ds_lvx.training.inputs import Inputs
from ds_lvx.training.options import Options

_WORD = re.compile(r"\w+")
Row = dict[str, Any]


class Answers:
    """Generates the answers to the first samples of the evaluation data.

    The last answer of each chat is asked for, greedily, as many samples at once as in training.

    Args:
        engine: of the run.
        inputs: of the run, with evaluation data.
        options: of the run.
        world: all ranks.
    """

    def __init__(self, engine: Any, inputs: Inputs, options: Options, *, world: Channel) -> None:
        assert inputs.evaluation is not None, "read_inputs has seen to it"
        self._engine, self._world = engine, world
        self._chats: Chats = inputs.evaluation
        self._sizes = inputs.sizes
        self._new_tokens = options.eval_new_tokens
        self._count = min(options.eval_generate, len(self._chats))
        groups = engine.ds_lvx.groups
        self._prompts = Prompts(
            inputs.encoder,
            inputs.rate,
            owned=ds_lvx.owned,
            dtype=training_dtype(inputs.ds_config),
            skip=options.on_bad_sample == "skip",
            limits=options.limits,
            deal=partial(inputs.encoder.family.owned, rank=groups.sp_rank, size=groups.sp_size),
        )

    def rows(self, asked: Callable[[], Mapping[str, Any]]) -> list[Row]:
        """All answers, on every rank, in the order of the data.

        Args:
            asked: whether this rank was asked to end, as a record.

        Returns:
            For each sample ``source``, ``question``, ``answer``, ``reference``, ``exact_match``
            and ``token_f1``.

        Raises:
            ValueError: a batch cannot be made; on all ranks.
            EndAskedError: a rank was asked to end.

        Collectives: an agreement a batch, and one at the end, on the control plane, and those of
            `ds_lvx.generate`.
        """
        groups, micro = self._engine.ds_lvx.groups, self._sizes.micro
        mine: list[tuple[int, Row]] = []
        for start in range(0, self._count, self._sizes.per_forward):
            first = start + groups.dp_rank * micro
            # Past the end the last sample again: all replicas run as many forwards.
            numbers = [min(n, self._count - 1) for n in range(first, first + micro)]
            (chats, batch), records = told(self._world, partial(self._batch, numbers, asked))
            raise_if_asked(records)
            found = [_row(c, a) for c, a in zip(chats, self._answer(batch.inputs), strict=True)]
            within = min(max(self._count - first, 0), micro)
            mine += zip(numbers[:within], found[:within], strict=True)
        shared = self._world.agree({"rows": mine if groups.sp_rank == 0 else []})
        everyone = [tuple(each) for record in shared for each in record["rows"]]
        return [row for _, row in sorted(everyone, key=lambda each: each[0])]

    def _batch(
        self, numbers: Sequence[int], asked: Callable[[], Mapping[str, Any]]
    ) -> tuple[tuple[list[Conversation], Batch], Row]:
        chats = [self._chats[number] for number in numbers]
        return (chats, self._prompts.batch(chats)), {**asked()}

    def _answer(self, inputs: Mapping[str, Any]) -> list[str]:
        tokens = ds_lvx.generate(
            self._engine,
            inputs,
            frames="local",
            max_new_tokens=self._new_tokens,
            do_sample=False,
            **self._prompts.ending(self._engine.module),
        )
        new = tokens[:, begins_with(inputs) :]
        texts: list[str] = self._prompts.encoder.tokenizer.batch_decode(
            new, skip_special_tokens=True
        )
        return texts


def means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of each score over all answers."""
    keys = ("exact_match", "token_f1")
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words of two texts, in any order, without case and punctuation.

    1.0 where neither has a word.
    """
    given, wanted = Counter(words(answer)), Counter(words(expected))
    common = (given & wanted).total()
    total = given.total() + wanted.total()
    return 2 * common / total if total else 1.0


def words(text: str) -> list[str]:
    """Its words, without case and punctuation."""
    return _WORD.findall(text.lower())


def _row(asked: Conversation, answer: str) -> Row:
    expected = reference(asked)
    return {
        "source": str(asked.source),
        "question": question(asked),
        "answer": answer,
        "reference": expected,
        "exact_match": float(words(answer) == words(expected)),
        "token_f1": token_f1(answer, expected),
    }
