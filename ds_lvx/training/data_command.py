"""``ds-lvx data check FILE``: a whole data set looked at, without a model or with its processor."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ds_lvx.data.batch import BatchMaker, Sample
from ds_lvx.data.chat import Chats
from ds_lvx.data.chosen import Chooser, FrameRate, Frames
from ds_lvx.data.conversation import Conversation
from ds_lvx.data.errors import DataError
from ds_lvx.data.held import Stills
from ds_lvx.data.text import IGNORED, TextEncoder
from ds_lvx.training.arguments import add_format, add_limits, add_rate, limits_of
from ds_lvx.training.model import Source

_MOST_CHARACTERS = 500
"""Of what is wrong with one sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds-lvx data``."""
    parser.add_argument("action", choices=("check",), help="look at every sample")
    parser.add_argument("file", help="a data set, as --data of launch/finetune.py names it")
    group = parser.add_argument_group("how it is read")
    add_format(group)
    group.add_argument(
        "--model", help="folder or hub name of a checkpoint, or `tiny`: for lengths in tokens"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with the checkpoint"
    )
    add_rate(group)
    group.add_argument(
        "--decode", action="store_true", help="decode every frame that would be taken"
    )
    group.add_argument(
        "--show", type=int, default=0, metavar="N", help="the tokens of the first N good samples"
    )
    add_limits(parser.add_argument_group("limits of the data; what is above is an error"))


def run(options: argparse.Namespace) -> int:
    """Look, and print what was found; 1 where a sample would fail.

    Raises:
        ValueError: of the data set or the model as a whole.
    """
    if options.show and options.model is None:
        raise ValueError("--show: got no --model; expected the one whose tokens are shown; name it")
    limits_of(options).tell_pil()
    chats = Chats(
        options.file,
        limits=limits_of(options),
        format=options.format,
        media_root=options.media_root,
    )
    looker = Looker(options)
    console = Console(highlight=False, soft_wrap=True)
    # On standard error, and where that is a terminal.
    for index in tqdm(range(len(chats)), unit="sample", leave=False, disable=None):
        sample = looker.look(chats, index)
        if sample is not None and len(looker.found.characters) <= options.show:
            assert looker.maker is not None
            console.print(shown(sample, looker.maker.encoder))
    for line in looker.found.lines(chats):
        console.print(line, markup=False)
    for doubt in looker.maker.encoder.doubts() if looker.maker is not None else ():
        console.print(f"warning: --model {options.model}: {doubt}", markup=False)
    return int(bool(looker.found.problems))


@dataclass
class Found:
    """What a data set holds.

    Attributes:
        media: by kind, those that are there.
        missing: likewise, those that are not.
        parts: parts of videos among them.
        lists: videos among them that are lists of frames.
        turns, characters, tokens, learnt, frames: of each good sample.
        problems: what is wrong with the others.
    """

    media: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    parts: int = 0
    lists: int = 0
    turns: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self, chats: Chats) -> list[str]:
        """A report."""
        there, gone = (
            ", ".join(f"{counts[kind]:,} {kind}s" for kind in ("image", "video"))
            for counts in (self.media, self.missing)
        )
        lists = f", {self.lists:,} lists of frames" if self.lists else ""
        report = [
            f"{chats.lines.path}: {len(chats):,} samples, format {chats.format}",
            f"media found    {there} ({self.parts:,} of them parts of videos{lists})",
            f"media missing  {gone}",
        ]
        columns = ("turns", "characters", "tokens", "learnt", "frames")
        report += [
            f"{name:<15}{_spread(values)}" for name in columns if (values := getattr(self, name))
        ]
        problems = [problem[:_MOST_CHARACTERS] for problem in self.problems]
        return [*report, f"would fail     {len(problems):,} samples", *problems]


class Looker:
    """Looks at samples, and counts what it finds.

    Args:
        options: of the command.

    Attributes:
        found: so far.
        maker: of samples; None without a model.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.found = Found()
        self._limits = limits_of(options)
        self._decode = options.decode
        rate = FrameRate.asked(options)
        self._chooser = Chooser(rate, self._limits)
        self.maker: BatchMaker | None = None
        if options.model is not None:
            source = Source.of(options.model, trust_remote_code=options.trust_remote_code)
            source.check_tokenizer()
            length = source.max_length(options.max_length)
            encoder = TextEncoder(source.processor, length, family=source.family)
            self.maker = BatchMaker(encoder, rate, owned=range, limits=self._limits)
            self._chooser = self.maker.chooser

    def look(self, chats: Chats, index: int) -> Sample | None:
        """Count a sample; returns its tokens where it is good and there is a model."""
        found = self.found
        try:
            for kind, is_there in chats.media(index):
                (found.media if is_there else found.missing)[kind] += 1
            conversation = chats[index]
            frames, sample = self._frames(conversation), None
            if self.maker is not None:
                sample = self.maker.sample(conversation)
                frames = list(sample.frames)
            if self._decode:
                self._decode_all(frames, conversation)
        except DataError as error:
            found.problems.append(str(error))
            return None
        messages = conversation.messages
        found.parts += sum(p.start is not None or p.end is not None for p in conversation.media)
        found.lists += sum(isinstance(p.file, Stills) for p in conversation.media)
        found.turns.append(len(messages))
        found.characters.append(sum(len(message.text) for message in messages))
        found.frames.append(sum(len(each.indices) for each in frames))
        if sample is not None:
            found.tokens.append(len(sample.text.input_ids))
            found.learnt.append(sum(label != IGNORED for label in sample.text.labels[1:]))
        return sample

    def _frames(self, conversation: Conversation) -> list[Frames]:
        """What would be taken of each medium, by their headers."""
        try:
            for part in conversation.media:
                self._chooser.check(part)
            return [self._chooser.frames(part) for part in conversation.media]
        except ValueError as error:
            raise DataError(f"{conversation.source}: {error}") from None

    def _decode_all(self, frames: Sequence[Frames], conversation: Conversation) -> None:
        try:
            for each in frames:
                for _ in self._chooser.pictures(each, each.indices):
                    pass
        except ValueError as error:
            raise DataError(f"{conversation.source}: {error}") from None


def shown(sample: Sample, encoder: TextEncoder) -> Text:
    """The tokens of a sample, those that are learnt in green, and what is learnt once more."""
    tokenizer, text = encoder.tokenizer, Text()
    ids, labels = sample.text.input_ids, sample.text.labels
    text.append(f"{sample.source}: {len(ids)} tokens, {sample.num_frames} frames\n", style="bold")
    of_frames = tokenizer.convert_tokens_to_ids([*encoder.family.media_tokens(encoder.processor)])
    runs = _runs(ids, labels, of_frames)
    for token, is_learnt, times in runs:
        written = _written(tokenizer, [token]) + (f" x {times}" if times > 1 else "")
        text.append(written, style="bold green" if is_learnt else "dim")
        text.append("|", style="dim")
    text.append("\nlearnt: ", style="bold")
    text.append(_written(tokenizer, [label for label in labels if label != IGNORED]))
    return text.append("\n")


def _runs(
    ids: Sequence[int], labels: Sequence[int], of_frames: Sequence[int]
) -> list[tuple[int, bool, int]]:
    """Tokens, whether they are learnt, and how often; only frames' are counted together."""
    runs: list[tuple[int, bool, int]] = []
    for token, label in zip(ids, labels, strict=True):
        if runs and token in of_frames and token == runs[-1][0]:
            runs[-1] = (token, False, runs[-1][2] + 1)
        else:
            runs.append((token, label != IGNORED, 1))
    return runs


def _written(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text.replace("\n", "\\n")


def _spread(values: Sequence[int]) -> str:
    """Least, middle and most, and the sum."""
    ordered = sorted(values)
    middle, most = ordered[len(ordered) // 2], ordered[-1]
    late = ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)]
    return (
        f"{ordered[0]:,} to {most:,} a sample, median {middle:,}, 95 % up to {late:,}, "
        f"{sum(ordered):,} in all"
    )
