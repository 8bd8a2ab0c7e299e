"""Every kind of batch: loss, logits and gradients on ranks are those of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.mllama import visible_images
from ds_lvx.models.runs import Runs
from ds_lvx.sharding import owned
from tests.largest import LargestTensor
from tests.models.mllama_case import (
    IMAGE,
    PATCHES,
    TILES,
    Batch,
    assert_same_training,
    ds_config,
    hard_batch,
    make_batch,
    plain_step,
    reference_steps,
    tiny_model,
)
from tests.ranks import run_ranks

FRAME_KEYS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def without(batch: Batch, *keys: str) -> Batch:
    return {key: value for key, value in batch.items() if key not in keys}


def one_image() -> Batch:
    return make_batch([[2]], length=11, num_tiles=[[2]], seed=11)


def left_padded() -> Batch:
    """Padding before the text; the last padding token is to predict the first real one."""
    batch = make_batch([[5, 8], [3]], length=14, num_tiles=[[1, 2], [2]], seed=12)
    batch["attention_mask"][0, :4] = 0
    batch["labels"][0, :4] = -100
    return batch


def packed() -> Batch:
    """Two documents in one row, told apart by positions that start again."""
    batch = make_batch([[1, 9], [0, 4]], length=16, num_tiles=[[2, 1], [1, 1]], seed=13)
    first, second = [7, 9], [5, 11]
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in (first, second)]
    return {**without(batch, "attention_mask"), "position_ids": torch.stack(rows)}


def restarting_but_padded() -> Batch:
    """With an attention mask, transformers does not take restarting positions for documents."""
    batch = packed()
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def shifted_positions() -> Batch:
    batch = make_batch([[0]], length=10, num_tiles=[[1]], seed=14)
    return {**without(batch, "attention_mask"), "position_ids": torch.arange(10)[None] + 20}


def text_only() -> Batch:
    return without(hard_batch(15), *FRAME_KEYS, "cross_attention_mask")


def labels_on_one_rank_only() -> Batch:
    batch = hard_batch(16)
    batch["labels"][:, :13] = -100
    return batch


def see_all_rows_and_padding_images() -> Batch:
    """The second sample has one image of three, and half of its text comes before it."""
    return make_batch([[0, 1, 2], [9]], length=15, num_tiles=[[1, 2, 1], [1]], seed=17)


BATCHES = {
    make.__name__: make
    for make in (
        hard_batch,
        one_image,
        left_padded,
        packed,
        restarting_but_padded,
        shifted_positions,
        text_only,
        labels_on_one_rank_only,
        see_all_rows_and_padding_images,
    )
}
RULES: list[tuple[dict[str, Any], str]] = [
    ({"method": "lvx", "schedule": "ring"}, "ring"),
    ({"method": "lvx", "schedule": "gather", "recompute_kv": True}, "ulysses"),
    ({"method": "ulysses"}, "lvx"),
    ({"method": "ring"}, "ring"),
]


def rules(ranks: int, which: int) -> dict[str, Any]:
    cross, self_attn = RULES[which % len(RULES)]
    return ds_config(stage=0, sp_size=ranks, cross=cross, self_attn=self_attn)


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]])


def step_each(ranks: int, names: tuple[str, ...], offset: int) -> list[dict[str, Any]]:
    return [plain_step(rules(ranks, i + offset), BATCHES[n]()) for i, n in enumerate(names)]


@pytest.mark.parametrize(
    ("ranks", "offset"),
    [
        pytest.param(1, 0, marks=pytest.mark.exhaustive),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.exhaustive),
        pytest.param(3, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_every_kind_of_batch_equals_one_process(ranks: int, offset: int) -> None:
    names = tuple(BATCHES)
    results = run_ranks(step_each, ranks, ranks, names, offset)
    for index, name in enumerate(names):
        mine = [each[index] for each in results]
        try:
            assert_same_training(mine, reference(name), sp_size=ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} on {ranks} ranks: {error}") from error


def test_a_rank_without_frames_has_gradients_of_zero() -> None:
    """ZeRO reduces a parameter when its gradient is there; a missing one would make it wait."""
    results = run_ranks(plain_step, 3, rules(3, 0), one_image())
    assert all(result["missing"] == [] for result in results)


# ---- frames that are on their ranks already


def local_frames(batch: Batch, start: int, stop: int) -> Batch:
    local = dict(batch)
    for key in FRAME_KEYS:
        local[key] = batch[key][:, start:stop]
        if start == stop:
            del local[key]
    return local


def step_local(cuts: list[int] | None, config: dict[str, Any], visible: bool) -> dict[str, Any]:
    batch = hard_batch(3)
    if visible:
        batch["visible_images"] = visible_images(batch["input_ids"], IMAGE)
        del batch["cross_attention_mask"]
    rank = torch.distributed.get_rank()
    if cuts is None:
        mine = owned(3)
        start, stop = mine.start, mine.stop
    else:
        start, stop = cuts[rank], cuts[rank + 1]
    return plain_step(config, local_frames(batch, start, stop), frames="local")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuts", "visible"), [(None, False), ([0, 0, 3, 3], True), ([0, 1, 1, 3], False)]
)
def test_local_frames_in_any_contiguous_split(cuts: list[int] | None, visible: bool) -> None:
    results = run_ranks(step_local, 3, cuts, rules(3, 1), visible)
    assert_same_training(results, reference_steps([[hard_batch(3)]]), sp_size=3)


def whole_rule(cuts: list[int], visible: bool) -> Any:
    """The rule of the visual tokens as this rank knows it, its frames being there already."""
    rules_made = []
    with pytest.MonkeyPatch.context() as patch:
        made = ShardedBatch.of

        def noted(**given: Any) -> ShardedBatch:
            rules_made.append(given["cross_rule"])
            return made(**given)

        patch.setattr(ShardedBatch, "of", noted)
        step_local(cuts, rules(3, 1), visible)
    (rule,) = rules_made
    return rule


@pytest.mark.parametrize("visible", [False, True])
def test_every_rank_knows_the_whole_rule(visible: bool) -> None:
    batch = hard_batch(3)
    runs = Runs.of_mask(batch["cross_attention_mask"])
    assert runs.tiles is not None
    expected = runs.visibility(runs.tiles, patches=PATCHES, blind_see_all=True)
    if visible:  # padding images have a tile there, and no token that sees them
        tiles = batch["aspect_ratio_mask"].bool()
        expected = runs.visibility(tiles, patches=PATCHES, blind_see_all=True)
    for rule in run_ranks(whole_rule, 3, [0, 1, 1, 3], visible):
        assert torch.equal(rule.mask(), expected.mask())


def test_visible_images_in_place_of_the_mask() -> None:
    batch = hard_batch(4)
    compact = without(batch, "cross_attention_mask")
    compact["visible_images"] = visible_images(batch["input_ids"], IMAGE)
    results = run_ranks(plain_step, 2, rules(2, 0), compact)
    assert_same_training(results, reference_steps([[batch]]), sp_size=2)


# ---- features in place of pixels


def features_of(batch: Batch, *, by_sample: bool) -> Tensor:
    model = tiny_model()
    with torch.no_grad():
        vision = model.model.vision_model(**{key: batch[key] for key in FRAME_KEYS})
        features = model.model.multi_modal_projector(vision.last_hidden_state)
    samples, hidden = batch["input_ids"].shape[0], features.shape[-1]
    shape = (samples, -1, hidden) if by_sample else (-1, PATCHES, hidden)
    return features.reshape(shape)


@pytest.mark.parametrize("by_sample", [False, True])
def test_given_features_in_both_shapes(by_sample: bool) -> None:
    batch = hard_batch(5)
    given = without(batch, *FRAME_KEYS)
    given["cross_attention_states"] = features_of(batch, by_sample=by_sample)
    expected = without(batch, *FRAME_KEYS)
    expected["cross_attention_states"] = features_of(batch, by_sample=False)
    results = run_ranks(plain_step, 2, rules(2, 1), given)
    assert_same_training(results, reference_steps([[expected]]), sp_size=2)


def test_without_a_mask_everything_is_visible() -> None:
    batch = without(hard_batch(6), *FRAME_KEYS, "cross_attention_mask")
    # 31 tokens: no whole number of images, split by token. In transformers no mask means causal
    # under sdpa, so the reference has a mask of zeros.
    batch["cross_attention_states"] = torch.randn(2, 31, 32)
    results = run_ranks(plain_step, 2, rules(2, 0), batch)
    model = tiny_model()
    language_model = model.model.language_model

    def zero_mask(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "cross_attention_mask": torch.zeros(2, 1, 17, 31)}

    language_model.register_forward_pre_hook(zero_mask, with_kwargs=True)
    assert_same_training(results, reference_steps([[batch]], model), sp_size=2)


# ---- what is never made


def largest_tensor(length: int, images: int) -> int:
    """Elements of the largest tensor that sharding a batch and a step on this rank make."""
    ids = torch.randint(1, IMAGE, (1, length), generator=torch.Generator().manual_seed(0))
    reach = torch.arange(length)[:, None] * images // length
    mask = (torch.arange(images) < reach)[None, :, :, None].expand(1, -1, -1, TILES)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "cross_attention_mask": mask.contiguous(),
        "cross_attention_states": torch.randn(1, images * TILES * PATCHES, 32),
    }
    with LargestTensor() as largest:
        plain_step(rules(2, 1), batch)
    return largest.elements


@pytest.mark.slow
def test_no_mask_of_text_by_visual_tokens_is_ever_made() -> None:
    length, images = 256, 4000
    visual = images * TILES * PATCHES
    # A kernel's own block of a mask has up to 4096 keys, its scores up to 2^21 numbers.
    allowed = max(length * 4096, 2**21)
    assert allowed < length * visual // 4
    for elements in run_ranks(largest_tensor, 2, length, images):
        assert 0 < elements <= allowed
