"""The ``auto`` kernel: by a tuned table where it has the kind of problem, else by rule.

The rule: where all see all, or a few large slices make up who sees what, cuDNN's attention from
Hopper on, for shapes that come often (`ds_lvx.kernels.repeats`), and FlashAttention before it. Else
Triton's kernel, which takes any rule in one launch, in backward from Hopper on with five products;
else ``native``. Where PyTorch is to be deterministic (`torch.use_deterministic_algorithms`),
nothing is taken whose sums have no order. Nothing is measured here; ``ds-lvx doctor --tune`` does
that, and writes the table (`ds_lvx.kernels.table`). docs/kernels.md has the measurements that the
rule comes from.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ds_lvx.kernels.device import HOPPER, capability
from ds_lvx.kernels.flash import CUDA_DTYPES, version_in_place
from ds_lvx.kernels.interface import Kernel, Problem, Upstream
from ds_lvx.kernels.repeats import SAVED_S, Repeats
from ds_lvx.kernels.rule import Structure
from ds_lvx.kernels.table import Table, kind_of

BY_RULE = ("cudnn", "flash", "triton_atomic", "triton", "native")
"""The first that is there, serves a problem and suits it is taken; ``native`` serves all."""
_IN_NO_ORDER = ("cudnn", "triton_atomic")
"""Who adds up dq in any order. PyTorch's flash kernel sees to it itself."""
_LARGE_CALL_FLOPS = {"forward": 5e11, "backward": 5e10}
"""Of the products of a slice in forward. A call of many takes the host half a millisecond forward,
with the merge behind it, and Triton's kernel is nearly as fast as cuDNN's there; in backward it
takes 1.5 times as long."""


_SHORT, _MOST_MEASURED = 64, 128  # of head_dim
_MOST_ANSWERS = 256  # that are kept: a text that grows asks for another with each token


@dataclass(frozen=True)
class _Answer:
    """What a kind of call is computed by: the best kernel, or ``meanwhile`` another, until it pays
    (`ds_lvx.kernels.repeats`); the rest is what `Repeats.pay` is asked."""

    best: Kernel
    meanwhile: Kernel | None = None
    shapes: Hashable = None
    saved_s: float = 0.0
    count: int = 1


class AutoKernel(Kernel):
    """One of some kernels, call by call.

    Args:
        candidates: by name; ``native`` among them.
        table: what was measured.
        repeats: which shapes have come how often, for cuDNN.
    """

    name = "auto"

    def __init__(
        self, candidates: Mapping[str, Kernel], table: Table, repeats: Repeats | None = None
    ) -> None:
        self._candidates = dict(candidates)
        self._table = table
        self._repeats = Repeats() if repeats is None else repeats
        # By rule, and gone with it: a rule holds tensors of its batch. Without one, by the kernel.
        self._answers: WeakKeyDictionary[Any, dict[Hashable, _Answer]] = WeakKeyDictionary()

    def settled(self) -> AutoKernel:
        """The same for shapes that have come often."""
        return AutoKernel(self._candidates, self._table, Repeats(0.0))

    def choice(
        self, problem: Problem, upstream: Upstream | None = None, *, without: str = ""
    ) -> str:
        """The kernel that is the best for such problems: the table's, where it serves, or by rule.

        Args:
            problem: what is computed.
            upstream: in backward; None: forward.
            without: a kernel that is not to be taken.
        """
        entries = self._table.entries()
        tuned = entries.get(kind_of(problem, upstream)) if entries else None
        if tuned is not None and tuned["chosen"] != without:
            chosen: str = tuned["chosen"]
            if self._can(chosen, problem, upstream):
                return chosen
        for name in BY_RULE:
            asked = name != without and self._can(name, problem, upstream)
            if asked and self._suits(name, problem, upstream):
                break
        return name

    def _taken(self, problem: Problem, upstream: Upstream | None = None) -> Kernel:
        """The kernel of a call: the best, unless that is cuDNN's and the shape has come seldom.

        Layers ask the same of the same rule: the answer is found once.
        """
        q, has_dlse = problem.q, None if upstream is None else upstream.has_dlse
        answers = self._answers.setdefault(self if problem.rule is None else problem.rule, {})
        asked = (q.dtype, q.shape, problem.k.shape, has_dlse, _in_order())
        answer = answers.get(asked)
        if answer is None:
            if len(answers) == _MOST_ANSWERS:
                answers.clear()
            answer = answers[asked] = self._answer(problem, upstream)
        if answer.meanwhile is None:
            return answer.best
        pays = self._repeats.pay(answer.shapes, saved_s=answer.saved_s, count=answer.count)
        return answer.best if pays else answer.meanwhile

    def _answer(self, problem: Problem, upstream: Upstream | None) -> _Answer:
        name = self.choice(problem, upstream)
        best = self._candidates[name]
        if name != "cudnn":
            return _Answer(best)
        meanwhile = self._candidates[self.choice(problem, upstream, without=name)]
        cover, passes = problem.cover, "forward" if upstream is None else "backward"
        calls = () if cover is None else tuple((r.size, r.causal) for r in cover.rectangles)
        heads, head_dim = problem.q.shape[2:]
        scores = sum(math.prod(size) / (2 if causal else 1) for size, causal in calls)
        operations = (4.0 if upstream is None else 10.0) * heads * head_dim * scores
        shapes = (passes, problem.q.dtype, heads, problem.k.shape[2], head_dim, calls)
        return _Answer(best, meanwhile, shapes, SAVED_S[passes] * operations, len(calls))

    def _suits(self, name: str, problem: Problem, upstream: Upstream | None) -> bool:
        """Whether a kernel that serves a problem is the best there for it."""
        if name in _IN_NO_ORDER and upstream is not None and _in_order():
            return False
        if name == "triton_atomic":
            narrow = problem.q.dtype in CUDA_DTYPES
            return upstream is not None and narrow and capability(problem.q) >= HOPPER
        if name not in ("cudnn", "flash"):
            return True
        if not preferred(name, problem.q):
            return False
        if "triton" not in self._candidates:
            return True
        least = _LARGE_CALL_FLOPS["forward" if upstream is None else "backward"]
        if not _has_large_calls(name, problem, least):
            return False
        return name == "cudnn" or _suits_flash(problem, upstream)

    def _can(self, name: str, problem: Problem, upstream: Upstream | None) -> bool:
        kernel = self._candidates.get(name)
        return kernel is not None and kernel.serves(problem, upstream)

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.forward`."""
        return self._taken(problem).forward(problem)

    def fold(self, problem: Problem, running: tuple[Tensor, Tensor]) -> None:
        """See `ds_lvx.kernels.interface.Kernel.fold`; by the kernel of forward."""
        part = problem.as_part()
        self._taken(part).fold(part, running)

    def backward(
        self,
        problem: Problem,
        upstream: Upstream,
        *,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ds_lvx.kernels.interface.Kernel.backward`."""
        return self._taken(problem, upstream).backward(problem, upstream, into=into)


def _in_order() -> bool:
    """Whether every run is to give the same bits."""
    return torch.are_deterministic_algorithms_enabled()


def preferred(name: str, q: Tensor) -> bool:
    """Whether the rule knows a kernel that works by calls, on a GPU with queries like ``q``.

    Where FlashAttention 3 or 4 is in the place of PyTorch's own, cuDNN is no faster.
    """
    return name != "cudnn" or (capability(q) >= HOPPER and version_in_place() is None)


def _suits_flash(problem: Problem, upstream: Upstream | None) -> bool:
    """Whether ``flash`` is to be taken where Triton's kernels are: on an H200 PyTorch's own is the
    slower one forward, and the faster in backward of causal text and where a head is short."""
    if capability(problem.q) < HOPPER or version_in_place() is not None:
        return True
    head_dim = problem.q.shape[3]
    if head_dim > _MOST_MEASURED:
        return True
    causal = problem.rule is not None and problem.rule.structure == Structure.CAUSAL
    return upstream is not None and (causal or head_dim <= _SHORT)


def _has_large_calls(name: str, problem: Problem, least_flops: float) -> bool:
    """Whether one call of all queries and keys, or a few large ones, make up the rule."""
    cover = problem.cover
    if cover is None:
        return False
    if cover.is_one_call or not cover.rectangles:
        return True
    if name == "flash" and cover.sequences is not None:
        return capability(problem.q) < HOPPER  # from which on Triton's one launch is faster
    scores = sum(math.prod(each.size) for each in cover.rectangles) / len(cover.rectangles)
    heads, head_dim = problem.q.shape[2:]
    return 4.0 * head_dim * heads * scores >= least_flops
