from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data.chat import Conversation, read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.models.mllama.tiny import tiny_processor
from tests.data.media import chat, write_image, write_jsonl

MLLAMA = FAMILIES.named("mllama")


def _encoder(max_length: int, processor: Any = None) -> TextEncoder:
    processor = tiny_processor() if processor is None else processor
    return TextEncoder(processor, max_length, family=MLLAMA)


def _conversation(folder: Path, record: dict[str, Any]) -> Conversation:
    write_image(folder / "a.png")
    return read_conversations(write_jsonl(folder / "d.jsonl", record))[0]


def _two_turns() -> dict[str, Any]:
    record = chat(("image", "a.png"), ("text", "Où?"), answer="  In a café. ")
    again = chat(("text", "lvx9answer0mark?"), answer="Yes")
    return {"messages": record["messages"] + again["messages"]}


def _learnt(encoder: TextEncoder, conversation: Conversation, counts: list[int]) -> str:
    encoded = encoder.encode(conversation, counts)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (-100, token)
    return encoder.tokenizer.decode([label for label in encoded.labels if label != -100])


def test_only_answers_and_their_end_are_learnt(tmp_path: Path) -> None:
    encoder = _encoder(500)
    conversation = _conversation(tmp_path, _two_turns())
    assert _learnt(encoder, conversation, [3]) == "In a café.<|eot_id|>Yes<|eot_id|>"
    text = encoder.tokenizer.decode(encoder.encode(conversation, [3]).input_ids)
    assert text.count("<|image|>") == 3
    assert text.count("<|begin_of_text|>") == 1


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (None, "  In a café. <|eot_id|>Yes<|eot_id|>"),
        (
            # ChatML with a line before the end token, and what a first message decides
            "{% if messages[0].content[0].type == 'image' %}<|image|>{% endif %}"
            "{% for m in messages %}[{{ m.role }}]\n{{ m.content[-1].text.strip() }}\n"
            "<|end_of_text|>{% endfor %}",
            "In a café.\n<|end_of_text|>Yes\n<|end_of_text|>",
        ),
        (
            "<|image|>{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }} | {% endfor %}",
            "  In a café. Yes",
        ),
    ],
)
def test_any_template_that_copies_answers(tmp_path: Path, template: Any, learnt: str) -> None:
    processor = tiny_processor()
    processor.chat_template = template
    encoder = _encoder(500, processor)
    assert _learnt(encoder, _conversation(tmp_path, _two_turns()), [1]) == learnt


def test_text_that_does_not_fit(tmp_path: Path) -> None:
    conversation = _conversation(tmp_path, _two_turns())
    length = len(_encoder(500).encode(conversation, [1]).input_ids)
    _encoder(length).encode(conversation, [1])
    with pytest.raises(DataError, match=rf"d\.jsonl:1: got {length} tokens \(1 of them frames\)"):
        _encoder(length - 1).encode(conversation, [1])


def test_what_the_template_cannot_write_is_named(tmp_path: Path) -> None:
    written_out = _conversation(tmp_path, chat(("text", "is this <|image|> one?")))
    with pytest.raises(DataError, match=r"d\.jsonl:1: got 1 <\|image\|> in the text for 0 frames"):
        _encoder(500).encode(written_out, [])
    for template, expected in (
        ("{% for m in messages %}{{ m.content[-1].text | upper }}{% endfor %}", "as it is"),
        ("{{ raise_exception('user first') }}", "refuses .user first"),
    ):
        processor = tiny_processor()
        processor.chat_template = template
        with pytest.raises(DataError, match=expected):
            _encoder(500, processor).encode(_conversation(tmp_path, _two_turns()), [1])


def test_the_tokenizer_must_fit() -> None:
    processor = tiny_processor()
    processor.image_token_id = None
    with pytest.raises(ValueError, match=r"without <\|image\|>"):
        _encoder(10, processor)
