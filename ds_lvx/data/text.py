"""A conversation as tokens and labels: the loss is on what the assistant says, and nowhere else.

The chat template of the processor writes the text. Which characters of it are the assistant's is
found by writing it a second time with a marker in the place of each answer, so that any template
works that copies answers verbatim or stripped, whatever it makes of the rest::

    written   <|user|>Who is it?<|assistant|>A rabbit.<|end|>
    marked    <|user|>Who is it?<|assistant|>#0#<|end|>
    learnt                                 ^^^^^^^^^^^^^^^^     answer, and end token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_lvx.data.chat import Conversation
from ds_lvx.data.errors import DataError
from ds_lvx.models.contract import Family

IGNORED = -100

# For checkpoints without a chat template of their own (base models); IMAGE is their image token.
SIMPLE_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@dataclass(frozen=True)
class EncodedText:
    """One sample as tokens.

    Attributes:
        input_ids: every token of the conversation, one image token a frame.
        labels: the same, with -100 where nothing is learnt.
    """

    input_ids: list[int]
    labels: list[int]


class TextEncoder:
    """Turns conversations into tokens with a checkpoint's own processor.

    Args:
        processor: a multimodal processor with a fast tokenizer.
        max_length: tokens that a sample may have.
        family: that the checkpoint belongs to.

    Raises:
        ValueError: the tokenizer cannot say which characters a token stands for, or has no image
            token.
    """

    def __init__(self, processor: Any, max_length: int, *, family: Family) -> None:
        self.processor = processor
        self.family = family
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self.max_length = max_length
        template = processor.chat_template or self.tokenizer.chat_template
        self._template = template or SIMPLE_TEMPLATE.replace("IMAGE", self.image_token)
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
        special = {token.content for token in added if token.special} - {self.image_token}
        # The longest first: one token may begin like another.
        self._special = sorted(special, key=len, reverse=True)

    @property
    def pad_token_id(self) -> int:
        """The id for padding; it is masked, so any id serves where the tokenizer has none."""
        return 0 if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)

    def encode(self, conversation: Conversation, frame_counts: Sequence[int]) -> EncodedText:
        """Write, tokenize and label one conversation.

        Args:
            conversation: the sample.
            frame_counts: frames of each of its media, in their order; an image counts one.

        Raises:
            DataError: the text is longer than ``max_length``, holds the image token itself, or
                the template does not write what the conversation says.
        """
        text, spans = self._write(conversation, frame_counts)
        self._check_images(conversation, text, sum(frame_counts))
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        if len(ids) > self.max_length:
            raise DataError.at(
                conversation.source,
                got=f"{len(ids)} tokens ({sum(frame_counts)} of them frames)",
                expected=f"at most {self.max_length} (--max_length, the model's positions)",
                do="shorten the text, take fewer frames, or raise --max_length if the model allows",
            )
        labels = [IGNORED] * len(ids)
        for place in _inside(offsets, spans):
            if ids[place] != self.image_token_id:
                labels[place] = ids[place]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError.at(
                conversation.source,
                got="no token to learn",
                expected="an answer of at least one token",
                do="write the assistant's text out",
            )
        return EncodedText(ids, labels)

    def _write(
        self, conversation: Conversation, frame_counts: Sequence[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it the answers stand."""
        answers = [m.text for m in conversation.messages if m.role == "assistant"]
        written = self._render(_as_template_input(conversation, frame_counts, None), conversation)
        marks = [f"lvx{len(written)}answer{n}mark" for n in range(len(answers))]
        marked = self._render(_as_template_input(conversation, frame_counts, marks), conversation)
        spans = _find_answers(written, marked, answers, marks)
        if spans is None:
            raise DataError.at(
                conversation.source,
                got="a chat template that does not write the assistant's text as it is",
                expected="the text, verbatim or stripped of white space at its ends",
                do="give the processor another chat template",
            )
        spans = [(start, self._with_end_token(written, end)) for start, end in spans]
        text = self.family.finish_text(self.processor, written)
        shift = len(text) - len(written)
        return text, [(start + shift, end + shift) for start, end in spans]

    def _render(self, messages: list[dict[str, Any]], conversation: Conversation) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False
                )
            )
        except (TemplateError, TypeError) as error:  # what templates raise for roles they lack
            raise DataError.at(
                conversation.source,
                got=f"a conversation that the chat template refuses ({error})",
                expected="the order of roles that the model was trained with",
                do="rewrite the conversation",
            ) from None

    def _with_end_token(self, text: str, end: int) -> int:
        """Past the special token that ends an answer, where one follows at once."""
        start = end + len(text[end:]) - len(text[end:].lstrip())
        ending = next((token for token in self._special if text.startswith(token, start)), None)
        return end if ending is None else start + len(ending)

    def _check_images(self, conversation: Conversation, text: str, frames: int) -> None:
        found = text.count(self.image_token)
        if found != frames:
            raise DataError.at(
                conversation.source,
                got=f"{found} {self.image_token} in the text for {frames} frames",
                expected="one for each",
                do=f"take {self.image_token} out of the messages (frames get theirs by the "
                "template), or use a chat template that writes one for each image",
            )


def _as_template_input(
    conversation: Conversation, frame_counts: Sequence[int], marks: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The messages as chat templates take them: a video is as many images as it has frames."""
    counts, names = iter(frame_counts), iter(marks or ())
    messages = []
    for message in conversation.messages:
        content: list[dict[str, str]] = []
        for part in message.parts:
            if part.kind == "text":
                content.append({"type": "text", "text": part.value})
            else:
                content += [{"type": "image"}] * next(counts)
        if message.role == "assistant":
            text = message.text if marks is None else next(names)
            content = [{"type": "text", "text": text}]
        messages.append({"role": message.role, "content": content})
    return messages


def _find_answers(
    written: str, marked: str, answers: Sequence[str], marks: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Characters of each answer in ``written``; None where the two texts do not agree."""
    spans, place, rest = [], 0, marked
    for answer, mark, next_mark in zip(answers, marks, [*marks[1:], None], strict=True):
        before, found, rest = rest.partition(mark)
        if not found or not written.startswith(before, place):
            return None
        place += len(before)
        follows = rest if next_mark is None else rest.partition(next_mark)[0]
        forms = (answer, answer.strip(), answer.rstrip(), answer.lstrip())
        form = next((f for f in forms if written.startswith(f + follows, place)), None)
        if form is None:
            return None
        spans.append((place, place + len(form)))
        place += len(form)
    return spans if written[place:] == rest else None


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that share a character with a span; one without characters counts where it stands."""
    return [
        place
        for place, (first, last) in enumerate(offsets)
        if any(first < end and max(last, first + 1) > start for start, end in spans)
    ]
