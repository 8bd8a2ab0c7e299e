"""Whether a kernel is right, against float64 on some rows and keys, and its seconds.

The whole in float64 would take longer than the kernel. So some queries are computed over all
keys, and some keys' gradients over all queries; which ones is drawn at random, the first and last
among them. Every other element must be finite, and out must agree with PyTorch's own everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from ds_lvx.attention.common import delta_of
from ds_lvx.compare.operators.exactness import largest
from ds_lvx.compare.operators.tensors import Shards
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.reference import ReferenceKernel
from ds_lvx.kernels.rule import Rule

TOLERANCE = 4e-2
"""Largest error in bf16, as a share of the largest value."""
EVERY_ROW = "out, all rows, against PyTorch's"
LEAST_SAMPLES = 5

_ROWS, _KEYS = 32, 64


@dataclass(frozen=True)
class Exact:
    """Tensors and what is right for them."""

    problem: Problem  # what the kernels get
    upstream: Upstream  # likewise; lse and delta are PyTorch's
    rows: Tensor  # the queries that are checked
    keys: Tensor  # the keys whose gradients are checked
    # In float64 ``out [1, rows, H, D]`` and ``lse [1, rows, H]``, ``dq`` of the rows, and ``dk``
    # and ``dv [1, keys, K, D]``.
    right: Mapping[str, Tensor]
    out: Tensor  # PyTorch's, of all queries

    def errors(self, direction: str, found: Sequence[Tensor]) -> dict[str, float]:
        """Largest error of each result of all queries and keys; infinite where one is not finite.

        ``"forward"`` has out and, where it is told, lse; ``"backward"`` dq, dk and dv.
        """
        if direction == "forward":
            results = {"out": found[0]}
            if len(found) > 1:
                results["lse"] = found[1].transpose(1, 2)
            errors = {EVERY_ROW: largest(found[0], self.out)[0]}
        else:
            results, errors = dict(zip(("dq", "dk", "dv"), found, strict=True)), {}
        for name, whole in results.items():
            place = self.keys if name in ("dk", "dv") else self.rows
            finite = name == "lse" or bool(whole.isfinite().all())
            errors[name] = largest(whole[:, place], self.right[name])[0] if finite else torch.inf
        return errors


def exact(drawn: Shards) -> Exact:
    """What a kernel gets of such tensors, and what is right for them.

    Raises:
        ArithmeticError: PyTorch's own out, on which lse and delta rest, is wrong.
    """
    q, k, v = (tensor.detach() for tensor in (drawn.q, *drawn.k_and_v()))
    rule = None
    if (sees := drawn.visibility) is not None:  # known on the CPU, as a model has it
        rule = Rule(sees, sees.each(torch.Tensor.cpu))
    problem = Problem(q, k, v, rule, softmax_scale=q.shape[3] ** -0.5)
    out, lse = NativeKernel().forward(problem)
    upstream = Upstream(drawn.dout, lse, delta_of(out, drawn.dout, None, lse))
    rows, keys = _some(q.shape[1], _ROWS, q.device), _some(k.shape[1], _KEYS, q.device)
    right = _in_float64(problem, upstream, rows, keys)
    checked = Exact(problem, upstream, rows, keys, right, out)
    errors = checked.errors("forward", (out, lse))
    if not is_right(errors):
        raise ArithmeticError(f"PyTorch's own out or lse is wrong: {errors}")
    return checked


def is_right(errors: Mapping[str, float]) -> bool:
    """Whether all errors are within the tolerance; NaN is not."""
    return all(error <= TOLERANCE for error in errors.values())


def _in_float64(
    problem: Problem, upstream: Upstream, rows: Tensor, keys: Tensor
) -> dict[str, Tensor]:
    kernel, every = ReferenceKernel(), slice(None)
    part, dout = _part(problem, rows, every), upstream.dout.double()
    out, lse = kernel.forward(part)
    of_rows = Upstream(dout[:, rows], lse, delta_of(out, dout[:, rows], None, lse))
    dq, _, _ = kernel.backward(part, of_rows)
    _, dk, dv = kernel.backward(_part(problem, every, keys), replace(upstream, dout=dout))
    return {"out": out, "lse": lse.transpose(1, 2), "dq": dq, "dk": dk, "dv": dv}


def _part(whole: Problem, rows: Any, keys: Any) -> Problem:
    """The problem of some queries over some keys, in float64."""
    rule = None if whole.rule is None else Rule(whole.rule.visibility.part(rows, keys))
    k, v = (t[:, keys].double() for t in (whole.k, whole.v))
    return replace(whole, q=whole.q[:, rows].double(), k=k, v=v, rule=rule)


def _some(length: int, count: int, device: torch.device) -> Tensor:
    """Numbers below ``length`` in order: the first, the last and others, ``count`` at most."""
    generator = torch.Generator().manual_seed(length)
    inner = torch.randperm(max(length - 2, 0), generator=generator)[: max(count - 2, 0)] + 1
    return torch.cat((inner, torch.tensor([0, length - 1]))).unique().to(device)


# ---- seconds, by the timers of Triton and of PyTorch


def samples_s(
    run: Callable[[], Any], device: torch.device, *, repeats: int, seconds: float
) -> list[float]:
    """Seconds of a function that has run before: at most ``repeats`` samples.

    All together they should take ``seconds``; but five are taken, or ``repeats``.
    """
    measured = _on_cuda if device.type == "cuda" else _on_cpu
    once = max(_once_on_cuda(run) if device.type == "cuda" else _on_cpu(run, 0.0)[0], 1e-9)
    least = min(LEAST_SAMPLES, repeats)
    taken: list[float] = []
    while len(taken) < least:
        taken += measured(run, max(min(seconds, repeats * once), least * once))
    return taken[:repeats]


def _once_on_cuda(run: Callable[[], Any]) -> float:
    """One run by events: enough to know how many more to take."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_cuda(run: Callable[[], Any], seconds: float) -> list[float]:
    from triton.testing import do_bench  # Triton is not everywhere

    return [ms / 1e3 for ms in do_bench(run, warmup=0, rep=1e3 * seconds, return_mode="all")]


def _on_cpu(run: Callable[[], Any], seconds: float) -> list[float]:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    taken: list[float] = timer.blocked_autorange(min_run_time=seconds).times
    return taken
