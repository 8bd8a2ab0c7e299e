"""Who computes attention in the kernel benchmark: our kernels, PyTorch's backends, flash-attn.

Ours take a `Visibility`; the others take a dense mask, where they take any, and know the causal one
by name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ds_lvx.kernels import flash_version
from ds_lvx.kernels.auto import AutoKernel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Problem, Upstream
from ds_lvx.kernels.rule import Structure

SCORES_BYTES = 8 * 2**30
"""A candidate that would materialise more scores than this, in fp32, is left out."""

IN_PLACE = {f"flash-{name.lower()}": name for name in flash_version.VERSIONS}
"""Our ``flash`` on another FlashAttention than PyTorch's own."""
OURS = ("auto", "flash", "cudnn", "triton", "triton_atomic", "native", *IN_PLACE)
SAME = {("triton_atomic", "forward")}
"""Who has another's code there, and is not timed again."""
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PACKAGES = {
    "flash-attn-4": "flash_attn.cute.interface",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-2": "flash_attn.flash_attn_interface",
}
Tensors: TypeAlias = tuple[Tensor, ...]


class LeftOut(Exception):  # noqa: N818 - no fault: a decision that the record tells
    """This candidate is not tried on this case; says why."""


@dataclass(frozen=True)
class Candidate:
    """One implementation on one case."""

    forward: Callable[[], Tensors]  # gives ``out [1, S, H, D]``, and lse where it is told
    # Gives dq, dk, dv like q, k, v; the first call may do a forward before.
    backward: Callable[[], Tensors]
    notes: dict[str, Any] = field(default_factory=dict)  # what is not part of its time
    # What `backward` returned, with dk and dv of the key/value heads.
    by_key_head: Callable[[Tensors], Tensors] = lambda gradients: gradients
    active: Callable[[], AbstractContextManager[Any]] = nullcontext  # a context around all calls
    chosen: Callable[[str], str] | None = None  # by direction, the kernel that really computed


def names() -> list[str]:
    """All candidates of this machine."""
    modules = PACKAGES | {
        name: flash_version.VERSIONS[version].module
        for name, version in IN_PLACE.items()
        if flash_version.obstacle(version) is None
    }
    every = (*OURS, *PACKAGES, *BACKENDS)
    absent = {*IN_PLACE, *PACKAGES} - {name for name, m in modules.items() if _is_installed(m)}
    return [name for name in every if name not in absent]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


def make(name: str, problem: Problem, upstream: Upstream) -> Candidate:
    """A candidate, one of `names`, on a case; PyTorch's and flash-attn's take dout of ``upstream``.

    Raises:
        LeftOut: it is not to be tried; why.
        Exception: whatever the implementation says that it cannot do.
    """
    if name in IN_PLACE:
        active = partial(flash_version.used, IN_PLACE[name])
        return replace(_ours("flash", problem, upstream), active=active)
    if name in OURS:
        return _ours(name, problem, upstream)
    return (_flash_attn if name in PACKAGES else _sdpa)(name, problem, upstream.dout)


def _ours(name: str, problem: Problem, upstream: Upstream) -> Candidate:
    """One of our kernels. Its backward is given lse and delta, as on a rank."""
    kernel = kernel_for(name, problem.q)
    if isinstance(kernel, AutoKernel):
        kernel = kernel.settled()

    def chosen(direction: str) -> str:
        if not isinstance(kernel, AutoKernel):
            return kernel.name
        return kernel.choice(problem, None if direction == "forward" else upstream)

    return Candidate(
        partial(kernel.forward, problem),
        partial(kernel.backward, problem, upstream),
        {"mask": "none" if problem.rule is None else "Visibility", "kv": "in place"},
        chosen=chosen,
    )


def _by_autograd(
    attend: Callable[..., Tensor], operands: Tensors, dout: Tensor, **more: Any
) -> Candidate:
    """A function of q, k and v whose backward is autograd's; forward keeps what it needs."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in operands)
    made: list[Tensor] = []

    def backward() -> Tensors:
        if not made:
            made.append(attend(*leaves))
        return torch.autograd.grad(made[0], leaves, dout, retain_graph=True)

    return Candidate(lambda: (attend(*leaves),), backward, **more)


def _flash_attn(name: str, problem: Problem, dout: Tensor) -> Candidate:
    """The flash-attn package, where it is installed."""
    causal = _is_causal(problem)
    if problem.rule is not None and not causal:
        raise LeftOut("flash_attn_func takes no mask")
    function = import_module(PACKAGES[name]).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(q, k, v, softmax_scale=problem.softmax_scale, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    notes = {"mask": "causal" if causal else "none", "kv": "in place"}
    return _by_autograd(attend, (problem.q, problem.k, problem.v), dout, notes=notes)


def _sdpa(name: str, problem: Problem, dout: Tensor) -> Candidate:
    """``scaled_dot_product_attention`` on one of its backends.

    q, k, v stay in ``[1, S, H, D]``, as models make them; PyTorch's layout is a view of it. Where
    the backend has no grouped heads, K and V are repeated beforehand; neither that nor the sum of
    their gradients is timed.
    """
    (batch, queries, heads, _), operands = problem.q.shape, (problem.q, problem.k, problem.v)
    scores_bytes = 4 * batch * heads * queries * problem.k.shape[1]
    if name == "sdpa-math" and scores_bytes > SCORES_BYTES:
        needed, budget = (f"{nbytes / 2**30:.0f} GiB" for nbytes in (scores_bytes, SCORES_BYTES))
        raise LeftOut(f"would materialise {needed} of scores; the budget is {budget}")
    group = heads // problem.k.shape[2]
    causal, mask = _is_causal(problem), None
    if problem.rule is not None and not causal:
        mask = problem.rule.visibility.mask()[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=problem.softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)

    def summed(gradients: Tensors) -> Tensors:
        dq, *others = gradients
        return dq, *(t.unflatten(2, (-1, group)).float().sum(3) for t in others)

    active = partial(sdpa_kernel, BACKENDS[name])
    notes = {
        "mask": "causal" if causal else "none" if mask is None else "dense bool",
        "mask_bytes": 0 if mask is None else mask.numel(),
        "kv": "in place",
    }
    if group == 1 or _groups_heads(attend, operands, active):
        return _by_autograd(attend, operands, dout, notes=notes, active=active)
    notes["kv"] = "repeated beforehand, which is not timed"
    repeated = problem.q, *(t.repeat_interleave(group, dim=2) for t in operands[1:])
    more: dict[str, Any] = {"notes": notes, "active": active, "by_key_head": summed}
    return _by_autograd(attend, repeated, dout, **more)


def _is_causal(problem: Problem) -> bool:
    """Whether the rule is the one that all implementations know by name."""
    return problem.rule is not None and problem.rule.structure == Structure.CAUSAL


def _groups_heads(
    attend: Callable[..., Tensor],
    operands: Tensors,
    active: Callable[[], AbstractContextManager[Any]],
) -> bool:
    """Whether the backend takes fewer heads of K and V, by trying."""
    try:
        with active(), catch_warnings():
            simplefilter("ignore")
            attend(*(tensor.detach().requires_grad_() for tensor in operands))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True
