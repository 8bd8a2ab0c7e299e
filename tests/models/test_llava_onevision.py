"""LLaVA-OneVision: frames on their ranks, videos that touch, and what is refused; more is in
test_concatenated.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ds_lvx import owned
from ds_lvx.models import FAMILIES
from ds_lvx.sharding import shard_batch
from tests.models import concatenated_case as case
from tests.models.llava_onevision_case import hard_batch, make_batch, one_video, tiny_model
from tests.models.mllama_case import assert_same_training, plain_step, reference_steps
from tests.ranks import run_ranks

NAME = "llava_onevision"
rules = partial(case.rules, NAME)


# ---- frames that are on their ranks already


def local_units(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's images and frames, by `ds_lvx.owned`: sample by sample."""
    model, rows = tiny_model(), batch["input_ids"]
    each = FAMILIES.named(NAME).units(batch, rows, model.config)
    pixels = {key: batch[key] for key in ("pixel_values", "pixel_values_videos")}
    pixels["pixel_values_videos"] = pixels["pixel_values_videos"].flatten(0, 1)
    held: dict[str, list[int]] = {key: [] for key in pixels}
    starts = dict.fromkeys(pixels, 0)
    for row in range(len(rows)):
        here = [unit for unit in each if unit.row == row]
        mine = owned([unit.tokens for unit in here], model=model)
        for number, unit in enumerate(here):
            held[unit.source] += [starts[unit.source]] if number in mine else []
            starts[unit.source] += 1
    mine = {key: pixels[key][mine] if mine else None for key, mine in held.items()}
    return {**batch, **mine, "frames_per_video": [3, 3, 3]}


def step_local() -> dict[str, Any]:
    batch = local_units(hard_batch(5))
    return plain_step(rules("lvx", 2), batch, frames="local", model=tiny_model())


def test_frames_that_are_on_their_ranks_already() -> None:
    alone = reference_steps([[hard_batch(5)]], tiny_model())
    assert_same_training(run_ranks(step_local, 2), alone, sp_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_sizes": None},
            "got 34 tokens of an image in sample 0, and image_sizes that make 0",
        ),
        ({"batch_num_images": [1]}, "got batch_num_images of 1 images and image_sizes of 4"),
        ({"frames_per_video": [3, 3, 3, 2]}, "got frames_per_video of 1 more videos than"),
        ({"frames_per_video": [3, 4, 2]}, "got 26 video tokens in a run in sample 0"),
        ({"pixel_values": hard_batch()["pixel_values"][1:]}, "got pixel_values of 3 rows"),
        ({"pixel_values": torch.zeros(4, 3, 16, 16)}, r"got pixel_values \(4, 3, 16, 16\)"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_batch({**hard_batch(), **change}, model=tiny_model())


def test_a_video_that_is_cut_is_refused() -> None:
    batch = one_video()
    cut = {key: batch[key][:, 1:] for key in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(ValueError, match="got 28 video tokens in a run in sample 0"):
        shard_batch({**batch, **cut}, model=tiny_model())


def ends(batch: dict[str, Any]) -> list[int]:
    """Of each frame, whether it is its video's last."""
    model = tiny_model()
    found = FAMILIES.named(NAME).units(batch, batch["input_ids"], model.config)
    return [unit.about[1] for unit in found]


def test_videos_that_touch_are_told_apart() -> None:
    """As many as a frame has tokens and more; of unequal frames; of frames that are not all here.

    Five videos of two frames have the tokens of one of eleven.
    """
    batch = make_batch([[2, *["video"] * 5, 3]], frames=2)
    assert ends(batch) == [0, 1] * 5
    local = {**batch, "pixel_values_videos": batch["pixel_values_videos"].flatten(0, 1)[:3]}
    assert ends({**local, "frames_per_video": torch.tensor([1, 3, 3, 1, 2])}) == [
        *(1, 0, 0, 1, 0, 0, 1, 1, 0, 1)
    ]
    with pytest.raises(ValueError, match="got 45 video tokens in a run in sample 0"):
        ends(local)


def test_a_run_of_tokens_that_only_some_videos_have_says_them() -> None:
    for frames, videos in ((5, 1), (1, 3), (1, 4)):
        batch = make_batch([["video"] * videos], frames=frames)
        del batch["pixel_values_videos"]
        assert ends(batch) == [*[0] * (frames - 1), 1] * videos


def test_another_tower_is_refused() -> None:
    model = tiny_model()
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(NotImplementedError, match="of which 'default' patches are taken"):
        FAMILIES.named(NAME).check(model, sp_size=1)
