"""Every method against the float64 oracle: out, lse and all gradients, on real ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ds_lvx
from ds_lvx.attention.common import delta_of
from ds_lvx.attention.shape import goes_at_once
from ds_lvx.config.registry import SHARDED, schedule_words
from ds_lvx.kernels import interface as kernels
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.flash_kernel import FlashKernel
from ds_lvx.kernels.native import NativeKernel
from tests.attention.cases import Problem, assemble, largest_error, run_problems
from tests.ranks import run_ranks

SHARDS = {
    1: [((5,), (40,))],
    2: [((6, 6), (30, 30)), ((7, 2), (11, 43)), ((5, 0), (0, 33))],
    3: [((4, 4, 4), (20, 20, 20)), ((1, 0, 9), (17, 0, 30)), ((3, 5, 2), (0, 0, 41))],
    4: [((3, 3, 3, 3), (12, 12, 12, 12)), ((6, 1, 0, 4), (0, 25, 9, 14))],
}
METHODS = [f"{method}-{each}" for method in ("lvx", "recompute") for each in SHARDED]
METHODS += ["ring", "ulysses"]
HEADS = [(4, 2), (4, 4), (4, 1), (6, 2)]
LIMIT = 1e-5
LIMITS = {"cpu": LIMIT, "cuda": 1e-4}  # TF32 would err by 1e-3
ON_GPUS = pytest.param(2, "cuda", marks=pytest.mark.gpus(2))


def _case(problem: Problem, method: str) -> tuple[Problem, str]:
    name, _, schedule = method.partition("-")
    extra = {"schedule": schedule} if schedule else {}
    return replace(problem, extra=extra), name


def _grid(ranks: int) -> list[tuple[Problem, str]]:
    cases = []
    for index, (q_lengths, kv_lengths) in enumerate(SHARDS[ranks]):
        rules = ("none", "frames", "causal", "branches")
        for number, visibility in enumerate(rules[: 4 if index == 1 else 3]):
            heads, kv_heads = HEADS[(index + number) % len(HEADS)]
            problem = Problem(
                q_lengths,
                kv_lengths,
                heads=heads,
                kv_heads=kv_heads,
                visibility=visibility,
                seed=index,
            )
            cases += [_case(problem, method) for method in METHODS]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "device"),
    [
        (1, "cpu"),
        pytest.param(2, "cpu", marks=pytest.mark.exhaustive),
        (3, "cpu"),
        pytest.param(4, "cpu", marks=pytest.mark.exhaustive),
        ON_GPUS,
    ],
)
def test_every_method_matches_the_oracle_in_fp32(ranks: int, device: str) -> None:
    cases = [(replace(problem, device=device), method) for problem, method in _grid(ranks)]
    answers = run_ranks(run_problems, ranks, cases, device=device)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < LIMITS[device], (method, problem, errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "visibility", ["frames", pytest.param("none", marks=pytest.mark.exhaustive)]
)
def test_heads_in_groups_match_the_oracle(visibility: str) -> None:
    """Queries so large that they, or parts of the result, go by groups of heads: by messages."""
    cases = []
    rule = visibility != "none"  # gathered once
    for (heads, kv_heads), groups in (((4, 2), 2), ((3, 3), 3), ((16, 8), 3), ((4, 1), 1)):
        for q_lengths in ((100, 100, 100), (260, 0, 40)):
            problem = Problem(
                q_lengths,
                (70, 0, 41),
                heads=heads,
                kv_heads=kv_heads,
                head_dim=32,
                visibility=visibility,
                lse_weight=0.3,
                extra={"schedule": "gather"},
            )
            cases.append((problem, "lvx", (2 * groups + rule, 2 * groups)))
    # One message of q, k and v, and out by two groups of the three heads of K that a rank has then.
    problem = Problem((100, 130, 9), (70, 0, 41), heads=16, kv_heads=8, visibility=visibility)
    problem = replace(problem, head_dim=32)
    both = problem, replace(problem, kv_lengths=problem.q_lengths)
    cases += [(each, "ulysses", (3 + 2 * rule, 3)) for each in both]
    answers = run_ranks(run_problems, 3, [case[:2] for case in cases])
    for index, (problem, _, messages) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < LIMIT, (problem, errors)
        for answer in answers:
            calls = answer[index]["forward"].calls, answer[index]["backward"].calls
            assert calls == messages, problem


def run_nothing() -> list[str]:
    """Calls without a sample, or without a query: which answers are not of q's shape."""
    wrong = []
    rule = ds_lvx.Visibility.all
    calls = {
        f"{name} {schedule}": (getattr(ds_lvx, name), {"schedule": schedule} if schedule else {})
        for name in ("lv_xattn", "ring_attention", "ulysses_attention", "hybrid_attention")
        for schedule in (schedule_words() if name == "lv_xattn" else ("",))
    }
    calls["hybrid_attention "][1]["ulysses"] = 2
    for batch, queries in ((0, 3), (2, 0), (0, 0)):
        for name, (operator, arguments) in calls.items():
            for visibility in (None, rule(batch, queries, 5, device=torch.device("cpu"))):
                q = torch.randn(batch, queries, 4, 8, requires_grad=True)
                k = torch.randn(batch, 5, 2, 8, requires_grad=True)
                out = operator(q, k, k, visibility=visibility, **arguments)
                out.sum().backward()
                good = out.shape == q.shape and q.grad is not None and not k.grad.any()
                wrong += [] if good else [f"{name}, batch {batch}, {queries} queries"]
    return wrong


def test_a_batch_without_samples_or_queries() -> None:
    assert run_ranks(run_nothing, 2) == [[], []]


@pytest.mark.parametrize("ranks", [2, 3])
def test_lse_is_a_differentiable_output(ranks: int) -> None:
    """Both outputs get a gradient, or all zeros; with dout = 0 no out can stand in for delta."""
    methods = [method for method in METHODS if method != "ulysses"]
    q_lengths, kv_lengths = SHARDS[ranks][1]
    cases = []
    for of_out, of_lse in ((1.0, 0.7), (1.0, 0.0), (0.0, 0.7)):
        weights = {"out_weight": of_out, "lse_weight": of_lse}
        problem = Problem(q_lengths, kv_lengths, visibility="frames", **weights)
        cases += [_case(problem, method) for method in methods]
    answers = run_ranks(run_problems, ranks, cases)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        assert max(errors.values()) < LIMIT, (method, problem, errors)


def test_the_reference_kernel_and_fp64_are_exact() -> None:
    cases = []
    for dtype, kernel in ((torch.float64, "native"), (torch.float32, "reference")):
        for method in ("lvx-ring", "lvx-gather", "ring"):
            problem = Problem((5, 3), (20, 9), dtype=dtype, visibility="frames")
            problem, name = _case(problem, method)
            cases.append((replace(problem, extra={**problem.extra, "kernel": kernel}), name))
    answers = run_ranks(run_problems, 2, cases)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), problem.oracle())
        limit = 1e-12 if problem.dtype == torch.float64 else 1e-6
        assert max(errors.values()) < limit, (method, problem.dtype, errors)


def run_into_dense(heads_first: bool) -> tuple[torch.Tensor, bool]:
    """A ring of blocks, of q as its heads lie; whether what is folded into was dense each time."""
    rank = torch.distributed.get_rank()
    shard = Problem((5, 3), (20, 9), visibility="frames").shard(rank)
    q = shard["q"].detach()
    q = q.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else q
    dense: list[bool] = []
    whole, first = NativeKernel.fold, NativeKernel.forward

    def forward(kernel: NativeKernel, problem: kernels.Problem) -> tuple[torch.Tensor, ...]:
        out, lse = first(kernel, problem)
        # As cuDNN has it: out lies as q does.
        return torch.empty_like(problem.q).copy_(out), lse

    def fold(kernel: NativeKernel, problem: kernels.Problem, running: Any) -> None:
        dense.extend(each.is_contiguous() for each in running)
        whole(kernel, problem, running)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeKernel, "forward", forward)
        patch.setattr(NativeKernel, "fold", fold)
        out = ds_lvx.ring_attention(
            q, shard["k"], shard["v"], visibility=shard["visibility"], kernel="native"
        )
    return out.detach(), bool(dense) and all(dense)


def test_kernels_fold_into_dense_results() -> None:
    """One kernel may begin and another go on: Triton's counts on it (`Kernel.fold`)."""
    for heads_first in (False, True):
        answers = run_ranks(run_into_dense, 2, heads_first)
        assert all(dense for _, dense in answers)
        exact = Problem((5, 3), (20, 9), visibility="frames").oracle()["out"]
        found = torch.cat([out for out, _ in answers], dim=1).double()
        torch.testing.assert_close(found, exact, atol=LIMIT, rtol=LIMIT)


def run_on_flash(cases: list[tuple[Problem, str]]) -> tuple[list[dict[str, torch.Tensor]], bool]:
    """`run_problems`, and whether the flash kernel served all that it was asked."""
    served: list[bool] = []
    asked = FlashKernel.serves

    def forward(kernel: FlashKernel, problem: kernels.Problem) -> tuple[torch.Tensor, torch.Tensor]:
        served.append(asked(kernel, problem))
        return whole(kernel, problem)

    whole = FlashKernel.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlashKernel, "forward", forward)
        return run_problems(cases), bool(served) and all(served)


@pytest.mark.slow
def test_flash_by_slices_is_exact_under_every_method() -> None:
    """Causal text and frames over uneven and empty shards, in float64."""
    cases = []
    for q_lengths, kv_lengths in SHARDS[3][1:]:
        for visibility, kv in (("frames", kv_lengths), ("causal", q_lengths)):
            problem = Problem(
                q_lengths,
                kv,
                dtype=torch.float64,
                visibility=visibility,
            )
            for method in METHODS:
                one, name = _case(problem, method)
                cases.append((replace(one, extra={**one.extra, "kernel": "flash"}), name))
    answers = run_ranks(run_on_flash, 3, cases)
    assert all(served for _, served in answers)
    for index, (problem, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a, _ in answers]), problem.oracle())
        assert max(errors.values()) < 1e-12, (method, problem, errors)


@pytest.mark.parametrize(
    ("ranks", "dtype", "device"),
    [
        (2, torch.float16, "cpu"),
        pytest.param(4, torch.bfloat16, "cpu", marks=pytest.mark.slow),
        pytest.param(2, torch.bfloat16, "cuda", marks=pytest.mark.gpus(2)),
    ],
)
def test_16_bits_err_at_most_twice_as_much_as_pytorch(
    ranks: int, dtype: torch.dtype, device: str
) -> None:
    """PyTorch's own attention over the whole sequence, same dtype and device, is the measure."""
    problem = Problem(
        (80,) * ranks, (256,) * ranks, batch=1, heads=4, kv_heads=2, head_dim=64, dtype=dtype
    )
    problem = replace(problem, device=device)
    cases = [_case(problem, method) for method in METHODS]
    exact, allowed = problem.oracle(), _error_of_pytorch(problem)
    answers = run_ranks(run_problems, ranks, cases, device=device)
    for index, (_, method) in enumerate(cases):
        errors = largest_error(assemble([a[index] for a in answers]), exact)
        for name, limit in allowed.items():
            assert errors[name] <= 2 * limit, (method, name, errors[name], limit)


def run_beside_the_kernel(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's out and dq, and those of one kernel over its own keys, both in q's dtype."""
    shard = problem.shard(torch.distributed.get_rank())
    q, k, v = (shard[name] for name in "qkv")
    out = ds_lvx.lv_xattn(q, k, v, schedule="gather")
    out.backward(shard["dout"])
    kernel = kernel_for("native", q)
    with torch.no_grad():
        asked = kernels.Problem(q, k, v, softmax_scale=problem.head_dim**-0.5, partial=True)
        own, lse = kernel.forward(asked)
        delta = delta_of(own.to(q.dtype), shard["dout"], None, lse)
        own_dq, *_ = kernel.backward(asked, kernels.Upstream(shard["dout"], lse, delta))
    return (out - own.to(q.dtype)).abs().max(), (q.grad - own_dq.to(q.dtype)).abs().max()


def test_a_ranks_own_part_is_not_rounded_on_the_way() -> None:
    """All keys are rank 0's: its own result is that of the kernel, to the bit."""
    problem = Problem((40, 40), (64, 0), dtype=torch.bfloat16, head_dim=64)
    same, _ = run_ranks(run_beside_the_kernel, 2, problem)
    assert [difference.item() for difference in same] == [0.0, 0.0]


def _error_of_pytorch(problem: Problem) -> dict[str, float]:
    tensors = {name: tensor.to(problem.device) for name, tensor in problem.tensors().items()}
    leaves = [tensors[name].transpose(1, 2).clone().requires_grad_() for name in "qkv"]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True)
    out.backward(tensors["dout"].transpose(1, 2))
    result = {"out": out.detach().transpose(1, 2).cpu()}
    for name, leaf in zip("qkv", leaves, strict=True):
        assert leaf.grad is not None
        result[f"d{name}"] = leaf.grad.transpose(1, 2).cpu()
    return largest_error(result, problem.oracle())


def run_replicated(problem: Problem) -> dict[str, torch.Tensor]:
    """Every rank holds all queries and the same loss; keys are sharded."""
    rank = torch.distributed.get_rank()
    shard, whole = problem.shard(rank), problem.tensors()
    q = whole["q"].clone().requires_grad_()
    rule = problem.whole_visibility()
    visibility = None
    if rule is not None:
        visibility = ds_lvx.Visibility(rule.q_start, rule.q_end, shard["visibility"].kv_pos)
    out, lse = ds_lvx.lv_xattn(
        q, shard["k"], shard["v"], visibility=visibility, schedule="replicated", return_lse=True
    )
    problem.loss(out, lse, whole["dout"], whole["dlse"]).backward()
    return {"out": out, "lse": lse, "dq": q.grad, "dk": shard["k"].grad, "dv": shard["v"].grad}


@pytest.mark.parametrize(
    ("queries", "visibility"),
    # Parts of so few queries are gathered, those of so many are summed.
    [(7, "none"), (7, "frames"), (2400, "frames")],
)
def test_replicated_queries_get_the_whole_result_on_every_rank(
    queries: int, visibility: str
) -> None:
    problem = Problem((queries, 0, 0), (13, 0, 30), visibility=visibility, lse_weight=0.5)
    out_bytes = queries * problem.batch * problem.heads * problem.head_dim * 4
    assert goes_at_once(out_bytes, 3) == (queries == 7)
    answers = run_ranks(run_replicated, 3, problem)
    exact = problem.oracle()
    for answer in answers:
        whole = {name: answer[name].detach() for name in ("out", "lse", "dq")}
        errors = largest_error(whole, exact)
        assert max(errors.values()) < LIMIT, errors
    for name in ("dk", "dv"):
        together = torch.cat([answer[name] for answer in answers], dim=1)
        assert largest_error({name: together}, exact)[name] < LIMIT
