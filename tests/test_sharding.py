"""`owned`, `shard_batch` and `mean_loss`, and what happens when ranks do not agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models.cuts import split
from ds_lvx.sharding import draft_batch, mean_loss, owned, shard_batch
from tests.models import mllama_case, moss_vl_case, qwen2_5_vl_case
from tests.models.mllama_case import TILES, hard_batch, make_batch, tiny_model
from tests.ranks import RankError, run_ranks


@pytest.mark.parametrize(
    ("count", "parts", "lengths"),
    [(7, 3, (3, 2, 2)), (6, 3, (2, 2, 2)), (1, 3, (1, 0, 0)), (0, 2, (0, 0)), (5, 1, (5,))],
)
def test_split_is_balanced(count: int, parts: int, lengths: tuple[int, ...]) -> None:
    assert split(count, parts) == lengths


def test_one_process_owns_everything() -> None:
    assert owned(5) == range(5)
    with pytest.raises(ValueError, match="count=-1"):
        owned(-1)


def owned_by_me(count: int) -> tuple[range, range]:
    whole_world = owned(count)
    groups = SequenceParallelGroups(2)
    assert owned(count, groups=groups) == owned(count)
    return whole_world, owned(count)


@pytest.mark.slow
def test_ranks_of_a_group_own_the_frames_between_them() -> None:
    results = run_ranks(owned_by_me, 4, 5)
    assert [world for world, _ in results] == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert [mine for _, mine in results] == [range(3), range(3, 5)] * 2


def owned_by_cost(costs: list[float]) -> range:
    mine = owned(len(costs), costs=costs)
    assert isinstance(mine, range)
    return mine


@pytest.mark.parametrize(
    ("costs", "ranges"),
    [
        ([1.0] * 6, [range(2), range(2, 4), range(4, 6)]),
        ([4.0, 1.0, 1.0, 1.0, 1.0, 4.0], [range(1), range(1, 5), range(5, 6)]),
        ([1, 1, 9], [range(2), range(2, 3), range(3, 3)]),
        ([9.5], [range(0), range(1), range(1, 1)]),
        ([1.0, 1.0, 0.0], [range(1), range(1, 1), range(1, 3)]),
        ([0.0, 0.0, 0.0], [range(1), range(1, 2), range(2, 3)]),
        ([], [range(0)] * 3),
    ],
)
def test_frames_are_dealt_by_cost(costs: list[float], ranges: list[range]) -> None:
    found = run_ranks(owned_by_cost, 3, costs)
    assert [[*mine] for mine in found] == [[*mine] for mine in ranges]


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ([1.0, -2.0], "costs with -2.0 for 2 frames"),
        ([1.0, float("nan")], "costs with nan for 2 frames"),
        ([float("inf"), 1.0], "costs with inf for 2 frames"),
        ([1.0], "1 costs for 2 frames; expected a number from 0 on for each"),
    ],
)
def test_costs_that_cannot_be(costs: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        owned(2, costs=costs)


def loss_means(value: float) -> tuple[float, float, bool]:
    loss = torch.tensor(value * (1 + torch.distributed.get_rank()), requires_grad=True)
    world = mean_loss(loss)
    SequenceParallelGroups(2)
    mean = mean_loss(loss.to(torch.bfloat16))
    return world.item(), mean.item(), mean.requires_grad or mean.dtype != torch.float32


@pytest.mark.slow
def test_mean_loss_sums_over_the_sequence_and_averages_over_replicas() -> None:
    # (1 + 2) and (3 + 4) are the losses of two samples.
    assert run_ranks(loss_means, 4, 1.0) == [(10.0, 5.0, False)] * 4


NO_LOSSES: dict[str, Any] = {
    "rank 1: mean_loss: got NoneType; expected out.loss": None,
    "rank 1: mean_loss: got shape [2]": torch.ones(2),
    "rank 1: mean_loss: got float": 1.0,
}


def losses_of_one_rank() -> tuple[list[str], float, bool]:
    here, loss = torch.distributed.get_rank() == 1, torch.tensor(2.0)
    found = []
    for wrong in NO_LOSSES.values():
        with pytest.raises(ValueError, match="mean_loss") as caught:
            mean_loss(wrong if here else loss)
        found.append(str(caught.value))
    nan = mean_loss(loss * torch.nan if here else loss)
    return found, mean_loss(loss).item(), bool(nan.isnan())


def test_one_rank_without_a_loss_is_every_ranks_error() -> None:
    for found, mean, is_nan in run_ranks(losses_of_one_rank, 2):
        for words, message in zip(NO_LOSSES, found, strict=True):
            assert message.startswith(words)
        assert mean == 4.0
        assert is_nan


def shards(ranks: int) -> list[dict[str, Any]]:
    return run_ranks(shard_here, ranks)


def shard_here() -> dict[str, Any]:
    shard = shard_batch(hard_batch(), model=tiny_model())
    keyword = shard.pop("ds_lvx")
    return {
        **shard,
        "text_lengths": keyword.text_lengths,
        "kv_lengths": keyword.kv_lengths,
        "row_mask": keyword.row_mask,
    }


def test_what_a_shard_holds() -> None:
    batch, parts = hard_batch(), shards(3)
    for key in ("input_ids", "labels"):
        assert torch.equal(torch.cat([part[key] for part in parts], dim=1), batch[key])
    positions = torch.cat([part["position_ids"] for part in parts], dim=1)
    assert torch.equal(positions, torch.arange(17)[None])
    shifted = torch.cat([part["shift_labels"] for part in parts], dim=1)
    assert torch.equal(shifted[:, :-1], batch["labels"][:, 1:])
    assert (shifted[:, -1] == -100).all()
    pixels = torch.cat([part["pixel_values"] for part in parts], dim=1)
    assert torch.equal(pixels, batch["pixel_values"])
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    for part in parts:
        assert part["num_items_in_batch"] == labelled
        assert part["use_cache"] is False
        assert part["text_lengths"] == (6, 6, 5)
        assert part["kv_lengths"] == (TILES * 5,) * 3
    rows = torch.cat([part["row_mask"] for part in parts], dim=2)
    assert torch.equal(rows[:, 0, :, 0], batch["cross_attention_mask"].flatten(2).any(dim=2))


def test_a_batch_without_any_label() -> None:
    batch = hard_batch()
    batch["labels"][:] = -100
    model = tiny_model()
    for counted in (None, 0, torch.tensor(0)):  # a Trainer counts its labels
        shard = shard_batch({**batch, "num_items_in_batch": counted}, model=model)
        assert shard["num_items_in_batch"] == 1


@pytest.mark.parametrize("case", [mllama_case, qwen2_5_vl_case, moss_vl_case])
def test_a_batch_looks_at_no_more_of_a_deeper_model(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of billions has thousands of modules, through which each step would go."""
    model, seen = case.tiny_model(), []
    walk = nn.Module.named_modules

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for each in walk(module, *args, **kwargs):
            if not args:  # not from a module inside
                seen.append(each)
            yield each

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    shard_batch(case.hard_batch(), model=model)
    assert len(seen) < 16 < len(list(walk(model)))


def test_the_items_that_a_loss_is_a_mean_of_may_be_given() -> None:
    for given in (6.5, torch.tensor(6.5)):
        batch = {**hard_batch(), "num_items_in_batch": given}
        assert shard_batch(batch, model=tiny_model())["num_items_in_batch"] == 6.5


def test_labels_of_another_integer_type() -> None:
    batch, model = hard_batch(), tiny_model()
    expected = shard_batch(batch, model=model)["shift_labels"]
    found = shard_batch({**batch, "labels": batch["labels"].int()}, model=model)["shift_labels"]
    torch.testing.assert_close(found, expected)  # in dtype, too: cross-entropy takes int64 alone


def test_a_batch_without_labels() -> None:
    batch = {key: value for key, value in hard_batch().items() if key != "labels"}
    shard = shard_batch(batch, model=tiny_model())
    assert not {"labels", "shift_labels", "num_items_in_batch"} & set(shard)


# ---- in a data loader's worker


def drafts_of_a_worker() -> None:
    model, groups = tiny_model(), SequenceParallelGroups(2)
    batches = [hard_batch(0), {**hard_batch(1), "input_ids": None}]
    if groups.sp_rank == 1:
        batches[1] = hard_batch(1)

    def collate(samples: list[Any]) -> Any:
        with pytest.raises(RuntimeError, match="call ds_lvx"):
            shard_batch(samples[0], model=model)
        return draft_batch(samples[0], model=model)

    loader = DataLoader(batches, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
    good, bad = loader
    whole = hard_batch(0)["pixel_values"].untyped_storage().nbytes()
    assert good.content.visual.arguments["pixel_values"].untyped_storage().nbytes() < whole
    found, expected = shard_batch(good, model=model), shard_batch(hard_batch(0), model=model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, atol=0, rtol=0)
    for kind in ("self", "cross"):
        mine, theirs = (shard["ds_lvx"].layout(kind) for shard in (found, expected))
        assert (mine.q_lengths, mine.kv_lengths) == (theirs.q_lengths, theirs.kv_lengths)
        rules = [each.rule(queries=None, keys=0).visibility for each in (mine, theirs)]
        torch.testing.assert_close(rules[0].kv_pos, rules[1].kv_pos)
        torch.testing.assert_close(rules[0].q_end, rules[1].q_end)
    with pytest.raises(ValueError, match=r"rank 0.*got input_ids of NoneType"):
        shard_batch(bad, model=model)
    other = replace(good, content=replace(good.content, place=(0, 3)))
    with pytest.raises(ValueError, match="draft of rank 0 of 3 on rank"):
        shard_batch(other, model=model)
    groups.close()


def test_a_worker_drafts_and_the_training_process_shards() -> None:
    run_ranks(drafts_of_a_worker, 2)


# ---- mistakes


def changed(**changes: Any) -> dict[str, Any]:
    return {**hard_batch(), **changes}


MISTAKES: dict[str, tuple[Any, str]] = {
    "no names": ([hard_batch()["input_ids"]], "got a batch of type list; expected what the proc"),
    "unknown key": (changed(pixel_value=1), r"got 'pixel_value'.*nearest: 'pixel_values'"),
    "no ids": (changed(input_ids=None), "got input_ids of NoneType"),
    "no items": (
        changed(num_items_in_batch=0),
        "got num_items_in_batch 0; expected a number above",
    ),
    "items": (changed(num_items_in_batch=torch.ones(2)), "got num_items_in_batch tensor"),
    "a list": (changed(input_ids=[[1]]), "got input_ids of list"),
    "labels": (changed(labels=torch.ones(2, 5)), r"got labels \(2, 5\).*\(2, 17\)"),
    "the label of an image": (
        changed(labels=hard_batch()["input_ids"]),
        r"got the label 128 at place 4 of sample 0 for a model that writes 128 tokens.*or -100",
    ),
    "a token of another tokenizer": (
        changed(input_ids=hard_batch()["input_ids"] + 9),
        r"got the token 137 at place \d+ of sample \d for a model that embeds 136",
    ),
    "labels that are none": (
        changed(labels=hard_batch()["labels"].float()),
        r"got labels \(2, 17\) of torch.float32; .* and integers",
    ),
    "ids that are none": (
        changed(input_ids=hard_batch()["input_ids"].float()),
        r"got input_ids \(2, 17\) of torch.float32; expected integers",
    ),
    "4-D mask": (changed(attention_mask=torch.ones(2, 1, 17, 17)), "got attention_mask"),
    "two masks": (changed(visible_images=torch.zeros(2, 17, 2)), "expected one of them"),
    "both inputs": (changed(cross_attention_states=torch.zeros(6, 5, 32)), "one of them"),
    "ratio ids": (changed(aspect_ratio_ids=None), "pixel_values without aspect_ratio_ids"),
    "tiles": (changed(pixel_values=torch.zeros(2, 3, 4, 3, 28, 28)), "got pixel_values"),
    "mask of a shard": (
        changed(cross_attention_mask=torch.ones(2, 9, 3, TILES)),
        "the whole sequence, never a shard",
    ),
    "mask of other images": (
        changed(cross_attention_mask=torch.ones(2, 17, 2, TILES)),
        "mask for 2 images a sample, and 3 images",
    ),
    "mask without images": (
        {k: v for k, v in hard_batch().items() if not k.startswith(("pixel", "aspect"))},
        "mask for 3 images a sample, and 0 images",
    ),
    "features": (
        {
            "input_ids": torch.ones(2, 17, dtype=torch.long),
            "cross_attention_states": torch.zeros(2, 7, 9),
        },
        r"got cross_attention_states \(2, 7, 9\)",
    ),
    "features of half an image": (
        {
            "input_ids": torch.ones(2, 17, dtype=torch.long),
            "cross_attention_states": torch.zeros(2, 7, 32),
            "cross_attention_mask": torch.ones(2, 17, 1, TILES),
        },
        "got 7 visual tokens a sample",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_batch(name: str) -> None:
    batch, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        shard_batch(batch, model=tiny_model())


def test_words_for_frames() -> None:
    with pytest.raises(ValueError, match='expected "all" or "local"'):
        shard_batch(hard_batch(), model=tiny_model(), frames="mine")
    batch = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "cross_attention_states": torch.zeros(1, 10, 32),
    }
    with pytest.raises(ValueError, match='cross_attention_states with frames="local"'):
        shard_batch(batch, model=tiny_model(), frames="local")


def differ(what: str) -> None:
    rank = torch.distributed.get_rank()
    batch, model = hard_batch(), tiny_model()
    if rank == 1:
        if what == "model":
            model = None
        elif what == "text":
            batch["input_ids"][0, 0] += 1
        elif what == "length":
            batch = make_batch([[4, 5, 9], [3]], length=16, num_tiles=[[2, 1, 2], [1]])
        elif what == "items":
            batch["num_items_in_batch"] = 7
        elif what == "mask":
            batch["cross_attention_mask"][0, 16] = 0
        elif what == "images":
            batch = make_batch([[4, 5], [3]], length=17, num_tiles=[[2, 1], [1]])
        else:
            batch["nonsense"] = torch.zeros(1)
    shard_batch(batch, model=model)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("text", "the ranks disagree on contents of the text"),
        ("length", "the ranks disagree on shape of input_ids"),
        ("items", "the ranks disagree on num_items_in_batch: got None on rank 0, 7 on rank 1"),
        ("mask", "the ranks disagree on visibility of the images"),
        ("images", "the ranks disagree on"),
        ("nonsense", "rank 1: got 'nonsense' in the batch"),
        ("model", "rank 1: got a model of type NoneType; expected a torch.nn.Module"),
    ],
)
def test_what_one_rank_gets_wrong_raises_on_all(what: str, words: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(differ, 2, what)
    assert set(caught.value.errors) == {0, 1}
    for text in caught.value.errors.values():
        assert "ValueError" in text
        assert words in text


def too_short() -> None:
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    shard_batch(batch, model=tiny_model())


def test_more_ranks_than_text_tokens() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(too_short, 3)
    assert set(caught.value.errors) == {0, 1, 2}
    assert all("got 2 text tokens for 3 ranks" in t for t in caught.value.errors.values())
