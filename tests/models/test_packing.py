"""Samples that share a row of text train as those that have a row each, and see nothing of others.

That rows of one sample train as transformers' own model does is in the families' own tests.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import FAMILIES
from ds_lvx.sharding import owned, shard_batch
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.models import mllama_case
from tests.models.mllama_case import assert_same_training, ds_config, sharded_steps
from tests.ranks import run_ranks

CROSS: dict[str, dict[str, Any]] = {
    "lvx": {"method": "lvx", "schedule": "ring", "recompute_kv": True},
    "gather": {"method": "lvx", "schedule": "gather"},
    "ring": {"method": "ring"},
    "ulysses": {"method": "ulysses"},
}


def write_samples(folder: Path, colour: int = 90) -> Path:
    """Text before an image, two tiles and one, a film, two groups of images, and text alone."""
    write_image(folder / "wide.png", (100, 40), colour)
    write_image(folder / "b.png", (40, 40), 255)
    write_video(folder / "a.mp4", frames=6)
    two_groups = chat(("image", "wide.png"), ("text", "Where is it?"), answer="In a meadow.")
    two_groups["messages"] += chat(("image", "b.png"), ("text", "And?"), answer="Blue")["messages"]
    return write_jsonl(
        folder / "d.jsonl",
        chat(("video", "a.mp4"), ("image", "wide.png"), ("text", "What?"), answer="A rabbit."),
        chat(("text", "What animal?"), answer="None."),
        chat(("text", "Look at this one:"), ("image", "wide.png"), answer="A butterfly."),
        two_groups,
        chat(("text", "Hello"), answer="Hi."),
        chat(("text", "And this?"), ("image", "b.png"), answer="Red."),
    )


def model_and_maker(name: str, pack: int | None) -> tuple[Any, BatchMaker]:
    family = FAMILIES.named(name)
    config, processor = family.tiny()
    if name == "mllama":  # so that tiles are padded
        config = family.config(replace(family.size(config), tiles=2))
        processor.image_processor.max_image_tiles = 2
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = family.build(config, gate=0.5, dtype=torch.float32)
    encoder = TextEncoder(processor, 1000, family=family)
    return model, BatchMaker(encoder, FrameRate(count=3), owned=owned, min_tokens=3, pack=pack)


def train(name: str, data: Path, cross: str, ranks: int, packs: list[int | None]) -> list[Any]:
    """Two steps with each budget: of text and images, and of a single image beside text."""
    family, results = FAMILIES.named(name), []
    for pack in packs:
        model, maker = model_and_maker(name, pack)
        samples = read_conversations(data)
        batches = [[maker.batch(samples[:4]).inputs], [maker.batch(samples[4:]).inputs]]
        self_attn = cross if cross in ("ring", "ulysses") else "lvx"
        config = ds_config(stage=0, sp_size=ranks, cross=CROSS[cross], self_attn=self_attn)
        rules = config["ds_lvx"]["layers"]
        for rule, kind in zip(rules, ("local", "cross", "self"), strict=True):
            rule["match"] = family.patterns[kind]
        result = sharded_steps(config, batches, frames="local", model=model)
        results.append({**result, "logits": [], "rows": [len(b[0]["input_ids"]) for b in batches]})
    return results


def check(name: str, data: Path, cross: str, ranks: int, packs: list[int | None]) -> None:
    ((reference,),) = run_ranks(train, 1, name, data, "lvx", 1, [None])
    assert reference["rows"] == [4, 2]
    reference["losses"] = [[loss] for loss in reference["losses"]]
    by_rank = run_ranks(train, ranks, name, data, cross, ranks, packs)
    for place, pack in enumerate(packs):
        results = [rank[place] for rank in by_rank]
        assert results[0]["rows"] == ([1, 1] if pack == 4096 else [2, 1])
        assert_same_training(results, reference, sp_size=ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mllama", "idefics", pytest.param("openflamingo", marks=pytest.mark.exhaustive)]
)
def test_packed_samples_train_as_padded_ones_do(tmp_path: Path, name: str) -> None:
    check(name, write_samples(tmp_path), "lvx", 2, [4096, 200])


ONCE = [
    ("mllama", 3, "lvx"),
    ("idefics", 3, "ulysses"),
    ("mllama", 1, "gather"),
]
OTHERS = {*itertools.product(("mllama", "idefics"), (1, 3), CROSS)} - {*ONCE}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "cross"),
    [*ONCE, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in sorted(OTHERS))],
)
def test_they_do_by_every_method(tmp_path: Path, name: str, cross: str, ranks: int) -> None:
    check(name, write_samples(tmp_path), cross, ranks, [4096])


def replicas(data: Path, pack: int | None, lora: bool, stage: int | None) -> dict[str, Any]:
    """Two steps of two replicas, of which one has more rows, then no image: by an engine over pairs
    of ranks, with checkpointed layers, or one after the other in this process."""
    family = FAMILIES.named("mllama")
    model, maker = model_and_maker("mllama", pack)
    model = mllama_case.with_lora(model) if lora else model
    size = 1 if stage is None else 2
    rank = int(os.environ["RANK"]) % size
    maker._owned = lambda count: range(count * rank // size, count * (rank + 1) // size)
    samples = read_conversations(data)
    parts = [[(0, 1, 2), (3, 4)], [(0, 3), (4, 1)]]
    batches = [[maker.batch([samples[n] for n in part]).inputs for part in step] for step in parts]
    config = ds_config(stage=stage or 0, sp_size=2, cross=CROSS["lvx"], self_attn="ring")
    for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
        rule["match"] = family.patterns[kind]
    if stage is not None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = sharded_steps(config, batches, frames="local", model=model)
        return {**found, "rows": [[len(b["input_ids"]) for b in step] for step in batches]}
    config["ds_lvx"]["sequence_parallel_size"] = 1
    groups = SequenceParallelGroups(1)
    mllama_case.patch_model(model, mllama_case.LVXConfig.from_ds_config(config), groups)
    alone = [[shard_batch(b, model=model, frames="local") for b in step] for step in batches]
    for shard in (shard for step in alone for shard in step):
        del shard["use_cache"]  # reference_steps says it
    return {**mllama_case.reference_steps(alone, model), "logits": []}


@pytest.mark.exhaustive
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_two_replicas_of_unequal_rows_train_as_one_process(
    tmp_path: Path, lora: bool, stage: int
) -> None:
    data = write_samples(tmp_path)
    (alone,) = run_ranks(replicas, 1, data, None, lora, None)
    results = run_ranks(replicas, 4, data, 120, lora, stage)
    assert results[0]["rows"] == [[2, 1], [2, 1]]
    assert_same_training(results, alone, sp_size=2)


def logits(name: str, data: list[Path]) -> tuple[list[torch.Tensor], list[tuple[int, slice]]]:
    """Of one row of all samples, in each data set."""
    found, groups = [], SequenceParallelGroups(1)
    for path in data:
        model, maker = model_and_maker(name, 4096)
        made = maker.batch(read_conversations(path))
        config = mllama_case.ds_config(stage=0, sp_size=1, cross=CROSS["lvx"], self_attn="ring")
        for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
            rule["match"] = FAMILIES.named(name).patterns[kind]
        patch = mllama_case.patch_model(model, mllama_case.LVXConfig.from_ds_config(config), groups)
        with torch.no_grad():
            found.append(model(**shard_batch(made.inputs, model=model, frames="local")).logits)
        patch.unpatch()
    groups.close()
    return found, [*made.places]


@pytest.mark.parametrize("name", ["mllama", "idefics", "openflamingo"])
def test_a_medium_changes_the_logits_of_its_own_sample_only(tmp_path: Path, name: str) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    data = [write_samples(folder) for folder in folders]
    write_image(folders[1] / "b.png", (40, 40), 10)  # of the samples 3 and 5
    ((first, second), places), *_ = run_ranks(logits, 1, name, data)
    assert len(first) == 1
    for number, place in enumerate(places):
        is_same = torch.equal(first[place], second[place])
        assert is_same == (number not in (3, 5)), number


def test_images_of_another_sample_cannot_be_looked_at(tmp_path: Path) -> None:
    model, maker = model_and_maker("mllama", 4096)
    batch = maker.batch(read_conversations(write_samples(tmp_path))).inputs
    assert batch["num_images"].tolist() == [[4, 0, 1, 2, 0, 1]]
    wrong = {**batch, "num_images": torch.tensor([[3, 1, 1, 2, 0, 1]])}
    with pytest.raises(ValueError, match=r"row 0, whose token \d+, of sample 0, sees the images 0"):
        shard_batch(wrong, model=model, frames="local")


def test_the_maker_deals_frames_of_a_row(tmp_path: Path) -> None:
    """Neighbouring frames of the row go to a rank, whichever sample they are of."""
    samples = read_conversations(write_samples(tmp_path))
    _, maker = model_and_maker("mllama", 4096)
    whole = maker.batch(samples).inputs["pixel_values"]
    assert whole.shape[:2] == (1, 8)
    parts = []
    for mine in (range(5), range(5, 5), range(5, 8)):
        _, maker = model_and_maker("mllama", 4096)
        maker._owned = partial(lambda _, mine: mine, mine=mine)
        parts.append(maker.batch(samples).inputs["pixel_values"])
    assert torch.equal(torch.cat(parts, dim=1), whole)
