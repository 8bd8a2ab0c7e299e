"""What one rank gets wrong raises on all ranks, names the rank, and hangs nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_lvx
from tests.ranks import RankError, run_ranks

FUNCTIONS = ("lv_xattn", "ring_attention", "ulysses_attention", "lv_xattn_recompute")


def wrong_inputs(wrong: str) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and keyword arguments as the rank passes them that goes wrong."""
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 6, 2, 8)
    wide = torch.randn(1, 6, 3, 8)
    tensors = {
        "shape": [torch.randn(1, 4, 32), k, k],
        "dtype": [q.int(), k.int(), k.int()],
        "another dtype": [q.bfloat16(), k.bfloat16(), k.bfloat16()],
        "heads": [q, wide, wide],
        "batch": [q.expand(2, -1, -1, -1), *[k.expand(2, -1, -1, -1)] * 2],
        "lengths": [torch.randn(1, 5, 4, 8), k, k],
        "no head_dim": [q[..., :0], k[..., :0], k[..., :0]],
    }
    arguments: dict[str, dict[str, Any]] = {
        "kernel": {"kernel": "fast"},
        "triton": {"kernel": "triton"},
        "scale": {"softmax_scale": 0.5},
        "visibility": {"visibility": ds_lvx.Visibility.all(1, 5, 6, device=q.device)},
        "no visibility elsewhere": {"visibility": ds_lvx.Visibility.all(1, 4, 6, device=q.device)},
        "a list": {"softmax_scale": [1]},
        "a negative scale": {"softmax_scale": -0.5},
        "no scale": {"softmax_scale": 0},
        "schedule": {"schedule": "star"},
        "schedules": {"schedule": "ring"},
        "lengths": {"schedule": "replicated"},
    }
    return tensors.get(wrong, [q, k, k]), arguments.get(wrong, {})


def call(name: str, wrong: str, rank: int) -> None:
    """One call of a public function that goes wrong on one rank."""
    here = torch.distributed.get_rank() == rank
    (q, k, v), arguments = wrong_inputs(wrong if here else "nothing")
    if not here and wrong in ("schedules", "lengths"):
        arguments["schedule"] = "gather" if wrong == "schedules" else "replicated"
    if here and wrong == "function":
        name = "ring_attention"
    with torch.set_grad_enabled(not (here and wrong == "grad mode")):
        if name == "lv_xattn_recompute":
            ds_lvx.lv_xattn_recompute(q, k, lambda features: (features, features), **arguments)
        else:
            getattr(ds_lvx, name)(q, k, v, **arguments)


def messages(cases: list[tuple[str, str]]) -> list[str]:
    """The error of each case on this rank."""
    found = []
    for name, wrong in cases:
        try:
            call(name, wrong, rank=1)
            found.append("no error")
        except (ValueError, NotImplementedError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


EVERYWHERE = {
    "shape": r"ValueError: rank 1: q: got shape \[1, 4, 32\]; expected \[batch",
    "dtype": r"ValueError: rank 1: q, k, v: got torch.int32; expected one of torch.float32",
    "another dtype": r"disagree on dtype: got torch.float32 on ranks 0, 2, .*bfloat16 on rank 1",
    "a list": r"ValueError: rank 1: softmax_scale: got \[1\]; expected a finite number above 0",
    "a negative scale": r"ValueError: rank 1: softmax_scale: got -0.5; expected a finite number",
    "no scale": r"ValueError: rank 1: softmax_scale: got 0; expected a finite number above 0",
    "no head_dim": r"ValueError: rank 1: q: got shape \[1, 4, 4, 0\]; expected at least one head",
    "kernel": r"ValueError: rank 1: kernel: got 'fast'; expected one of \['auto', 'native'",
    "triton": r"ValueError: rank 1: kernel: got 'triton' for head_dim 8, .* use 'native'",
    "scale": r"ValueError: .*disagree on softmax_scale.*0.5 on rank 1",
    "batch": r"ValueError: .*disagree on batch: got 1 on ranks 0, 2, 2 on rank 1",
    "visibility": r"ValueError: rank 1: visibility: got q_start \[1, 5\].*expected \[1, 4\]",
    "no visibility elsewhere": r"disagree on visibility: got False on ranks 0, 2, True on rank 1",
}
SOME = {
    ("lv_xattn", "heads"): r"ValueError: rank 1: k, v: got 3 heads for 4 .*a divisor of 4",
    ("lv_xattn", "schedule"): r"rank 1: schedule: got 'star'; expected one of \['auto', 'ring'",
    ("lv_xattn", "schedules"): r"disagree on schedule: got gather on ranks 0, 2, ring on rank 1",
    ("lv_xattn", "lengths"): r"'replicated' wants the same queries.*seqlen_q \[4, 5, 4\]",
    ("lv_xattn", "function"): r"disagree on operation: got lv_xattn on .*ring_attention on rank 1",
    ("lv_xattn", "grad mode"): r"disagree on grad_enabled: got True on ranks 0, 2, False on rank 1",
}


def test_one_ranks_mistake_is_every_ranks_error() -> None:
    cases = {(name, wrong): text for name in FUNCTIONS for wrong, text in EVERYWHERE.items()}
    cases |= SOME
    for answer in run_ranks(messages, 3, list(cases)):
        for (case, text), message in zip(cases.items(), answer, strict=True):
            assert re.search(text, message, re.DOTALL), (case, message)


def others() -> list[str]:
    """Mistakes of rank 1 alone in the other public operators."""
    here = torch.distributed.get_rank() == 1
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
    module = ds_lvx.LVXAttention()

    def project(features: Tensor) -> tuple[Tensor, Tensor]:
        return (features, features[..., :3]) if here else (features, features)

    def fewer_heads(features: Tensor) -> tuple[Tensor, Tensor]:
        return (features[:, :, :1],) * 2 if here else (features,) * 2

    tables = (torch.ones(1, 8, 1, 4), torch.ones(1, 8, 1, 4)) if here else None
    rotary = (torch.ones(1, 9, 1, 4), torch.ones(1, 9, 1, 4))
    swapped = q.transpose(0, 1)

    def pair(here: bool) -> Any:
        return [rotary[0], rotary[1][..., :3]] if here else rotary

    calls = {
        "gather_sequence: got Tensor and str": lambda: ds_lvx.gather_sequence(
            q,
            "1" if here else 1,  # type: ignore[arg-type]
        ),
        "rank 1: batch_dim_idx: got 2": lambda: module(q, k, k, 2 if here else 0),
        "rank 1: LVXAttention: got mask": lambda: module(q, k, k, 0, mask=q if here else None),
        "disagree on operation": lambda: module(q, q, q, 0, tables),
        "rank 1: v: got shape": lambda: ds_lvx.lv_xattn_recompute(q, k, project),
        "project_kv: the ranks disagree on num_kv_heads: got 2 on rank 0, 1 on rank 1": (
            lambda: ds_lvx.lv_xattn_recompute(q, k, fewer_heads)
        ),
        "rank 1: q: got NoneType": lambda: module(None if here else swapped, swapped, swapped, 1),
        "rank 1: query: got [4]": lambda: module(q[0, :, 0, 0] if here else q, k, k, 0, rotary),
        "rank 1: rotary_pos_emb: got [1, 9, 1, 4] on cpu, [1, 9, 1, 3] on cpu; expected": (
            lambda: module(q, q, q, 0, pair(here))
        ),
        "rotary_pos_emb: got 9 positions for a sequence of 12": lambda: module(q, k, k, 0, rotary),
        "rank 1: k: got a tensor of layout torch.sparse_coo": lambda: ds_lvx.ring_attention(
            q, k.to_sparse() if here else k, k
        ),
        "rank 1: return_lse: got tensor(True)": lambda: ds_lvx.lv_xattn(
            q, k, k, return_lse=torch.tensor(True) if here else True
        ),
        "rank 1: gather_sequence: got NoneType": lambda: ds_lvx.gather_sequence(
            None if here else q  # type: ignore[arg-type]
        ),
        "rank 1: 'ds_lvx'": lambda: ds_lvx.gather_sequence(q, shard={"q": q} if here else {}),
    }
    return [text for text, call in calls.items() if text not in error_of(call)]


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "no error"


def test_other_operators_leave_nobody_waiting() -> None:
    assert run_ranks(others, 2) == [[], []]


def test_a_group_of_another_kind_is_named() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="group: got list; expected a process group"):
        ds_lvx.lv_xattn(q, q, q, group=[0, 1])  # type: ignore[call-overload]


def needs(method: str, wanted: dict[int, str]) -> list[bool]:
    """Which of q, k and v have a gradient after a step in which ranks want different ones."""
    names = wanted[torch.distributed.get_rank()]
    tensors = {name: torch.randn(1, 4, 4, 8) for name in "qkv"}
    for name in names:
        tensors[name].requires_grad_()
    getattr(ds_lvx, method)(*tensors.values()).sum().backward()
    return [tensors[name].grad is not None for name in "qkv"]


@pytest.mark.parametrize("method", ["lv_xattn", "ring_attention", "ulysses_attention"])
def test_ranks_may_want_different_gradients(method: str) -> None:
    answers = run_ranks(needs, 3, method, {0: "qk", 1: "", 2: "v"})
    assert answers == [[True, True, False], [False] * 3, [False, False, True]]


def too_few_heads() -> str:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"2 query heads for 3 ranks.*'ring'") as caught:
        ds_lvx.ulysses_attention(q, q, q)
    return str(caught.value)


def test_ulysses_wants_a_head_a_rank() -> None:
    assert len(set(run_ranks(too_few_heads, 3))) == 1


def one_rank_leaves() -> None:
    """A rank that dies under the others' transfer: they fail, they do not wait forever."""
    group = torch.distributed.new_group()
    q = torch.randn(1, 4, 2, 8)
    ds_lvx.lv_xattn(q, q, q, group=group)
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    ds_lvx.lv_xattn(q, q, q, group=group)


def test_a_dead_rank_is_an_error_for_the_others() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(one_rank_leaves, 2)
    assert "RuntimeError" in str(caught.value)
