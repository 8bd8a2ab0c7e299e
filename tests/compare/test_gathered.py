"""The peer that gathers embeddings does the same work, and sends what it says beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.weigh import Weighing, weigh
from ds_lvx.compare.case import Case, cut, random_case
from ds_lvx.compare.training import model
from ds_lvx.compare.training.gathered import instead_of
from ds_lvx.compare.training.model import skipped
from ds_lvx.compare.training.rank import Task, finetune
from ds_lvx.models import FAMILIES
from ds_lvx.plan.memory import Setting
from tests.ranks import run_ranks

RANKS, TEXT = 2, 8
SIZES = {"vision_hidden": 32, "vision_heads": 2, "vision_mlp": 64, "vocabulary": 96, "mlp": 64}


def case_of(name: str) -> Case:
    hidden = 512 if name in ("qwen3_5", "gemma3", "gemma4") else 256  # two heads
    case = cut(random_case(name), hidden=hidden, cross_layers=2, vision_layers=2)
    small = {} if name == "qwen2_5_vl" else {"image_size": 64, "patch_size": 16}
    return replace(case, **SIZES, **small, text_tokens=TEXT)


def record(case: Case, method: str, *, frames: int, ranks: int = RANKS) -> dict[str, Any]:
    task = Task("random", case, frames, recompute=False, method=method, warmup=0, repeats=1)
    return model.record(method, run_ranks(finetune, ranks, task))


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("qwen3_vl", 3),
        pytest.param("qwen2_5_vl", 4, marks=pytest.mark.exhaustive),
        pytest.param("qwen3_5", 2, marks=pytest.mark.exhaustive),
        pytest.param("gemma3", 3, marks=pytest.mark.exhaustive),
        pytest.param("video_llama_3", 2, marks=pytest.mark.exhaustive),
        pytest.param("gemma4", 3, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.slow
def test_loss_and_gradients_are_those_of_one_process_and_ours(name: str, frames: int) -> None:
    """With features for further layers, and uneven shares, too."""
    case = case_of(name)
    peer, ours = (record(case, method, frames=frames) for method in ("gathered", "ulysses"))
    for other in (ours, record(case, "none", frames=frames, ranks=1)):
        assert peer["losses"][0] == pytest.approx(other["losses"][0], rel=1e-5)
        norms = other["gradient_norms"]
        largest = max(norms.values())
        assert peer["gradient_norms"] == pytest.approx(norms, rel=1e-4, abs=1e-5 * largest)
    tower = [
        norm
        for key, norm in peer["gradient_norms"].items()
        if key.endswith(".qkv.weight")
        or ("vision_" in key and ".q_proj." in key and key.endswith(".weight"))
    ]
    assert len(tower) == 2
    assert min(tower) > 0
    if frames % RANKS == 0:  # else ours has more tokens on one rank, and Ulysses sends more
        each = case.frame_tokens * case.hidden * 4
        more = peer["attention_bytes"] - ours["attention_bytes"]
        # This rank's features to the other, and the gradients of the other's.
        assert more == pytest.approx(2 * frames // RANKS * each, rel=0.02)


@pytest.mark.exhaustive
def test_memory_is_weighed_as_the_peer_does() -> None:
    case = case_of("qwen2_5_vl")
    load = Weighing(case, Setting("ulysses", checkpointing=True), (1, 1, 2))
    peer, ours = (
        run_ranks(weigh, RANKS, replace(load, gathered=gathers)) for gathers in (True, False)
    )
    for step in range(2):
        shares, own = ([rank["loss"][step] for rank in each] for each in (peer, ours))
        assert shares != own  # of a rank's own tokens: here in a piece, there dealt
        assert sum(shares) == pytest.approx(sum(own), rel=1e-2)


def test_others_have_nothing_to_gather() -> None:
    with pytest.raises(ValueError, match="got a model of type 'mllama'"):
        instead_of("mllama")
    few = replace(case_of("qwen2_5_vl"), heads=2)
    task = Task("random", few, frames=4)
    assert [*skipped(task, ("gathered", "lvx-ring"), ranks=4)] == ["gathered"]


def test_the_family_comes_back() -> None:
    own = FAMILIES.named("qwen2_5_vl")
    with instead_of("qwen2_5_vl"):
        assert isinstance(FAMILIES.named("qwen2_5_vl"), type(own))
        assert FAMILIES.named("qwen2_5_vl").owned([1] * 5, 0, 2) == [0, 1, 2]
    assert FAMILIES.named("qwen2_5_vl") is own
