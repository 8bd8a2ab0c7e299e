from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.data.chat import Conversation, read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.data.template import _find_answers
from ds_lvx.data.text import TextEncoder, _inside
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


# What Llama-3.2-Vision-Instruct's template does with a system text and with images.
LLAMA = (
    "{{ bos_token }}{% set ns = namespace(images=false) %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{% set ns.images = true %}{% endif %}{% endfor %}{% endfor %}"
    "{% if ns.images and system != '' %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}"
    "{% endif %}"
    "{% if system %}system: {{ system }}<|eot_id|>{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|eot_id|>{% endfor %}"
)
# Templates of text models know no parts.
STRINGS = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
PARTS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: "
    "{% for c in m.content %}{{ c.text }}{% endfor %}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [None, LLAMA, STRINGS, PARTS])
@pytest.mark.parametrize("system", ["Be brief. ", [{"type": "text", "text": "Be brief. "}]])
def test_a_system_text_is_written_as_the_template_takes_it(
    tmp_path: Path, template: str | None, system: Any
) -> None:
    record = chat(("text", "Who?"), answer="Me")
    record["messages"].insert(0, {"role": "system", "content": system})
    processor = tiny_processor()
    processor.chat_template = template
    encoder = _encoder(500, processor)
    encoded = encoder.encode(_conversation(tmp_path, record), [])
    text = encoder.tokenizer.decode(encoded.input_ids)
    assert text.startswith("<|begin_of_text|>")
    assert "ystem: Be brief." in text
    assert "{'type'" not in text
    assert "ser: Who?" in text


SAME = "{% for m in messages %}{{ m.content[-1].text }}<|eot_id|>{% endfor %}"
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }}\n{% endfor %}"
STRICT = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{{ m.content[-1].text }}<|eot_id|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        *((each, ()) for each in (None, LLAMA, STRICT)),
        (SAME, ("nothing in the text tells them apart",)),
        (ENDLESS, ("none is learnt that ends one",)),
        (SAME.replace("<|eot_id|>", " "), ("tells them apart", "that ends one")),
    ],
)
def test_a_template_by_which_chats_can_hardly_be_learnt(template: Any, told: Any) -> None:
    processor = tiny_processor()
    processor.chat_template = template
    doubts = _encoder(500, processor).doubts()
    assert len(doubts) == len(told)
    for doubt, part in zip(doubts, told, strict=True):
        assert part in doubt
        assert "give the checkpoint another chat template" in doubt


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES.named(name).has("tiny")])
def test_templates_of_our_own_leave_no_doubts(name: str) -> None:
    family = FAMILIES.named(name)
    assert TextEncoder(family.tiny()[1], 500, family=family).doubts() == []


def test_the_documents_examples_run_on_that_template(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / name).read_text() for name in ("fine-tuning.md", "data.md"))
    examples = re.findall(r"```json\n(\{\"messages\".*?)```", text, re.DOTALL)
    assert len(examples) == 4
    for name in ("clip.mp4", "clips/a.mp4", "stills/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    records = [json.loads(example) for example in examples]
    processor = tiny_processor()
    processor.chat_template = LLAMA
    for conversation in read_conversations(write_jsonl(tmp_path / "d.jsonl", *records)):
        _encoder(500, processor).encode(conversation, [1] * len(conversation.media))


def test_a_system_text_that_the_template_refuses_or_drops(tmp_path: Path) -> None:
    record = chat(("image", "a.png"), ("text", "Who?"))
    record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    dropped = "{% for m in messages if m.role != 'system' %}{{ m.content[-1].text }}{% endfor %}"
    for template, expected in (
        (LLAMA, r"incompatible with system.*; move the system text into the first user turn"),
        (dropped, r"does not write 'Be brief\.' as it is \(messages\[0\], role system\)"),
    ):
        processor = tiny_processor()
        processor.chat_template = template
        with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{expected}"):
            _encoder(500, processor).encode(_conversation(tmp_path, record), [1])


def test_an_answer_of_weight_0_is_not_learnt(tmp_path: Path) -> None:
    record = _two_turns()
    record["messages"][1]["weight"] = 0
    assert _learnt(_encoder(500), _conversation(tmp_path, record), [1]) == "Yes<|eot_id|>"


def test_twenty_thousand_answers_are_found_one_after_the_other() -> None:
    """Looked for from the start each time, they would take hours."""
    turns, end = 20_000, len("Yes") + len("<|end|>")
    written = "user: Is it?\nassistant: Yes<|end|>" * turns
    between = ["user: Is it?\nassistant: ", *["<|end|>user: Is it?\nassistant: "] * (turns - 1)]
    pieces = [piece for n, text in enumerate(between) for piece in (text, str(n))] + ["<|end|>"]
    spans = _find_answers(written, pieces, [" Yes "] * turns)
    assert spans is not None
    assert {written[start:stop] for start, stop in spans} == {"Yes"}
    letters = [(n, n + 1) for n in range(len(written))]
    learnt = _inside(letters, [(start, start + end) for start, _ in spans])
    assert "".join(written[place] for place in learnt) == "Yes<|end|>" * turns


def test_a_huge_text_is_refused_before_it_is_written(tmp_path: Path) -> None:
    conversation = _conversation(tmp_path, chat(("text", "x " * 10**6), answer="b"))
    encoder = _encoder(500)
    with pytest.raises(DataError, match=r"d\.jsonl:1: got at least \d{5,} tokens"):
        encoder.encode(conversation, [])


def test_a_long_text_is_tokenized_as_far_as_it_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder(500)
    real, lengths = encoder.tokenizer._encode_plus, []

    def encode(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return real(text, **options)

    monkeypatch.setattr(encoder.tokenizer, "_encode_plus", encode)
    conversation = _conversation(tmp_path, chat(("text", "x " * 3000), answer="b"))
    with pytest.raises(DataError, match=r"d\.jsonl:1: got at least \d{4} tokens"):
        encoder.encode(conversation, [])
    assert lengths == [2000]


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
