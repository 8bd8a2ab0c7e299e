"""A conversation as tokens and labels: the loss is on what the assistant says, and nowhere else.

written   <|user|>Who is it?<|assistant|>A rabbit.<|end|>
learnt                                 ^^^^^^^^^^^^^^^^     answer, and end token
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ds_lvx.data.chat import Conversation
from ds_lvx.data.errors import DataError
from ds_lvx.data.template import ChatTemplate, Span
from ds_lvx.models.contract import Family
from ds_lvx.models.media import Shown

IGNORED = -100
_OFTEN = 4
"""Characters that a token often has."""
_ASKED = ("tokenizer", "image_token", "image_token_id", "chat_template")
"""Of a processor."""


@dataclass(frozen=True)
class EncodedText:
    """One sample as tokens.

    Attributes:
        input_ids: every token of the conversation, with a frame's image tokens.
        labels: the same, with -100 where nothing is learnt.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first that is learnt."""
        learnt = (place for place, label in enumerate(self.labels) if label != IGNORED)
        return self.input_ids[: next(learnt, None)]

    def shared(self, other: EncodedText) -> int:
        """Tokens that both may share: what both begin with, but for one whose next is learnt."""
        prompts = self.prompt, other.prompt
        pairs = zip(*prompts, strict=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return max(min(alike, *(len(prompt) - 1 for prompt in prompts)), 0)

    def with_repeated(self, tokens: Collection[int], times: Sequence[int]) -> EncodedText:
        """The same with each of some tokens, in order, written so many times."""
        if all(each == 1 for each in times):
            return self
        left = iter(times)
        each = [next(left) if here in tokens else 1 for here in self.input_ids]
        ids, labels = (
            [value for value, count in zip(values, each, strict=True) for _ in range(count)]
            for values in (self.input_ids, self.labels)
        )
        return EncodedText(ids, labels)


class TextEncoder:
    """Turns conversations into tokens with a checkpoint's own processor.

    Args:
        processor: a multimodal processor with a fast tokenizer.
        max_length: tokens that a sample may have.
        family: that the checkpoint belongs to.

    Raises:
        ValueError: the processor is another family's, or its tokenizer cannot say which characters
            a token stands for, or has no image token.
    """

    def __init__(self, processor: Any, max_length: int, *, family: Family) -> None:
        missing = [name for name in _ASKED if not hasattr(processor, name)]
        if missing:
            raise ValueError(
                f"got a {type(processor).__name__} without {', '.join(missing)}; expected the "
                f"processor of a {family.model_type!r}, as its family's load_processor has it"
            )
        self.processor = processor
        self.family = family
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self.max_length = max_length
        self._places = family.frame_places(processor)
        self._template = ChatTemplate.of(processor)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"got the tokenizer {type(self.tokenizer).__name__}; expected a fast one, which "
                "knows where tokens stand in the text; install `tokenizers` or add tokenizer.json"
            )
        if self.image_token_id in (None, self.tokenizer.unk_token_id):
            raise ValueError(
                f"got a tokenizer without {self.image_token}; expected that of a vision model; "
                "take the tokenizer that belongs to the checkpoint"
            )
        added = self.tokenizer.added_tokens_decoder.values()
        self._tokens = family.media_tokens(processor)
        special = {token.content for token in added if token.special} - {*self._tokens}
        # The longest first: one token may begin like another.
        ends = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._end_token = re.compile(rf"\s*+(?:{ends or '(?!)'})")
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))

    @property
    def pad_token_id(self) -> int:
        """The id for padding; it is masked, so any id serves where the tokenizer has none."""
        return 0 if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)

    @property
    def media_token_ids(self) -> set[int]:
        """The ids that stand for images and frames."""
        return {*self.tokenizer.convert_tokens_to_ids([*self._tokens])}

    @property
    def fingerprint(self) -> str:
        """Of all that decides how a text is written and tokenized; hexadecimal."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str()
        frame = (self.image_token, self._places)
        written = (self.family.model_type, frame, self._template.text, tokenizer)
        return hashlib.sha256(repr(written).encode()).hexdigest()

    def doubts(self) -> list[str]:
        """What of the chat template a chat can hardly be learnt by, a sentence each; mostly none.

        A user's turn in the place of the assistant's shows whether it tells the two apart.
        """
        said, answer = "lvxsaidprobe", "lvxanswerprobe"
        own, other = (self._template.exchange(said, answer, by=by) for by in ("assistant", "user"))
        if own is None or answer not in own:
            return []
        found = []
        advice = "give the checkpoint another chat template (chat_template.jinja)"
        if own == other:
            found.append(
                "the chat template writes what the assistant says as what the user says: nothing "
                f"in the text tells them apart; where chats have several turns, {advice}"
            )
        if self._end_token.match(own, own.index(answer) + len(answer)) is None:
            found.append(
                "the chat template writes no special token behind an answer: none is learnt that "
                f"ends one, and what is generated goes on to the limit; {advice}"
            )
        return found

    def encode(
        self,
        conversation: Conversation,
        frame_counts: Sequence[int],
        times: Sequence[Sequence[float] | None] = (),
        shown: Sequence[Shown] = (),
    ) -> EncodedText:
        """Write, tokenize and label one conversation.

        Args:
            conversation: the sample.
            frame_counts: frames of each of its media, in their order; an image counts one.
            times: seconds of the frames of each medium, None for an image; where there are none,
                the frames of a video are images.
            shown: what each medium is in the text, where the family says it by their sizes.

        Raises:
            DataError: the text is longer than ``max_length``, holds the image token itself, or
                the template does not write what the conversation says.
        """
        # Of each token that stands for a frame, or for some.
        places = [n for each in shown for n in each.tokens]
        places = places if shown else [self._places] * sum(frame_counts)
        self._refuse_huge(conversation, places)
        given = times or [None] * len(frame_counts)
        texts: list[str | None] = [each.text for each in shown]
        texts = texts or [self.family.media_text(self.processor, each) for each in given]
        media = [
            count if text is None else text for count, text in zip(frame_counts, texts, strict=True)
        ]
        text, spans = self._write(conversation, media)
        start = text[: _OFTEN * self.max_length]
        if start != text:
            found = self.tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
            least = len(found) - self._longest_token  # where it is cut, a token may be many
            if least > self.max_length:  # the rest is not tokenized, at 80 times its memory
                raise self._too_long(conversation, f"at least {least}", places)
        self._check_images(conversation, text, len(places))
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        length = len(ids) + sum(places) - len(places)
        if length > self.max_length:
            raise self._too_long(conversation, str(length), places)
        labels, visual = [IGNORED] * len(ids), self.media_token_ids
        for place in _inside(offsets, spans):
            if ids[place] not in visual:
                labels[place] = ids[place]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError.at(
                conversation.source,
                got="no token to learn",
                expected="an answer of at least one token",
                do="write the assistant's text out",
            )
        return EncodedText(ids, labels).with_repeated(visual, places)

    def _refuse_huge(self, conversation: Conversation, places: Sequence[int]) -> None:
        """Refuse what cannot be short enough, before it is written: no token is longer than all."""
        said = [len(message.text.strip()) for message in conversation.messages]
        least = max(sum(said) // self._longest_token, sum(map(bool, said)))
        least += sum(places)
        if least > self.max_length:
            raise self._too_long(conversation, f"at least {least}", places)

    def _write(
        self, conversation: Conversation, media: Sequence[int | str]
    ) -> tuple[str, list[Span]]:
        """The text, and where in it that stands which is learnt."""
        written, spans = self._template.write(conversation, media)
        learnt = [m.learnt for m in conversation.messages if m.role == "assistant"]
        ends = [self._with_end_token(written, end) for _, end in spans]
        text = self.family.finish_text(self.processor, written)
        shift = len(text) - len(written)
        return text, [
            (start + shift, end + shift)
            for (start, _), end, kept in zip(spans, ends, learnt, strict=True)
            if kept
        ]

    def _with_end_token(self, text: str, end: int) -> int:
        """Past the special token that ends an answer, where one follows at once."""
        ending = self._end_token.match(text, end)
        return end if ending is None else ending.end()

    def _too_long(
        self, conversation: Conversation, tokens: str, places: Sequence[int]
    ) -> DataError:
        return DataError.at(
            conversation.source,
            got=f"{tokens} tokens ({sum(places)} of them frames)",
            expected=f"at most {self.max_length} (--max_length, the model's positions)",
            do="shorten the text, take fewer frames, or raise --max_length if the model allows",
        )

    def _check_images(self, conversation: Conversation, text: str, frames: int) -> None:
        found, token = sum(map(text.count, self._tokens)), " or ".join(self._tokens)
        if found != frames:
            raise DataError.at(
                conversation.source,
                got=f"{found} {token} in the text for {frames} frames",
                expected="one for each",
                do=f"take {token} out of the messages (frames get theirs by the "
                "template), or use a chat template that writes one for each image",
            )


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Tokens that share a character with a span; one without characters counts where it stands.

    Args:
        offsets: characters of each token.
        spans: in order, none in another.
    """
    ends = [end for _, end in spans]
    inside = []
    for place, (first, last) in enumerate(offsets):
        n = bisect_right(ends, first)
        if n < len(spans) and spans[n][0] < max(last, first + 1):
            inside.append(place)
    return inside
