"""A conversation written by a chat template, and where in the text its answers stand.

Which characters are the assistant's is found by writing the text a second time with a marker in the
place of each answer, so that any template works that copies answers verbatim or stripped, whatever
it makes of the rest::

    written   <|user|>Who is it?<|assistant|>A rabbit.<|end|>
    marked    <|user|>Who is it?<|assistant|>#0#<|end|>
    answer                                 ^^^^^^^^^

All of it takes time and memory linear in the text, however many answers there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import count, product
from typing import Any, NamedTuple, Self

from ds_lvx.data.conversation import Conversation, Message, Part
from ds_lvx.data.errors import DataError, Source, shown

Span = tuple[int, int]

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
_AS_IT_IS = "the text, verbatim or stripped of white space at its ends"
# What templates raise for a conversation that they were not made for.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError)


class ChatTemplate:
    """Writes conversations.

    Args:
        tokenizer: a tokenizer with ``apply_chat_template``.
        template: Jinja; None takes `SIMPLE_TEMPLATE`.
        image_token: for `SIMPLE_TEMPLATE`.

    Attributes:
        text: the template.
    """

    def __init__(self, tokenizer: Any, template: str | None, *, image_token: str) -> None:
        self._tokenizer = tokenizer
        self.text = template or SIMPLE_TEMPLATE.replace("IMAGE", image_token)

    @classmethod
    def of(cls, processor: Any) -> ChatTemplate:
        """That of a checkpoint's processor."""
        template = processor.chat_template or processor.tokenizer.chat_template
        return cls(processor.tokenizer, template, image_token=processor.image_token)

    def write(
        self, conversation: Conversation, media: Sequence[int | str]
    ) -> tuple[str, list[Span]]:
        """Write a conversation.

        Args:
            conversation: the sample.
            media: for each of its media, in their order, how many images it is (one for each frame
                of a video), or the text that stands for it.

        Returns:
            The text, and for each message of the assistant the characters that are its answer.

        Raises:
            DataError: the template refuses the conversation, or leaves out or alters a text.
        """
        messages, source = conversation.messages, conversation.source
        answers = [message.text for message in messages if message.role == "assistant"]
        stands = Stands.of(conversation, media)
        given = template_input(messages, stands.names, self._takes_parts)
        written = stands.replaced(self._render(given, source))
        _check_whole(conversation, written)
        # A word that stands nowhere in the text.
        word = next(w for w in (f"lvx{n}answer" for n in count()) if w not in written)
        marks = [f"{word}{n}mark" for n in range(len(answers))]
        given = template_input(messages, stands.names, self._takes_parts, marks=marks)
        pieces = re.split(rf"{word}(\d+)mark", stands.replaced(self._render(given, source)))
        spans = _find_answers(written, pieces, answers)
        if spans is None:
            raise DataError.at(
                source,
                got="a chat template that does not write the assistant's text as it is",
                expected=_AS_IT_IS,
                do="give the processor another chat template",
            )
        return written, spans

    def exchange(self, said: str, answer: str, *, by: str) -> str | None:
        """What a user says and an answer of the role ``by``; None where the template refuses it."""
        turns = (("user", said), (by, answer))
        chat = [Message(role, (Part("text", text),)) for role, text in turns]
        try:
            return self._render(template_input(chat, (), self._takes_parts), "")
        except DataError:
            return None

    @cached_property
    def _takes_parts(self) -> Mapping[str, bool]:
        """For each role, whether the template takes text as a list of parts; else as a string.

        Some write a list as Python does, some take the characters of a string for parts. Found by
        writing a short chat in both forms; a system text is a string where both serve.
        """
        roles = ("system", "user", "assistant")
        chat = [Message(role, (Part("text", f"lvx{role}probe"),)) for role in roles]
        for messages, turns, system in product((chat, chat[1:]), (True, False), (False, True)):
            takes = {"system": system, "user": turns, "assistant": turns}
            try:
                written = self._render(template_input(messages, (), takes), "")
            except DataError:
                continue
            as_python = re.search(r"""['"]text['"]: ['"]lvx""", written)
            if as_python is None and all(message.text in written for message in messages):
                return takes
        return {"system": False, "user": True, "assistant": True}

    def _render(self, messages: list[dict[str, Any]], source: Source | str) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=self.text, tokenize=False
                )
            )
        except (TemplateError, *_REFUSALS) as error:
            do = "rewrite the conversation"
            has_media = any({"type": "image"} in list(m["content"]) for m in messages)
            if has_media and messages[0]["role"] == "system":
                do = (
                    "move the system text into the first user turn: this template may take none "
                    "beside images"
                )
            raise DataError.at(
                source,
                got=f"a conversation that the chat template refuses ({str(error)[:200]})",
                expected="roles in the order that the model was trained with",
                do=do,
            ) from None


class Stands(NamedTuple):
    """Media of a conversation, each a word while a template writes: that may strip what it is given
    of white space, and a processor writes media once a template is done.

    Attributes:
        names: words, or how many images a medium is.
        word: that they begin with.
        texts: by number.
    """

    names: tuple[int | str, ...]
    word: str
    texts: Sequence[int | str]

    @classmethod
    def of(cls, conversation: Conversation, media: Sequence[int | str]) -> Self:
        """Words that stand nowhere in it."""
        said = [part.value for message in conversation.messages for part in message.parts]
        words = (f"lvx{n}medium" for n in count())
        word = next(each for each in words if not any(each in text for text in said))
        names = (
            f"{word}{n}stand" if isinstance(each, str) else each for n, each in enumerate(media)
        )
        return cls((*names,), word, media)

    def replaced(self, written: str) -> str:
        """With the media in the place of the words."""
        return re.sub(rf"{self.word}(\d+)stand", lambda m: str(self.texts[int(m[1])]), written)


def template_input(
    messages: Sequence[Message],
    media: Sequence[int | str],
    takes_parts: Mapping[str, bool],
    *,
    marks: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The messages as chat templates take them; a video is text, or an image for each frame.

    Args:
        messages: of a conversation.
        media: of the conversation, in order: images, or the text that stands for a medium.
        takes_parts: by role; where it is False, text without media is a string.
        marks: what stands in the place of the answers.
    """
    stands, names = iter(media), iter(marks or ())
    given: list[dict[str, Any]] = []
    for message in messages:
        answers = message.role == "assistant"
        # An answer is one part, whatever it was written as.
        texts = (message.text if marks is None else next(names),) if answers else ()
        content: list[dict[str, str]] = [{"type": "text", "text": text} for text in texts]
        for part in () if answers else message.parts:
            if part.kind == "text":
                content.append({"type": "text", "text": part.value})
                continue
            stand = next(stands)
            if isinstance(stand, str):
                content.append({"type": "text", "text": stand})
            else:
                content += [{"type": "image"}] * stand
        text_alone = all(part["type"] == "text" for part in content)
        if text_alone and not takes_parts[message.role]:
            whole = "".join(part["text"] for part in content)
            given.append({"role": message.role, "content": whole})
        else:
            given.append({"role": message.role, "content": content})
    return given


def _check_whole(conversation: Conversation, written: str) -> None:
    """Refuse a template that leaves out or alters what somebody says."""
    place = 0
    for number, message in enumerate(conversation.messages):
        for part in message.parts:
            said = part.value.strip() if part.kind == "text" else ""
            found = written.find(said, place)
            # Some put the system text elsewhere.
            found = written.find(said) if found < 0 else found
            if found < 0:
                raise DataError.at(
                    conversation.source,
                    got=f"a chat template that does not write {shown(said)} as it is "
                    f"(messages[{number}], role {message.role})",
                    expected=_AS_IT_IS,
                    do="move it into a turn that the template writes, or give the processor "
                    "another chat template",
                )
            place = found + len(said)


def _find_answers(written: str, pieces: Sequence[str], answers: Sequence[str]) -> list[Span] | None:
    """Characters of each answer in ``written``; None where the two texts do not agree.

    Args:
        written: the text.
        pieces: of the marked text: what stands before the first mark, number of the mark, what
            follows it, and so on.
        answers: in their order.
    """
    between, numbers = pieces[::2], pieces[1::2]
    if numbers != [str(n) for n in range(len(answers))] or not written.startswith(between[0]):
        return None
    spans, place = [], len(between[0])
    for answer, follows in zip(answers, between[1:], strict=True):
        for form in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
            end = place + len(form)
            if written.startswith(form, place) and written.startswith(follows, end):
                break
        else:
            return None
        spans.append((place, end))
        place = end + len(follows)
    return spans if place == len(written) else None
