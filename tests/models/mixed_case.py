"""Random batches of every family, with and without images, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import groupby
from typing import Any

from ds_lvx.models import FAMILIES
from tests.models import blip_case, glm4v_case, mllama_case, qwen_vl_case, t5gemma2_case

Batch = dict[str, Any]
TEXT = ("input_ids", "attention_mask", "labels")
RECOMPUTE = {"method": "lvx", "recompute_kv": True}
Write = Callable[[Any, list[str], random.Random], Batch]
"""The case's module, samples (a letter a token: ``i`` for an image), and the source of the rest."""


def letters(case: Any, samples: list[str], rng: random.Random) -> Batch:
    made: Batch = case.make_batch(samples, seed=rng.randrange(20))
    return made


def instructed(case: Any, samples: list[str], rng: random.Random) -> Batch:
    """A Q-Former reads what is asked of its image."""
    batch, images = letters(case, samples, rng), sum(sample.count("i") for sample in samples)
    asked = [rng.randint(1, 5) for _ in range(images)]
    return case.with_instructions(batch, asked) if images else batch  # type: ignore[no-any-return]


def with_an_image(batch: Batch) -> Batch:
    """As InstructBLIP's own forward wants it."""
    own = blip_case.for_one_process(batch)
    return own if own is batch else blip_case.with_instructions(own, [1])


def parts(
    media: tuple[Any, ...], case: Any, samples: list[str], rng: random.Random, *, unseen: Any = None
) -> Batch:
    """Each image one of ``media``; a sample without has ``unseen``, where the processor adds it."""
    rows = []
    for sample in samples:
        runs = [(letter, len(list(run))) for letter, run in groupby(sample)]
        row = [
            part
            for letter, count in runs
            for part in ([count] if letter == "." else rng.choices(media, k=count))
        ]
        rows.append(row if "i" in sample or unseen is None else [*row, unseen])
    made: Batch = case.make_batch(rows, left=rng.random() < 0.3, seed=rng.randrange(2**31))
    return made


def answered(case: Any, samples: list[str], rng: random.Random) -> Batch:
    """The decoder writes something else."""
    answers = [rng.randint(2, 7) for _ in samples]  # a token for each rank
    made: Batch = case.make_batch(samples, answers, seed=rng.randrange(2**31))
    return made


def video(case: Any, samples: list[str], rng: random.Random) -> Batch:
    """A sample has one at most."""
    frames = [rng.randint(1, 5) * ("i" in sample) for sample in samples]
    texts = [s.replace("i", "v", 1).replace("i", ".") for s in samples]
    made: Batch = case.make_batch(texts, frames, seed=rng.randrange(2**31))
    return made


def tiled(case: Any, samples: list[str], rng: random.Random) -> Batch:
    length = max(map(len, samples))
    places = [[at for at, letter in enumerate(sample) if letter == "i"] for sample in samples]
    counts = [[rng.randint(1, mllama_case.TILES) for _ in at] for at in places]
    seed = rng.randrange(2**31)
    made: Batch = case.make_batch(places, length=length, num_tiles=counts, seed=seed)
    for row, sample in enumerate(samples):
        made["attention_mask"][row, len(sample) :] = 0
        made["labels"][row, len(sample) :] = -100
    return made


@dataclass(frozen=True)
class Mixed:
    """What is particular to a family; the rest says its contract.

    Attributes:
        case: its module of cases.
        write: makes a batch.
        cross: the rule of its cross-attention; None: lvx that recomputes K and V.
        model: arguments of ``tiny_model``.
        shifted: a label is what the token before it says.
        own: what the model's own forward takes of a batch.
        dropped: a batch of text alone has no entry for images in one process either.
    """

    case: str
    write: Write = letters
    cross: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None
    shifted: bool = True
    own: Callable[[Batch], Batch] = dict
    dropped: bool = False

    def tiny_model(self) -> Any:
        return self._module.tiny_model(**self.model or {})

    @property
    def _module(self) -> Any:
        return import_module(f"tests.models.{self.case}_case")

    def batch(self, rng: random.Random, share: float) -> tuple[Batch, Batch]:
        """One or two samples, each without images or with up to three in any places.

        Args:
            rng: where it comes from.
            share: of samples that have images.

        Returns:
            The batch for one process, and for ranks: of text alone it may have nothing beside it.
        """
        samples = []
        for _ in range(rng.randint(1, 2)):
            count, length = rng.randint(1, 3) * (rng.random() < share), rng.randint(5, 14)
            at = rng.sample(range(length), count)
            samples.append("".join("i" if place in at else "." for place in range(length)))
        batch = self.write(self._module, samples, rng)
        if rng.random() < 0.1:
            batch["labels"].fill_(-100)
        own = self.own(batch)
        if any("i" in sample for sample in samples):
            return own, batch
        alone = {key: batch[key] for key in TEXT}
        return (alone, alone) if self.dropped else (own, rng.choice((batch, alone)))

    def learnt(self, batch: Batch) -> int:
        labels = batch["labels"][:, 1:] if self.shifted else batch["labels"]
        return int((labels != -100).sum())


def ds_config(name: str, sp_size: int, *, stage: int = 3) -> dict[str, Any]:
    """`mllama_case.ds_config` for a family's own patterns."""
    by_kind = {"local": {"method": "none"}, "cross": MIXED[name].cross or RECOMPUTE}
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross={}, self_attn="ulysses")
    config["ds_lvx"]["layers"] = [
        {"match": pattern, **by_kind.get(kind, {"method": "ulysses"})}
        for kind, pattern in FAMILIES.named(name).patterns.items()
    ]
    return config


GRIDS = ((1, 2, 3), (3, 2, 2), (1, 1, 1))
MIXED = {
    # Most of the time is ZeRO-3's work for a module: there are fewer of them.
    "mllama": Mixed(
        "mllama",
        tiled,
        {**RECOMPUTE, "kv_chunk_tokens": 24},
        {"num_hidden_layers": 2, "cross_attention_layers": [1]},
        dropped=True,
    ),
    "moss_vl": Mixed(
        "moss_vl",
        partial(parts, ((3, 4, 6), (1, 2, 2), (2, 2, 4)), unseen=(-1, 4, 4)),
        {**RECOMPUTE, "kv_chunk_tokens": 5},
        dropped=True,
    ),
    "idefics": Mixed(
        "idefics", cross={**RECOMPUTE, "kv_chunk_tokens": 2}, model={"num_hidden_layers": 2}
    ),
    "mplugowl3": Mixed("mplugowl3"),
    "openflamingo": Mixed("openflamingo", model={"num_hidden_layers": 2}),
    "blip-2": Mixed("blip", own=blip_case.for_one_process),
    "instructblip": Mixed("blip", instructed, model={"kind": "instructblip"}, own=with_an_image),
    "qwen": Mixed("qwen_vl", own=qwen_vl_case.for_one_process),
    "video_llama": Mixed("video_llama", video),
    "t5gemma2": Mixed(
        "t5gemma2",
        answered,
        {"method": "lvx"},
        {"num_hidden_layers": 2, "layer_types": [t5gemma2_case.SLIDING, t5gemma2_case.FULL]},
        shifted=False,
    ),
    "qwen2_5_vl": Mixed("qwen2_5_vl", partial(parts, GRIDS), model={"num_hidden_layers": 1}),
    "qwen2_vl": Mixed("qwen2_vl", partial(parts, GRIDS), model={"num_hidden_layers": 1}),
    "qwen3_vl": Mixed("qwen3_vl", partial(parts, GRIDS)),
    "qwen3_vl_moe": Mixed("qwen3_vl_moe", partial(parts, GRIDS), model={"num_hidden_layers": 2}),
    "qwen3_5": Mixed("qwen3_5", partial(parts, GRIDS), model={"num_hidden_layers": 2}),
    "qwen3_5_moe": Mixed("qwen3_5_moe", partial(parts, GRIDS), model={"num_hidden_layers": 2}),
    "glm4v": Mixed("glm4v", partial(parts, GRIDS), own=glm4v_case.for_one_process),
    "glm4v_moe": Mixed(
        "glm4v_moe",
        partial(parts, GRIDS),
        model={"num_hidden_layers": 2},
        own=glm4v_case.for_one_process,
    ),
    "video_llama_3": Mixed("video_llama_3", partial(parts, GRIDS), model={"num_hidden_layers": 2}),
    "gemma3": Mixed("gemma3", partial(parts, ((1,), (1, 1, 1), (2,)))),
    "gemma4": Mixed("gemma4", partial(parts, ((2, 3), [(2, 2), (2, 2)], (1, 2)))),
    "internvl": Mixed("internvl", partial(parts, ((1,), (1, 1, 1), (4,)))),
    "smolvlm": Mixed("smolvlm", partial(parts, ((1,), (1, 1, 1), (4,)))),
    "llava_onevision": Mixed("llava_onevision", partial(parts, ((10, 30), "video", (20, 20)))),
}
"""By ``model_type``."""
