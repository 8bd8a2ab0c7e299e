"""Whether a candidate of the kernel benchmark is right: against float64, on some rows and keys.

The whole in float64 would take longer than the benchmark. So some queries are computed over all
keys, and some keys' gradients over all queries; which ones is drawn at random, the first and last
among them. Every other element must be finite, and out must agree with PyTorch's own everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx.compare.kernels.candidates import Operands
from ds_lvx.compare.kernels.cases import KernelCase
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.reference import ReferenceKernel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-3}
"""Largest error, as a share of the largest exact value."""

_ROWS, _KEYS = 32, 64


@dataclass(frozen=True)
class Exact:
    """A case's operands and what is right for them.

    Attributes:
        operands: for the candidates.
        rows: the queries that are checked.
        keys: the keys whose gradients are checked.
        forward: out ``[1, rows, H, D]`` and lse ``[1, H, rows]``, float64.
        backward: dq of the rows; dk and dv ``[1, keys, K, D]``, float64.
        out: PyTorch's, of all queries.
    """

    operands: Operands
    rows: Tensor
    keys: Tensor
    forward: tuple[Tensor, Tensor]
    backward: tuple[Tensor, Tensor, Tensor]
    out: Tensor

    def errors_of_forward(self, found: Sequence[Tensor]) -> dict[str, float]:
        """Largest errors of out and, where it is told, lse; see `TOLERANCE`."""
        errors = {
            "out": _error(found[0][:, self.rows], self.forward[0]),
            "out, all rows, against PyTorch's": _error(found[0], self.out),
        }
        if len(found) > 1:
            errors["lse"] = _error(found[1][:, :, self.rows], self.forward[1])
        return errors

    def errors_of_backward(self, found: Sequence[Tensor]) -> dict[str, float]:
        """Largest errors of dq, dk, dv; infinite where one of them is not finite somewhere."""
        places = (self.rows, self.keys, self.keys)
        return {
            name: _error(whole[:, place], exact) if whole.isfinite().all() else float("inf")
            for name, whole, place, exact in zip(
                ("dq", "dk", "dv"), found, places, self.backward, strict=True
            )
        }


def exact(case: KernelCase, device: torch.device, dtype: torch.dtype) -> Exact:
    """A case's operands and what is right for them.

    Raises:
        ArithmeticError: PyTorch's own out, on which lse and delta rest, is wrong.
    """
    q, k, v, dout = case.tensors(device, dtype)
    rule = case.rule(device)
    seen = None if rule is None else Rule(rule)
    out, lse = NativeKernel().forward(Problem(q, k, v, seen, softmax_scale=case.scale))
    delta = _delta(dout.float(), out.float())
    operands = Operands(q, k, v, dout, rule, case.scale, lse, delta)
    rows, keys = _some(case.queries, _ROWS, device), _some(case.keys, _KEYS, device)
    forward, dq = _of_rows(operands, rows)
    checked = Exact(operands, rows, keys, forward, (dq, *_of_keys(operands, keys)), out)
    errors = checked.errors_of_forward((out, lse))
    if not right(errors, dtype):
        raise ArithmeticError(f"PyTorch's own out or lse is wrong: {errors}")
    return checked


def right(errors: Mapping[str, float], dtype: torch.dtype) -> bool:
    """Whether all errors are within the tolerance; NaN is not."""
    return all(error <= TOLERANCE[dtype] for error in errors.values())


def _of_rows(o: Operands, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """out, lse and dq of some queries over all keys, in float64."""
    q, k, v, dout = (t.double() for t in (o.q[:, rows], o.k, o.v, o.dout[:, rows]))
    sees = o.visibility
    rule = None
    if sees is not None:
        rule = Rule(Visibility(sees.q_start[:, rows], sees.q_end[:, rows], sees.kv_pos))
    problem = Problem(q, k, v, rule, softmax_scale=o.scale)
    kernel = ReferenceKernel()
    out, lse = kernel.forward(problem)
    gradients = kernel.backward(problem, Upstream(dout, lse, _delta(dout, out)))
    return (out, lse), gradients[0]


def _of_keys(o: Operands, keys: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv of some keys from all queries, in float64, under PyTorch's lse and delta."""
    q, k, v, dout = (t.double() for t in (o.q, o.k[:, keys], o.v[:, keys], o.dout))
    sees = o.visibility
    rule = None
    if sees is not None:
        rule = Rule(Visibility(sees.q_start, sees.q_end, sees.kv_pos[:, keys]))
    problem = Problem(q, k, v, rule, softmax_scale=o.scale)
    _, dk, dv = ReferenceKernel().backward(problem, Upstream(dout, o.lse, o.delta))
    return dk, dv


def _delta(dout: Tensor, out: Tensor) -> Tensor:
    return (dout * out).sum(dim=-1).transpose(1, 2)


def _some(length: int, count: int, device: torch.device) -> Tensor:
    """Numbers below ``length`` in order: the first, the last and others, ``count`` at most."""
    generator = torch.Generator().manual_seed(length)
    inner = torch.randperm(max(length - 2, 0), generator=generator)[: max(count - 2, 0)] + 1
    ends = torch.tensor([0, length - 1])
    return torch.cat((inner, ends)).unique().to(device)


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest expected value; rows of -inf must agree."""
    expected, found = expected.double(), found.double()
    empty = expected == -torch.inf
    if not torch.equal(found == -torch.inf, empty):
        return float("inf")
    gap = (found - expected).masked_fill(empty, 0.0).abs().amax()
    return float(gap / expected.masked_fill(empty, 0.0).abs().amax().clamp_min(1e-30))
