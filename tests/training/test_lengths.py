"""Samples grouped by length: lengths are text and visual tokens, and a run takes them so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ds_lvx.data.chat import Chats
from ds_lvx.data.chosen import FrameRate
from ds_lvx.distributed.channel import Channel
from ds_lvx.training.batches import TRAINING, Place, Recipe
from ds_lvx.training.check import Checks
from ds_lvx.training.inputs import BatchSizes, check_samples, read_inputs
from ds_lvx.training.lengths import sample_lengths
from ds_lvx.training.model import Source
from ds_lvx.training.options import parse
from tests.data.formats_case import own, write_media
from tests.data.media import write_jsonl
from tests.launch.finetune_runs import arguments, write_config

ALONE = Channel(None)


def test_a_run_takes_samples_of_one_length_at_once(tmp_path: Path) -> None:
    folder = write_media(tmp_path)
    film = own("<video>x", videos=["c.mp4"])
    path = write_jsonl(folder / "d.jsonl", *[own("x", images=[]), own("<image>x"), film] * 4)
    config = write_config(folder / "ds.json", stage=0, sp_size=1, micro=4)
    words = arguments(
        model="tiny", data=path, frames=3, deepspeed_config=config, output_dir=folder / "out"
    )
    found = []
    for more in ([], ["--group_by_length"]):
        options = parse([*words, *more])
        inputs = check_samples(read_inputs(options, 1), options, ALONE)
        found.append(inputs)
    plain, grouped = found
    assert plain.lengths is None
    assert plain.fingerprint != grouped.fingerprint
    frame = grouped.source.family.frame_tokens(grouped.source.config)
    none, one, three = grouped.lengths[:3]
    # A frame is one token of the text, and its own.
    assert (one - none, three - one) == (frame + 1, 2 * (frame + 1))
    assert list(grouped.lengths) == [none, one, three] * 4
    recipe = Recipe.of(grouped, options, ALONE)
    kinds = [
        {number % 3 for number in recipe.samples(Place(TRAINING, place))[1]} for place in (0, 4, 8)
    ]
    assert sorted(kinds, key=min) == [{0}, {1}, {2}]
    # On other ranks a run goes on with the same samples: a step has as many.
    other = replace(recipe, sizes=BatchSizes(micro=1, accumulation=2, replicas=2))
    orders = [[each.order.sample(n) for n in range(36)] for each in (recipe, other)]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("name", ["tiny:qwen2_5_vl", "tiny:qwen3_vl"])
def test_tokens_that_stand_in_the_text_count_once(tmp_path: Path, name: str) -> None:
    folder = write_media(tmp_path)
    chats = Chats(write_jsonl(folder / "d.jsonl", own("x", images=[]), own("<image>x")))
    source = Source.of(name)
    checks = Checks("headers", name, 4096, min_tokens=1, rate=FrameRate(fps=1))
    maker = checks.maker(source)
    found = sample_lengths(chats, checks, source, world=ALONE)
    assert [*found] == [len(maker.sample(each).text.input_ids) for each in chats]
