"""Measure samples a second of training on a mixed data set, packed against padded.

    python launch/bench_packing.py --document docs/fine-tuning.md
    python launch/bench_packing.py --quick --output_dir /tmp/packing         small, to try it
    python launch/bench_packing.py --render --document docs/fine-tuning.md   only from the JSON

One sample at a time, padded, grouped by length, and packed: every way trains the same tiny model on
the same samples in steps of as many, from batches that are made beforehand. Lengths and frames are
drawn evenly over their logarithms: most samples are short. Writes packing.json into --output_dir,
and a table into --document. On the CPU, two ranks.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

import ds_lvx
from bench.script import leave, measured, told, usual_parser
from ds_lvx.compare.case import Case, ds_config
from ds_lvx.compare.document import Results, columns, percentiles, times
from ds_lvx.compare.harness import Ranks, bind, meet, on_ranks, own_device, slowest, spread
from ds_lvx.compare.machine import header
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.conversation import Conversation, Message, Part
from ds_lvx.data.errors import Source
from ds_lvx.data.order import SampleOrder
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.plan.memory import Setting

WAYS = ("one at a time", "padded", "padded, grouped by length", "packed")
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Task:
    """The set, and how a step takes of it."""

    way: str = WAYS[0]  # one of `WAYS`
    picture: str = ""  # the file that every frame is
    samples: int = 64  # of the set
    per_step: int = 16  # of a step
    text_tokens: tuple[int, int] = (30, 2000)  # of a sample, beside those of its frames
    frames: tuple[int, int] = (1, 64)  # of a sample
    epochs: int = 3  # timed ones, after one that is not

    def sizes(self) -> list[tuple[int, int]]:
        """Text tokens and frames of each sample, the same every time."""
        numbers = random.Random(0)

        def drawn(bounds: tuple[int, int]) -> int:
            low, high = bounds
            return round(math.exp(numbers.uniform(math.log(low), math.log(high))))

        return [(drawn(self.text_tokens), drawn(self.frames)) for _ in range(self.samples)]


QUICK = Task(samples=4, per_step=2, text_tokens=(30, 120), frames=(1, 4), epochs=1)


def train(task: Task) -> dict[str, Any]:
    """In a rank: seconds of each timed epoch, the loss of each step, and what a forward holds."""
    own_device()
    ranks, family = int(os.environ["WORLD_SIZE"]), FAMILIES.default()
    bind(int(os.environ["RANK"]), ranks)
    accumulation = task.per_step if task.way == WAYS[0] else 1
    engine = _engine(accumulation, ranks=ranks)
    maker = BatchMaker(
        TextEncoder(family.tiny()[1], 10_000, family=family),
        FrameRate(fps=1),
        owned=ds_lvx.owned,
        min_tokens=ranks,
        pack=sum(task.text_tokens) * task.per_step if task.way == "packed" else None,
    )
    steps = [_step(task, maker, chats) for chats in _steps(task)]
    world, seconds, losses = engine.ds_lvx.groups.world_channel, [], []
    for _ in range(1 + task.epochs):
        start = meet(world)
        for batches, items in steps:
            total = 0.0
            for batch in batches:
                given = {**batch, "num_items_in_batch": items / accumulation}
                loss = engine(**ds_lvx.shard_batch(given, model=engine.module, frames="local")).loss
                engine.backward(loss)
                engine.step()
                total += float(loss.detach()) / accumulation
            losses.append(total)
        seconds.append(meet(world) - start)
    losses = [float(ds_lvx.mean_loss(torch.tensor(loss))) for loss in losses]
    found = [batch for batches, _ in steps for batch in batches]
    ds_lvx.shutdown(engine)
    return {
        "epoch_s": seconds[1:],
        "losses": losses,
        "text_tokens": sum(batch["input_ids"].numel() for batch in found),
        "frames": sum(math.prod(batch["pixel_values"].shape[:2]) for batch in found),
    }


def _engine(accumulation: int, *, ranks: int) -> Any:
    """lvx with recomputation, the text by Ulysses, ZeRO 2."""
    family = FAMILIES.default()
    torch.manual_seed(0)
    model = family.build(family.tiny()[0], gate=0.5, dtype=torch.float32)
    case, setting = Case(self_layers=1), Setting(recompute_kv=True)
    config = ds_config(setting, case, ranks=ranks, dtype="float32")
    config |= {"gradient_accumulation_steps": accumulation, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    return ds_lvx.initialize(model=model, optimizer=optimizer, config=config)[0]


def _steps(task: Task) -> Iterator[list[Conversation]]:
    """The samples of each step of an epoch."""
    chats = [_chat(number, sizes, task.picture) for number, sizes in enumerate(task.sizes())]
    lengths = None
    if "grouped" in task.way:
        frame = FAMILIES.default().frame_tokens(FAMILIES.default().tiny()[0])
        lengths = [text + (1 + frame) * frames for text, frames in task.sizes()]
    order = SampleOrder(task.samples, 0, lengths=lengths, together=task.per_step)
    for place in range(0, task.samples, task.per_step):
        yield [chats[n] for n in order.micro_batch(place, task.per_step)]


def _step(task: Task, maker: BatchMaker, chats: Sequence[Conversation]) -> tuple[list[Any], int]:
    """The batches of a step, this rank's frames of them, and the tokens that it learns."""
    forwards = [[chat] for chat in chats] if task.way == WAYS[0] else [[*chats]]
    return [maker.batch(each).inputs for each in forwards], maker.labelled(chats)


def _chat(number: int, sizes: tuple[int, int], picture: str) -> Conversation:
    """A question of so many tokens about so many frames; a character is a token."""
    text, frames = sizes
    images = [Part("image", picture) for _ in range(frames)]
    words = ("what is to be seen here, and where? " * 60)[: max(text - 27, 1)].strip()
    asked = Message("user", (*images, Part("text", words)))
    answer = Message("assistant", (Part("text", "A."),))
    return Conversation(Source("packing", number + 1), (asked, answer))


def measure(task: Task, ranks: Ranks) -> dict[str, Any]:
    """For the JSON: every way, each in fresh processes.

    Raises:
        RunError: a rank failed.
    """
    head = {**header(device="cpu"), "ranks": ranks.count}
    with TemporaryDirectory(prefix="ds_lvx_packing_") as folder:
        path = Path(folder, "picture.png")
        Image.new("RGB", (28, 28), (90, 30, 200)).save(path)
        records = [record(replace(task, way=way, picture=str(path)), ranks) for way in WAYS]
    padded = next(r for r in records if r["way"] == "padded")["samples_per_s"]["median"]
    for each in records:
        each["to_padded"] = each["samples_per_s"]["median"] / padded
    settings = {key: value for key, value in asdict(task).items() if key not in ("way", "picture")}
    return {**head, **settings, "sizes": task.sizes(), "records": records}


def record(task: Task, ranks: Ranks) -> dict[str, Any]:
    """One way, and what its ranks say together."""
    answers = on_ranks(train, task, ranks)
    rates = [task.samples / each for each in slowest(*(answer["epoch_s"] for answer in answers))]
    return {
        "way": task.way,
        "samples_per_s": spread(rates),
        "losses": answers[0]["losses"],
        "text_tokens": answers[0]["text_tokens"],
        "frames": sum(answer["frames"] for answer in answers),
    }


def name(results: Results) -> str:
    """Of the files."""
    return "packing"


def text(results: Results) -> str:
    """The table."""
    return columns(
        results["records"],
        {
            "a step's samples": "{way}",
            "samples a second (p10 to p90)": lambda r: percentiles(
                r["samples_per_s"], "{:.2f}".format
            ),
            "to padded": lambda r: times(r["to_padded"]),
            "text tokens, padding included": "{text_tokens:,}",
            "frames, padding included": "{frames:,}",
        },
    )


def draw(results: Results) -> None:
    """No figure."""


def main() -> None:
    """Measure, then write JSON and table."""
    parser = usual_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    task, ranks = QUICK if options.quick else Task(), Ranks(options.ranks, timeout_s=900)
    with told("bench_packing"):
        results = measured("packing", options, lambda: measure(task, ranks))
        leave("bench_packing", sys.modules[__name__], results, options)


if __name__ == "__main__":
    main()
