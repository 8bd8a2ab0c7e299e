"""One rank of the self-check, in a process of its own: every method against float64."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.lvx import lv_xattn
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.attention.ring import ring_attention
from ds_lvx.attention.ulysses import ulysses_attention
from ds_lvx.config import registry
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.distributed.start import init_distributed
from ds_lvx.kernels.visibility import EVERYTHING, Visibility
from ds_lvx.models.cuts import span

METHODS = tuple(
    f"{name} {schedule}".strip()
    for name, entry in registry.METHODS.items()
    # Two ranks have no subgroups.
    if entry.distributed and not entry.subgroups
    for schedule in (registry.SCHEDULES if entry.has_schedules else ("",))
)
DTYPES = ("float32", "bfloat16")
RESULTS = ("out", "dq", "dk", "dv")

# The same sequence in one piece and in two unequal ones, by the number of ranks.
_LENGTHS = {1: ((33,), (192,)), 2: ((24, 9), (61, 131))}
_BATCH, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 4, 2, 64
_KEYS_OF_A_FRAME = 8


@dataclass(frozen=True)
class Case:
    """What is computed."""

    method: str  # one of `METHODS`
    kernel: str  # ``native``, ``flash``, ``triton``, ``reference`` or ``auto``
    dtype: str  # one of `DTYPES`
    rule: bool  # with a `Visibility`; else every query sees every key

    def __str__(self) -> str:
        keys = "some" if self.rule else "all"
        return f"{self.method}, kernel {self.kernel}, {self.dtype}, {keys} keys visible"

    @classmethod
    def all(cls, kernels: list[str]) -> Iterator[Case]:
        """Every case of some kernels."""
        for kernel, method, dtype, rule in product(kernels, METHODS, DTYPES, (False, True)):
            yield cls(method, kernel, dtype, rule)


def check(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case of a request.

    Args:
        request: ``device`` (cpu, cuda), ``kernels``, and ``timeout_s`` of the process group.

    Returns:
        A case each: ``errors``, the largest one of each of `RESULTS` on this rank relative to the
        largest value of the whole result, and ``problem``, what went wrong, or an empty string.
        On one rank that includes an exception; with more ranks an exception ends the process, so
        that no rank waits for another.
    """
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = torch.device(request["device"])
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if ranks > 1:
        init_distributed(timeout=timedelta(seconds=request["timeout_s"]), verbose=False)
    try:
        cases = Case.all(request["kernels"])
        return [_run(case, device, ranks=ranks, rank=rank) for case in cases]
    finally:
        if ranks > 1:
            shutdown()


def _run(case: Case, device: torch.device, *, ranks: int, rank: int) -> dict[str, Any]:
    # The end of the log says where a run has stopped.
    print(f"checking {case}", file=sys.stderr, flush=True)
    try:
        errors = _errors(case, device, ranks=ranks, rank=rank)
    # Whatever a kernel raises is what is looked for.
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if ranks > 1:
            traceback.print_exc()
            raise SystemExit(f"{case}: {problem}") from error  # the log's last line says it all
        return _record(case, {}, problem)
    strange = [name for name, error in errors.items() if error == torch.inf]
    finite = {name: error for name, error in errors.items() if error != torch.inf}
    return _record(case, finite, f"NaN or inf in {', '.join(strange)}" if strange else "")


def _record(case: Case, errors: dict[str, float], problem: str) -> dict[str, Any]:
    return {**vars(case), "errors": errors, "problem": problem}


def _errors(case: Case, device: torch.device, *, ranks: int, rank: int) -> dict[str, float]:
    q_lengths, kv_lengths = _LENGTHS[ranks]
    rows, keys = span(q_lengths, rank), span(kv_lengths, rank)
    if case.method == "lvx replicated":
        rows = slice(0, sum(q_lengths))
    tensors = _tensors(getattr(torch, case.dtype), sum(q_lengths), sum(kv_lengths))
    whole = _visibility(sum(q_lengths), sum(kv_lengths)) if case.rule else None
    exact = _exact(tensors, whole)
    parts = {"q": rows, "k": keys, "v": keys, "dout": rows}
    mine = {name: tensors[name][:, part].to(device) for name, part in parts.items()}
    q, k, v = (mine[name].requires_grad_() for name in "qkv")
    seen = None if whole is None else whole.part(rows, keys).contiguous().to(device)
    out = _attend(case.method)(q, k, v, visibility=seen, kernel=case.kernel)
    gradients = torch.autograd.grad(out, (q, k, v), mine["dout"])
    places = (rows, rows, keys, keys)
    return {
        name: _error(found, exact[name], place)
        for name, found, place in zip(RESULTS, (out.detach(), *gradients), places, strict=True)
    }


def _attend(method: str) -> Callable[..., Any]:
    if method.startswith("lvx "):
        return partial(lv_xattn, schedule=method.removeprefix("lvx "))
    return ring_attention if method == "ring" else ulysses_attention


def _tensors(dtype: torch.dtype, queries: int, keys: int) -> dict[str, Tensor]:
    """The whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, heads: int) -> Tensor:
        shape = (_BATCH, length, heads, _HEAD_DIM)
        return torch.randn(shape, generator=generator).to(dtype)

    q, k, v = draw(queries, _HEADS), draw(keys, _KV_HEADS), draw(keys, _KV_HEADS)
    return {"q": q, "k": k, "v": v, "dout": draw(queries, _HEADS)}


def _visibility(queries: int, keys: int) -> Visibility:
    """Frames in order, some rows that see all, some that see nothing, and keys of padding."""
    row, key = (torch.arange(n, dtype=torch.int32) for n in (queries, keys))
    frame = key // _KEYS_OF_A_FRAME
    frame[::7] = -1
    start, end = row // 3 - 1, row // 3 + 1
    start[3::5], end[3::5] = -1, EVERYTHING
    end[4::6] = start[4::6]
    start, end = (t.repeat(_BATCH, 1) for t in (start, end))
    return Visibility(start, end, torch.stack((frame, frame.flip(0))))


def _exact(tensors: dict[str, Tensor], whole: Visibility | None) -> dict[str, Tensor]:
    leaves = [tensors[name].double().requires_grad_() for name in "qkv"]
    out, _ = attention_oracle(*leaves, visibility=whole)
    gradients = torch.autograd.grad(out, leaves, tensors["dout"].double())
    return dict(zip(RESULTS, (out.detach(), *gradients), strict=True))


def _error(found: Tensor, exact: Tensor, place: slice) -> float:
    """The largest error of a shard, relative to the largest value of the whole."""
    gap = found.cpu().double() - exact[:, place]
    if not bool(gap.isfinite().all()):
        return torch.inf
    return float(gap.abs().amax() / exact.abs().amax())
