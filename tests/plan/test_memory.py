"""The formulas of memory, against what autograd saves and what is alive in real layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.memory import peak_per_key
from ds_lvx.compare.case import Case
from ds_lvx.models.dimensions import Layers
from ds_lvx.plan.memory import (
    Load,
    Setting,
    footprint,
    kept,
    logits_bytes,
    peak,
)
from ds_lvx.plan.models import model
from ds_lvx.plan.scenario import Scenario
from tests.plan.counting import TINY, peak_bytes, saved_bytes
from tests.ranks import run_ranks

RECOMPUTE = Setting(recompute_kv=True)
CHUNKS = replace(RECOMPUTE, kv_chunk_tokens=32)
SAVED = {
    "lvx": Setting(),
    "recompute": RECOMPUTE,
    "chunks": replace(RECOMPUTE, kv_chunk_tokens=8),
    "ring": Setting(method="ring"),
    "ulysses": Setting(method="ulysses"),
}
MLLAMA = Layers(8, 4096, 32, 8, 128)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layers_save_exactly_what_the_formula_says(ranks: int) -> None:
    sizes = ((2, torch.bfloat16), (7, torch.float32))
    cases = [(name, *size, False) for name in SAVED for size in sizes]
    cases += [(name, *size, True) for name in ("lvx", "recompute", "ring") for size in sizes]
    for answers in run_ranks(_saved, ranks, cases):
        for each, (features, of_layers) in zip(cases, answers, strict=True):
            name, frames, dtype, lora = each
            keys, queries = frames * TINY.frame_tokens, TINY.text_tokens // ranks
            load = Load(keys, queries, ranks=ranks, element_bytes=dtype.itemsize, lora_r=2 * lora)
            expected = kept(TINY.layers, SAVED[name], load)
            assert features == expected.features, each
            of_each = expected.of_keys + expected.of_queries
            assert of_layers == [of_each] * TINY.cross_layers, each


def _saved(cases: list[tuple[str, int, torch.dtype, bool]]) -> list[tuple[int, list[int]]]:
    return [
        saved_bytes(SAVED[name], frames=frames, dtype=dtype, lora=lora)
        for name, frames, dtype, lora in cases
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "kv_heads", "features"),
    [
        (Setting(), 1, "trained"),
        pytest.param(RECOMPUTE, 4, "frozen", marks=pytest.mark.exhaustive),
        pytest.param(CHUNKS, 1, "trained", marks=pytest.mark.exhaustive),
    ],
    ids=["kept", "again", "chunks"],
)
def test_a_token_adds_to_the_peak_what_the_formula_says(
    setting: Setting, kv_heads: int, features: str
) -> None:
    case = replace(TINY, hidden=128, kv_heads=kv_heads, text_tokens=2, features=features)
    # The kernel's blocks are of one size: small beside these, and no larger than a chunk.
    few, many = (2**12, 2**13) if setting.kv_chunk_tokens else (2**14, 2**15)
    (low,) = run_ranks(_peak, 1, setting, case, few)
    (high,) = run_ranks(_peak, 1, setting, case, many)
    load = Load(keys=1, features_train=features == "trained", host_is_device=True)
    expected = peak_per_key(case.layers, setting, load)
    assert (high - low) / (many - few) == pytest.approx(expected, rel=0.05)


def _peak(setting: Setting, case: Case, keys: int) -> int:
    return peak_bytes(setting, case, keys=keys)


def test_what_a_layer_keeps_does_not_grow_with_the_visual_input() -> None:
    short, long = (kept(MLLAMA, RECOMPUTE, Load(keys=n, queries=9)) for n in (10, 10**6))
    assert (short.of_keys, short.of_queries) == (long.of_keys, long.of_queries)
    assert short.of_keys == 0
    assert long.features == 10**6 * 4096 * 2


def test_eight_times_as_many_tokens_on_an_accelerator() -> None:
    smallest = Setting(
        recompute_kv=True, checkpointing=True, features="offload", kv_chunk_tokens=8192
    )
    for trained in (True, False):
        load = Load(keys=1, ranks=2, features_train=trained)
        plain = peak_per_key(MLLAMA, Setting(), load)
        assert plain > 8 * peak_per_key(MLLAMA, smallest, load)


def test_offloading_saves_nothing_where_the_host_is_the_device() -> None:
    offload = replace(CHUNKS, features="offload")
    here = Load(keys=10**5, host_is_device=True)
    assert peak(MLLAMA, offload, here) == peak(MLLAMA, CHUNKS, here)
    assert kept(MLLAMA, offload, here) == kept(MLLAMA, CHUNKS, here)
    elsewhere = replace(here, host_is_device=False)
    assert kept(MLLAMA, offload, elsewhere).features == 0
    # Without a chunk length features are streamed in chunks all the same.
    unchunked = replace(offload, kv_chunk_tokens=None)
    assert peak(MLLAMA, unchunked, elsewhere) < 0.5 * peak(MLLAMA, RECOMPUTE, elsewhere)


def test_ulysses_keeps_its_keys_when_checkpointed() -> None:
    load = Load(keys=100, ranks=4)
    checkpointed = Setting(method="ulysses", checkpointing=True)
    one_head = replace(MLLAMA, kv_heads=1)
    assert kept(MLLAMA, checkpointed, load).of_keys == 100 * 2 * 2 * 8 * 128
    # A single head of K and V is repeated, so that each of the four ranks has one.
    assert kept(one_head, checkpointed, load).of_keys == 100 * 2 * 2 * 4 * 128
    assert kept(MLLAMA, replace(checkpointed, method="lvx"), load).of_keys == 0


def test_logits_come_in_tiles() -> None:
    """docs/memory.md: 10 bytes a logit of one tile, and 4 a weight of the head where it trains."""
    whole = Scenario(model("Llama-3.2-11B-Vision"), text_tokens=65_536, frames=4)
    words, hidden = whole.model.vocabulary, whole.model.text.hidden
    assert logits_bytes(whole, 65_536) == 10 * 65_536 * words
    tiled = replace(whole, loss_tiles=64)
    assert logits_bytes(tiled, 65_536) == 10 * 1024 * words + 4 * words * hidden
    assert logits_bytes(replace(tiled, trains="cross"), 65_000) == 10 * 1016 * words
    saved = [footprint(s, gpus=8, ranks=1, way="lvx gather").text for s in (whole, tiled)]
    assert saved[0] - saved[1] == logits_bytes(whole, 65_536) - logits_bytes(tiled, 65_536)
    with pytest.raises(ValueError, match="loss_tiles: got 0"):
        replace(whole, loss_tiles=0)
