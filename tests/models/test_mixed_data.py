"""Batches with and without images, mixed: all ranks of all replicas go on under ZeRO-3, and train
as one process does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lvx.sharding import shard_batch
from tests.models.mllama_case import (
    LEARNING_RATE,
    PATCHES,
    TILES,
    Batch,
    assert_same_training,
    ds_config,
    end_engine,
    hard_batch,
    make_batch,
    reference_steps,
    sharded_steps,
    start_engine,
    tiny_model,
    weights,
)
from tests.ranks import run_ranks

SEED = 0
FORWARDS = 2  # a step, each of a batch a replica
REPLICAS, SP_SIZE = 2, 2
FRAMES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
IN_CHUNKS = {"method": "lvx", "recompute_kv": True, "kv_chunk_tokens": 24}
TEXT = ("input_ids", "attention_mask", "labels")

Result = tuple[list[float], dict[str, Tensor]]
"""The losses of a rank or a process in order, and the weights at the end."""


def random_step(seed: int, step: int) -> list[list[Batch]]:
    """The batches of a step by forward and replica, each divided by the labels of them all."""
    rng = random.Random(f"{seed} {step}")
    share = rng.choice((0.0, 0.3, 0.7))  # of samples that have images
    batches = [[random_batch(rng, share) for _ in range(REPLICAS)] for _ in range(FORWARDS)]
    each = [batch for forward in batches for batch in forward]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in each)
    for batch in each:
        batch["num_items_in_batch"] = torch.tensor(max(items, 1) / len(each))
    return batches


def random_batch(rng: random.Random, share: float) -> Batch:
    """One or two samples, each without images or with up to three in any places."""
    length = rng.randint(5, 14)
    counts = [rng.randint(1, 3) * (rng.random() < share) for _ in range(rng.randint(1, 2))]
    places = [sorted(rng.sample(range(length), count)) for count in counts]
    tiles = [[rng.randint(1, TILES) for _ in range(count)] for count in counts]
    batch = make_batch(places, length=length, num_tiles=tiles, seed=rng.randrange(2**31))
    tokens = length - rng.choice((0, 0, 3))
    batch["attention_mask"][-1, tokens:] = 0
    batch["labels"][-1, tokens:] = -100
    if rng.random() < 0.1:
        batch["labels"].fill_(-100)
    return batch if any(counts) else {key: batch[key] for key in TEXT}


def as_held(batch: Batch, rng: random.Random, rank: int) -> tuple[Batch, str]:
    """The batch whole, or with the images of this rank alone, which may be none."""
    if "pixel_values" not in batch or rng.random() < 0.5:
        return batch, "all"
    images = batch["pixel_values"].shape[1]
    cut = rng.randint(0, images)
    here = slice(0, cut) if rank == 0 else slice(cut, images)
    local = {key: value for key, value in batch.items() if key not in FRAMES}
    if here.start < here.stop:
        local |= {key: batch[key][:, here] for key in FRAMES}
    return local, "local"


def one_process(seed: int, steps: int) -> Result:
    """transformers' own model: the loss of each batch, forward by forward."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        for forward in random_step(seed, step):
            for batch in forward:
                loss = model(**batch, use_cache=False).loss
                (loss / (FORWARDS * REPLICAS)).backward()
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def on_a_rank(seed: int, steps: int, config: dict[str, Any]) -> Result:
    """This rank's part of the loss of its replica's batch, forward by forward."""
    engine = start_engine(config, small_model())
    groups = engine.ds_lvx.groups
    losses = []
    for step in range(steps):
        for forward, batches in enumerate(random_step(seed, step)):
            # A rank that hangs has this for its last words.
            print(f"seed {seed}, step {step}, forward {forward}", flush=True)
            rng = random.Random(f"{seed} {step} {forward}")
            batch, frames = as_held(batches[groups.dp_rank], rng, groups.sp_rank)
            out = engine(**shard_batch(batch, model=engine.module, frames=frames))
            engine.backward(out.loss)
            engine.step()
            losses.append(out.loss.item())
    result = losses, weights(engine)
    end_engine(engine)
    return result


def small_model() -> Any:
    """Most of the time is ZeRO-3's work for a module: there are fewer of them."""
    return tiny_model(num_hidden_layers=2, cross_attention_layers=[1])


def config_of(sp_size: int, *, stage: int = 3) -> dict[str, Any]:
    return ds_config(stage=stage, sp_size=sp_size, cross=IN_CHUNKS, self_attn="ulysses")


@pytest.mark.parametrize(
    "steps",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.exhaustive)],
)
def test_random_batches_have_the_losses_of_one_process(steps: int) -> None:
    config = config_of(SP_SIZE) | {"gradient_accumulation_steps": FORWARDS}
    results = run_ranks(on_a_rank, REPLICAS * SP_SIZE, SEED, steps, config, timeout_s=300)
    expected, final = one_process(SEED, steps)
    for number, loss in enumerate(expected):
        forward, replica = divmod(number, REPLICAS)
        group = results[replica * SP_SIZE :][:SP_SIZE]
        found = sum(losses[forward] for losses, _ in group)
        step = f"seed {SEED}, step {forward // FORWARDS}, forward {forward % FORWARDS}"
        assert found == pytest.approx(loss, abs=2e-5), f"{step}, replica {replica}"
    for rank, (_, weights_here) in enumerate(results):
        for name, weight in final.items():
            torch.testing.assert_close(
                weights_here[name], weight, atol=2e-5, rtol=1e-5, msg=f"{name} on rank {rank}"
            )


# ---- kinds of mixtures that once hung


def text_of(batch: Batch) -> Batch:
    return {key: batch[key] for key in TEXT}


def check(ours: list[list[Batch]], theirs: list[list[Batch]], *, stage: int = 3) -> None:
    """Two replicas of one rank each."""
    config = config_of(1, stage=stage)
    results = run_ranks(sharded_steps, 2, config, ours, timeout_s=120)
    assert_same_training(results, reference_steps(theirs), sp_size=1)


@pytest.mark.slow
def test_replicas_of_unequal_images_project_in_as_many_chunks() -> None:
    """ZeRO-3 gathers a projection's weights for each of them."""
    one = make_batch([[1]], length=9, num_tiles=[[2]], seed=1)
    batches = [[hard_batch(0), one], [text_of(hard_batch(2)), hard_batch(3)]]
    check(batches, batches)


def with_features(batch: Batch, *, seed: int) -> Batch:
    """The batch with random features in place of its frames."""
    samples, tokens = len(batch["input_ids"]), batch["pixel_values"].shape[1] * TILES * PATCHES
    features = torch.randn(samples, tokens, 32, generator=torch.Generator().manual_seed(seed))
    rest = {key: value for key, value in batch.items() if key not in FRAMES}
    return rest | {"cross_attention_states": features}


def nothing_beside(batch: Batch) -> Batch:
    return text_of(batch) | {"cross_attention_states": torch.zeros(2, 0, 32)}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_text_alone_trains_beside_features_and_images(stage: int) -> None:
    """The tower runs in all replicas, whatever they have."""
    given, images = with_features(hard_batch(0), seed=0), hard_batch(2)
    text, empty = text_of(hard_batch(1)), nothing_beside(hard_batch(1))
    ours = [[given, text], [empty, given], [images, empty], [empty, text]]
    theirs = [[given, text], [text, given], [images, text], [text, text]]
    check(ours, theirs, stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [3, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 2))]
)
def test_images_train_beside_features(stage: int) -> None:
    batches = [[with_features(hard_batch(0), seed=0), hard_batch(2)]]
    check(batches, batches, stage=stage)


@pytest.mark.slow
def test_text_alone_beside_features_on_two_ranks_each() -> None:
    given, text = with_features(hard_batch(0), seed=0), text_of(hard_batch(1))
    batches = [[given, text], [text, given]]
    results = run_ranks(sharded_steps, 4, config_of(2), batches, timeout_s=120)
    assert_same_training(results, reference_steps(batches), sp_size=2)
