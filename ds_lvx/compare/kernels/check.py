"""Whether a candidate of the kernel benchmark is right: against float64, on some rows and keys.

The whole in float64 would take longer than the benchmark. So some queries are computed over all
keys, and some keys' gradients over all queries; which ones is drawn at random, the first and last
among them. Every other element must be finite, and out must agree with PyTorch's own everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx.compare.kernels.candidates import Inputs
from ds_lvx.compare.kernels.cases import KernelCase
from ds_lvx.kernels.merge import empty_part
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.reference import ReferenceKernel
from ds_lvx.kernels.visibility import Visibility

TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-3}
"""Largest error, as a share of the largest exact value."""

_ROWS, _KEYS = 32, 64
_CHUNK = 8192
_DOUBLE = torch.float64


@dataclass(frozen=True)
class Exact:
    """A case's inputs and what is right for them.

    Attributes:
        inputs: for the candidates.
        rows: the queries that are checked.
        keys: the keys whose gradients are checked.
        forward: out ``[1, rows, H, D]`` and lse ``[1, H, rows]``, float64.
        backward: dq of the rows; dk and dv ``[1, keys, K, D]``, float64.
        out: PyTorch's, of all queries.
    """

    inputs: Inputs
    rows: Tensor
    keys: Tensor
    forward: tuple[Tensor, Tensor]
    backward: tuple[Tensor, Tensor, Tensor]
    out: Tensor

    def errors_of_forward(self, found: Sequence[Tensor]) -> dict[str, float]:
        """Largest errors of out and, where it is told, lse; see `TOLERANCE`."""
        out = found[0]
        errors = {
            "out": _error(out[:, self.rows], self.forward[0]),
            "out, all rows, against PyTorch's": _error(out, self.out),
        }
        if len(found) > 1:
            errors["lse"] = _error(found[1][:, :, self.rows], self.forward[1])
        return errors

    def errors_of_backward(self, found: Sequence[Tensor]) -> dict[str, float]:
        """Largest errors of dq, dk, dv; infinite where one of them is not finite somewhere."""
        places = (self.rows, self.keys, self.keys)
        names = ("dq", "dk", "dv")
        return {
            name: _error(all_of[:, place], exact) if _finite(all_of) else float("inf")
            for name, all_of, place, exact in zip(names, found, places, self.backward, strict=True)
        }


def exact(case: KernelCase, device: torch.device, dtype: torch.dtype) -> Exact:
    """A case's inputs and what is right for them.

    Raises:
        ArithmeticError: PyTorch's own out, on which lse and delta rest, is wrong.
    """
    q, k, v, dout = case.tensors(device, dtype)
    rule = case.rule(device)
    out, lse = NativeKernel().forward(q, k, v, visibility=rule, softmax_scale=case.scale)
    delta = (dout.float() * out.float()).sum(dim=-1).transpose(1, 2)
    inputs = Inputs(q, k, v, dout, rule, case.scale, lse, delta)
    rows, keys = _some(case.queries, _ROWS, device), _some(case.keys, _KEYS, device)
    part, dq = _of_rows(inputs, rows)
    gradients = (dq, *_of_keys(inputs, keys))
    checked = Exact(inputs, rows, keys, part, gradients, out)
    errors = checked.errors_of_forward((out, lse))
    if not right(errors, dtype):
        raise ArithmeticError(f"PyTorch's own out or lse is wrong: {errors}")
    return checked


def right(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether all errors are within the tolerance; NaN is not."""
    return all(error <= TOLERANCE[dtype] for error in errors.values())


def _of_rows(inputs: Inputs, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """out, lse and dq of some queries over all keys, in float64 and chunks of keys."""
    kernel, scale = ReferenceKernel(), inputs.scale
    q, dout = (t[:, rows].to(_DOUBLE) for t in (inputs.q, inputs.dout))
    out, lse = empty_part(q, _DOUBLE)
    chunks = [slice(at, at + _CHUNK) for at in range(0, inputs.k.shape[1], _CHUNK)]
    for chunk in chunks:
        k, v = (t[:, chunk].to(_DOUBLE) for t in (inputs.k, inputs.v))
        rule = _part(inputs.visibility, rows, chunk)
        kernel.fold(q, k, v, (out, lse), visibility=rule, softmax_scale=scale)
    delta = (dout * out).sum(dim=-1).transpose(1, 2)
    dq = torch.zeros_like(q)
    for chunk in chunks:
        k, v = (t[:, chunk].to(_DOUBLE) for t in (inputs.k, inputs.v))
        rule = _part(inputs.visibility, rows, chunk)
        dq += kernel.backward(
            q, k, v, dout, lse, delta, visibility=rule, softmax_scale=scale, has_dlse=False
        )[0]
    return (out, lse), dq


def _of_keys(inputs: Inputs, keys: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv of some keys from all queries, in float64, under PyTorch's lse and delta."""
    rule = inputs.visibility
    k, v = (t[:, keys].to(_DOUBLE) for t in (inputs.k, inputs.v))
    _, dk, dv = ReferenceKernel().backward(
        inputs.q.to(_DOUBLE),
        k,
        v,
        inputs.dout.to(_DOUBLE),
        inputs.lse,
        inputs.delta,
        visibility=None if rule is None else rule.with_keys(rule.kv_pos[:, keys]),
        softmax_scale=inputs.scale,
        has_dlse=False,
    )
    return dk, dv


def _part(rule: Visibility | None, rows: Tensor, keys: slice) -> Visibility | None:
    if rule is None:
        return None
    return Visibility(rule.q_start[:, rows], rule.q_end[:, rows], rule.kv_pos[:, keys])


def _some(length: int, count: int, device: torch.device) -> Tensor:
    """Numbers below ``length`` in order: the first, the last and others, ``count`` at most."""
    generator = torch.Generator().manual_seed(length)
    inner = torch.randperm(max(length - 2, 0), generator=generator)[: max(count - 2, 0)] + 1
    ends = torch.tensor([0, length - 1])
    return torch.cat((inner, ends)).unique().to(device)


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest expected value; rows of -inf must agree."""
    expected, found = expected.to(_DOUBLE), found.to(_DOUBLE)
    empty = expected == -torch.inf
    if not torch.equal(found == -torch.inf, empty):
        return float("inf")
    gap = (found - expected).masked_fill(empty, 0.0).abs().amax()
    return float(gap / expected.masked_fill(empty, 0.0).abs().amax().clamp_min(1e-30))


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
