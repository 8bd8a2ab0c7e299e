"""mPLUG-Owl3 on sharded batches computes what the model computes in one process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ds_lvx.config import LVXConfig
from ds_lvx.models.batch import Text
from ds_lvx.models.mplugowl3.batch import visual
from ds_lvx.models.mplugowl3.family import MPlugOwl3
from ds_lvx.models.prepare import patch
from tests.models import mllama_case
from tests.models.mllama_case import (
    assert_same_training,
    plain_step,
    reference_steps,
    sharded_steps,
)
from tests.models.mplugowl3_double import MPlugOwl3Config, mPLUGOwl3Model
from tests.ranks import run_ranks

Batch = dict[str, Any]
RECOMPUTE: dict[str, Any] = {"method": "lvx", "recompute_kv": True}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    # the rule of the hyper layers, the method of the other text layers
    "chunks": ({**RECOMPUTE, "kv_chunk_tokens": 5}, "ulysses"),
    "lvx": ({"method": "lvx", "schedule": "ring"}, "ring"),
    "ring": ({"method": "ring"}, "lvx"),
    "recompute": (RECOMPUTE, "ulysses"),
}


def tiny_model() -> mPLUGOwl3Model:
    """Four text layers, two of them hyper layers; nothing at 0 or 1; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = mPLUGOwl3Model(MPlugOwl3Config())
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
        # The last layer of the tower is not used by the model either.
        model.vision_model.layers[-1].requires_grad_(False)
    return model


def make_batch(images_at: Sequence[Sequence[int]], *, lengths: Sequence[int], seed: int) -> Batch:
    """A batch as the processor returns it, padded on the right, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 96, (len(lengths), max(lengths)), generator=generator)
    valid = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    count = sum(map(len, images_at))
    labels = ids.masked_fill(valid == 0, -100)
    for row, places in enumerate(images_at):
        labels[row, list(places)] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(count, 3, 8, 8, generator=generator),
        "media_offset": [torch.tensor(list(places), dtype=torch.int64) for places in images_at],
    }


def hard_batch(seed: int = 0) -> Batch:
    """Text before the first image, unequal texts, a sample without images."""
    return make_batch([[2, 3, 7, 9], [0], []], lengths=[15, 12, 7], seed=seed)


def one_image(seed: int = 1) -> Batch:
    return make_batch([[4]], lengths=[11], seed=seed)


def text_only(seed: int = 2) -> Batch:
    batch = make_batch([[], []], lengths=[9, 13], seed=seed)
    del batch["pixel_values"]
    return batch


BATCHES = {make.__name__: make for make in (hard_batch, one_image, text_only)}


def rules(name: str, ranks: int, stage: int = 0) -> dict[str, Any]:
    hyper, text = RULES[name]
    config = mllama_case.ds_config(stage=stage, sp_size=ranks, cross=hyper, self_attn=text)
    hyper_layers = "*.layers.[02].self_attn"
    config["ds_lvx"]["layers"][1]["match"] = hyper_layers
    return config


@functools.cache
def reference(name: str) -> dict[str, Any]:
    return reference_steps([[BATCHES[name]()]], tiny_model())


def compared(results: list[dict[str, Any]], expected: dict[str, Any], ranks: int) -> None:
    """Of gradients those of parameters that train; the others have none in one process."""
    for result in results:
        result["grads"] = {n: g for n, g in result["grads"].items() if n in expected["grads"]}
    assert_same_training(results, expected, sp_size=ranks)


def step_each(ranks: int) -> list[dict[str, Any]]:
    return [
        plain_step(rules(name, ranks), make(), model=tiny_model())
        for name in RULES
        for make in BATCHES.values()
    ]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_kind_of_batch_equals_one_process(ranks: int) -> None:
    results = run_ranks(step_each, ranks, ranks)
    cases = [(rule, name) for rule in RULES for name in BATCHES]
    for index, (rule, name) in enumerate(cases):
        try:
            compared([each[index] for each in results], reference(name), ranks)
        except AssertionError as error:
            raise AssertionError(f"{name} by {rule} on {ranks} ranks: {error}") from error


def test_reference_has_gradients_everywhere() -> None:
    """Else the comparisons compare zeros."""
    assert all(grad.any() for grad in reference("hard_batch")["grads"].values())


def train_each(config: dict[str, Any], batches: Any) -> dict[str, Any]:
    return sharded_steps(config, batches, model=tiny_model())


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (3, "recompute"),
        pytest.param(0, "recompute", marks=pytest.mark.slow),
        pytest.param(2, "lvx", marks=pytest.mark.slow),
        pytest.param(1, "ring", marks=pytest.mark.slow),
    ],
)
def test_training_equals_one_process(stage: int, name: str) -> None:
    batches = [[hard_batch(0)], [one_image(1)]]
    results = run_ranks(train_each, 2, rules(name, 2, stage), batches)
    assert_same_training(results, reference_steps(batches, tiny_model()), sp_size=2)


def test_a_replica_without_images_beside_one_with_images() -> None:
    """Under ZeRO-3 both run an image through the tower."""
    batches = [[hard_batch(0), text_only()], [text_only(), one_image()]]
    results = run_ranks(train_each, 2, rules("recompute", 1, 3), batches)
    assert_same_training(results, reference_steps(batches, tiny_model()), sp_size=1)


def test_what_hyper_layers_cannot_do_is_refused() -> None:
    config = rules("lvx", 2)
    config["ds_lvx"]["layers"][1].update(method="ulysses", schedule="auto")
    with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn, a hyper layer .*'ring'"):
        patch(MPlugOwl3(), tiny_model(), LVXConfig.from_ds_config(config), sp_size=2)
    gated = tiny_model()
    gated.language_model.model.layers[0].self_attn.gate = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(NotImplementedError, match="expected release 241101"):
        MPlugOwl3().check(gated, sp_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"media_offset": [torch.tensor([2, 11])]}, r"\[2, 11\] for sample 0; .* from 0 to 10"),
        ({"media_offset": [torch.tensor([4, 2])]}, "that go up"),
        ({"media_offset": [torch.tensor([2, 4])]}, r"\(1, 3, 8, 8\) for 2 images in media_offset"),
        ({"media_offset": []}, "expected a list with a tensor for each of 1 samples"),
        ({"pixel_values": torch.zeros(1, 3, 9, 9)}, r"\(1, 3, 9, 9\).*expected \(1, 3, 8, 8\)"),
    ],
)
def test_offsets_that_do_not_fit(change: Batch, message: str) -> None:
    batch = {**one_image(), **change}
    with pytest.raises(ValueError, match=message):
        visual(batch, Text.of(batch), tiny_model())
