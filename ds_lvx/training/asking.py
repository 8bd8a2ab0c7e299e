"""What `launch/generate.py` asks: a question of the command line, or the lines of a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ds_lvx.data.batch import BatchMaker, FrameRate, Sample
from ds_lvx.data.chat import Chats
from ds_lvx.data.conversation import Conversation, Message, Part
from ds_lvx.data.errors import DataError
from ds_lvx.data.extras import need
from ds_lvx.data.text import IGNORED, EncodedText
from ds_lvx.models.generating.text_keys import AUTO, WORDS
from ds_lvx.training.arguments import above, add_format, add_load_in_4bit, add_rate, from_
from ds_lvx.training.chatting import OPEN, conversation
from ds_lvx.training.merging import CONFIG, base_of


@dataclass(frozen=True)
class Options:
    """What the user asked for; `parser` has the meaning of each."""

    model: str
    adapter: str | None
    trust_remote_code: bool
    load_in_4bit: bool
    deepspeed_config: str
    chat: bool
    prompt: str | None
    image: list[str]
    video: list[str]
    data: str | None
    format: str | None
    media_root: str | None
    fps: float | None
    frames: int | None
    max_frames: int | None
    max_length: int | None
    max_new_tokens: int
    text_keys: str
    temperature: float
    seed: int
    output: str | None
    traceback: bool

    @property
    def rate(self) -> FrameRate:
        """Which frames of a video are taken."""
        return FrameRate.asked(self)

    @property
    def media(self) -> tuple[Part, ...]:
        """Images and videos of the command line."""
        images = [Part("image", path) for path in self.image]
        return (*images, *(Part("video", path) for path in self.video))

    def conversations(self) -> Iterator[Conversation]:
        """What is asked, one conversation after the other; of a chat whose questions are typed
        what it starts with.

        Raises:
            DataError: of the file of chats, with its line.
        """
        if self.data is not None:
            chats = Chats(self.data, format=self.format, media_root=self.media_root)
            yield from (chats[index] for index in range(len(chats)))
            return
        yield conversation(self.media, [("?" if self.prompt is None else self.prompt, OPEN)])

    def reference(self, conversation: Conversation) -> str | None:
        """The answer that a line of the file has."""
        return None if self.data is None else reference(conversation)


def with_base(options: Options) -> Options:
    """The options, where ``--model`` is the folder of an adapter, with its base and the adapter.

    Raises:
        ValueError: the adapter names no base, or peft is not installed.
    """
    folder = Path(options.model)
    is_whole = (folder / "config.json").exists()
    if options.adapter is not None or is_whole or not (folder / CONFIG).is_file():
        return options
    need("peft", "lora", why="--model")
    return replace(options, model=base_of(folder, option="--model"), adapter=options.model)


def reference(conversation: Conversation) -> str:
    """What the last answer of a chat is."""
    return _asked(conversation)[1].text


def question(conversation: Conversation) -> str:
    """What the user says last."""
    return _asked(conversation)[0].text


def check_asked(conversation: Conversation) -> None:
    """Refuse a chat whose last answer cannot be asked for.

    Raises:
        DataError: images or videos come after it.
    """
    after = conversation.messages[_place(conversation) :]
    if any(part.kind != "text" for message in after for part in message.parts):
        raise DataError.at(
            conversation.source,
            got="images or videos after the last answer",
            expected="all of them before it",
            do="end the chat with the answer that is asked for",
        )


def _of_tokens(value: Any, ids: Tensor) -> bool:
    """Whether it has an entry for each token of a text."""
    return isinstance(value, Tensor) and value.shape[:2] == ids.shape


def _place(conversation: Conversation) -> int:
    """Of the last answer that is learnt."""
    numbered = enumerate(conversation.messages)
    return max(n for n, m in numbered if m.role == "assistant" and m.learnt)


def _asked(conversation: Conversation) -> tuple[Message, Message]:
    """The last answer that is learnt, and what the user says before it."""
    messages, place = conversation.messages, _place(conversation)
    before = [message for message in messages[:place] if message.role == "user"]
    return (before[-1] if before else Message("user", ())), messages[place]


class Prompts(BatchMaker):
    """Makes batches that end where the last answer begins, padded at the beginning.

    Attributes:
        shows: a terminal is told how many frames are decoded.
    """

    pads_left = True
    shows = False

    def sample(self, conversation: Conversation) -> Sample:
        """See `BatchMaker.sample`.

        Raises:
            DataError: likewise; and for images or videos that come after the answer.
        """
        check_asked(conversation)
        whole = super().sample(conversation)
        ids, labels = whole.text.input_ids, whole.text.labels
        end = max(place for place, label in enumerate(labels) if label != IGNORED)
        while end > 0 and labels[end - 1] != IGNORED:
            end -= 1
        return replace(whole, text=EncodedText(ids[:end], [IGNORED] * end))

    def text(self, conversation: Conversation) -> dict[str, Any]:
        """The text of a prompt alone, as `batch` has it. Decodes nothing.

        Raises:
            DataError: as of `batch`.
        """
        inputs = self._text([self._sample(conversation)])
        return {k: v for k, v in inputs.items() if k not in self.encoder.family.keys}

    def lasting(self, conversation: Conversation, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Of the batch of a prompt what stays as it is when the chat goes on: some templates write
        the last answer's turn otherwise than those before it, as where models may think first.

        Args:
            conversation: with the answer that is asked for.
            inputs: its `batch`.

        Returns:
            Its first tokens, or all of them, and its images and videos.
        """
        more = (Message("user", (Part("text", OPEN),)), conversation.messages[-1])
        longer = replace(conversation, messages=(*conversation.messages, *more))
        ids = inputs["input_ids"]
        try:
            others = self.text(longer)["input_ids"][:, : ids.shape[1]]
        except DataError:  # there is room for one question
            return {**inputs}
        differ = (ids[:, : others.shape[1]] != others).any(dim=0).nonzero()[:1]
        end = int(differ) if len(differ) > 0 else ids.shape[1]
        return {k: v[:, :end] if _of_tokens(v, ids) else v for k, v in inputs.items()}

    def _pictures(self, sample: Sample, mine: Sequence[int]) -> Iterator[Any]:
        total = sum(number < sample.num_frames for number in mine)
        silent = None if self.shows else True  # None: where there is no terminal
        pictures = super()._pictures(sample, mine)
        yield from tqdm(
            pictures, total=total, desc="decoding", unit="frame", leave=False, disable=silent
        )

    def ending(self, model: Any) -> dict[str, Any]:
        """The token that ends an answer, where the generation config of ``model`` names none."""
        family, end = self.encoder.family, self.encoder.tokenizer.eos_token_id
        config = family.generator(family.find(model)).generation_config
        return {} if end is None or config.eos_token_id is not None else {"eos_token_id": end}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Raises:
        SystemExit: with a usage message.
    """
    top = parser()
    values = vars(top.parse_args(arguments))
    del values["local_rank"]
    if values["chat"] and values["data"] is not None:
        top.error("got --chat with --data, whose lines are chats of their own")
    if not values["chat"] and (values["prompt"] is None) == (values["data"] is None):
        top.error("got --prompt and --data, or neither; expected one of them, or --chat")
    if values["data"] is not None and (values["image"] or values["video"]):
        top.error("got --image or --video with --data, whose lines name their own")
    options = Options(**values)
    try:
        FrameRate.asked(options)
    except ValueError as error:
        top.error(str(error))
    return options


def parser() -> argparse.ArgumentParser:
    """The parser, with one line of help for each option."""
    top = argparse.ArgumentParser(
        prog="generate.py",
        description="Ask a model about images and videos, with the visual keys split over ranks.",
    )
    top.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    add = top.add_argument
    add(
        "--model",
        required=True,
        help="folder or hub name of a checkpoint, or folder of a LoRA adapter, which names its "
        "base; `tiny`: random weights",
    )
    add("--adapter", help="folder or hub name of a LoRA adapter of that model")
    add("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    add_load_in_4bit(top)
    add("--deepspeed_config", required=True, help="a ds_config with `ds_lvx`")
    add("--prompt", help="a question; images and videos go before it")
    add("--chat", action="store_true", help="questions of the terminal, or lines of standard input")
    add("--image", action="append", default=[], help="a file; may be given again")
    add("--video", action="append", default=[], help="a file; may be given again")
    add("--data", help="chats (docs/data.md); the last answer of each is asked for")
    add_format(top)
    add_rate(top)
    add(
        "--max_new_tokens",
        type=above(int, 0),
        default=256,
        help="of an answer (default: %(default)s)",
    )
    add(
        "--text_keys",
        choices=WORDS,
        default=AUTO,
        help="keys of a long text: on every rank, or sharded (docs/generation.md)",
    )
    add(
        "--temperature",
        type=from_(float, 0),
        default=0.0,
        help="of sampling, by the top_p and top_k of the checkpoint; 0 (default): the likeliest",
    )
    add("--seed", type=from_(int, 0), default=0, help="of sampling")
    add("--output", help="JSONL file for the answers")
    add("--traceback", action="store_true", help="show where an error was raised")
    return top
