"""Sharded attention problems and the run of one on this rank, for the tests of all methods."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ds_lvx
from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle


@dataclass(frozen=True)
class Problem:
    """One attention over a whole sequence, and how it is cut over the ranks."""

    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    visibility: str = "none"
    out_weight: float = 1.0
    lse_weight: float = 0.0
    seed: int = 0
    scale: float | None = None
    device: str = "cpu"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.q_lengths)

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, and the weights of the loss: out's and lse's."""
        generator = torch.Generator().manual_seed(self.seed)
        queries, keys = sum(self.q_lengths), sum(self.kv_lengths)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        return {
            "q": draw(self.batch, queries, self.heads, self.head_dim),
            "k": draw(self.batch, keys, self.kv_heads, self.head_dim),
            "v": draw(self.batch, keys, self.kv_heads, self.head_dim),
            "dout": draw(self.batch, queries, self.heads, self.head_dim) * self.out_weight,
            "dlse": draw(self.batch, self.heads, queries) * self.lse_weight,
        }

    def whole_visibility(self) -> Visibility | None:
        """By name: ``frames`` (runs, see-all rows, padding, empty rows), ``causal``, ``none``;
        ``branches`` (each sees what comes before all of them, and of the rest its own)."""
        if self.visibility == "none":
            return None
        queries, keys = sum(self.q_lengths), sum(self.kv_lengths)
        row = torch.arange(queries, dtype=torch.int32)
        gaps: tuple[Tensor, ...] = ()
        if self.visibility == "causal":
            position = torch.arange(keys, dtype=torch.int32)
            parts = (torch.zeros_like(row), row + 1, position)
        elif self.visibility == "branches":
            position, first = torch.arange(keys, dtype=torch.int32), keys // 3
            end = row * keys // max(queries, 1) + 1
            parts = (torch.zeros_like(row), end.masked_fill(row % 7 == 6, 0), position)
            gaps = (torch.full_like(row, first), first + (end - first) // 4 * 3)
        else:
            position = torch.arange(keys, dtype=torch.int32) // 5
            position[::7] = -1
            start, end = (row // 2) - 1, row // 2 + 1
            start[3::5], end[3::5] = -1, torch.iinfo(torch.int32).max
            end[4::6] = start[4::6]
            parts = (start, end, position)
        start, end, position, *gaps = (part.repeat(self.batch, 1) for part in (*parts, *gaps))
        if self.batch > 1 and self.visibility == "frames":
            position[1] = position[1].flip(0)
        return Visibility(start, end, position, *gaps)

    def oracle(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """out, lse and gradients in float64 from inputs in this problem's own dtype."""
        tensors = self.tensors()
        leaves = [tensors[name].clone().double().requires_grad_() for name in "qkv"]
        out, lse = attention_oracle(
            *leaves, visibility=self.whole_visibility(), softmax_scale=self.scale
        )
        self.loss(out, lse, tensors["dout"], tensors["dlse"]).backward()
        gradients = {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **gradients}

    @staticmethod
    def loss(out: Tensor, lse: Tensor | None, dout: Tensor, dlse: Tensor) -> Tensor:
        """A loss whose gradients with respect to out and lse are dout and dlse."""
        total = (out.double() * dout.double()).sum()
        if lse is not None:
            seen = lse.double().masked_fill(lse == -torch.inf, 0.0)
            total = total + (seen * dlse.double()).sum()
        return total

    def shard(self, rank: int) -> dict[str, Any]:
        """This rank's leaves, loss weights and visibility, on the device."""
        tensors = {name: tensor.to(self.device) for name, tensor in self.tensors().items()}
        rows = _slice(self.q_lengths, rank)
        keys = _slice(self.kv_lengths, rank)
        whole = self.whole_visibility()
        visibility = None
        if whole is not None:
            visibility = whole.part(rows, keys).contiguous().to(torch.device(self.device))
        return {
            "q": tensors["q"][:, rows].clone().requires_grad_(),
            "k": tensors["k"][:, keys].clone().requires_grad_(),
            "v": tensors["v"][:, keys].clone().requires_grad_(),
            "dout": tensors["dout"][:, rows],
            "dlse": tensors["dlse"][:, :, rows],
            "visibility": visibility,
        }


def _slice(lengths: tuple[int, ...], rank: int) -> slice:
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def run_problem(problem: Problem, method: str) -> dict[str, Any]:
    """Run one problem on this rank; returns its shards of out, lse and gradients."""
    rank = torch.distributed.get_rank()
    shard = problem.shard(rank)
    arguments = {"visibility": shard["visibility"], "softmax_scale": problem.scale, **problem.extra}
    lse = None
    with ds_lvx.traffic() as forward:
        if method == "ulysses":
            out = ds_lvx.ulysses_attention(shard["q"], shard["k"], shard["v"], **arguments)
        elif method == "recompute":
            out, lse = ds_lvx.lv_xattn_recompute(
                shard["q"],
                torch.stack((shard["k"], shard["v"]), dim=2),
                lambda features: (features[:, :, 0], features[:, :, 1]),
                return_lse=True,
                **arguments,
            )
        elif method == "hybrid":
            wants_lse = problem.lse_weight != 0
            found = ds_lvx.hybrid_attention(
                shard["q"], shard["k"], shard["v"], return_lse=wants_lse, **arguments
            )
            out, lse = found if wants_lse else (found, None)
        else:
            function = ds_lvx.lv_xattn if method == "lvx" else ds_lvx.ring_attention
            out, lse = function(shard["q"], shard["k"], shard["v"], return_lse=True, **arguments)
    with ds_lvx.traffic() as backward:
        problem.loss(out, lse, shard["dout"], shard["dlse"]).backward()
    return {
        "out": out.detach().cpu(),
        "lse": None if lse is None else lse.detach().cpu(),
        "dq": shard["q"].grad.cpu(),
        "dk": shard["k"].grad.cpu(),
        "dv": shard["v"].grad.cpu(),
        "forward": forward,
        "backward": backward,
    }


def run_problems(cases: list[tuple[Problem, str]]) -> list[dict[str, Any]]:
    """Several problems in one start of the ranks; on GPUs over the groups of a training run."""
    groups: Any = contextlib.nullcontext()
    if cases[0][0].device == "cuda":
        ranks = torch.distributed.get_world_size()
        groups = contextlib.closing(ds_lvx.SequenceParallelGroups(ranks))
    with groups:
        return [run_problem(problem, method) for problem, method in cases]


def assemble(shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The whole sequence's results from those of every rank."""
    whole = {
        name: torch.cat([shard[name] for shard in shards], dim=1)
        for name in ("out", "dq", "dk", "dv")
    }
    if shards[0]["lse"] is not None:
        whole["lse"] = torch.cat([shard["lse"] for shard in shards], dim=2)
    return whole


def largest_error(result: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference by name; -inf must stand exactly where it should."""
    errors = {}
    for name, value in result.items():
        wanted = exact[name]
        assert not value.isnan().any(), f"NaN in {name}"
        assert torch.equal(value == -torch.inf, wanted == -torch.inf), f"-inf misplaced in {name}"
        finite = wanted != -torch.inf
        difference = (value.double() - wanted)[finite].abs()
        errors[name] = difference.max().item() if difference.numel() else 0.0
    return errors
