"""What the kernel benchmark computes: shapes of the paper's models, with random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lvx.kernels.visibility import Visibility
from ds_lvx.plan.roofline import Problem, Work, backward_work, forward_work

DIRECTIONS = ("forward", "backward")
WINDOW = 4
"""With visibility a query sees one frame in four, in a run."""

_WORK = {"forward": forward_work, "backward": backward_work}


@dataclass(frozen=True)
class KernelCase:
    """Cross-attention of one layer on one rank.

    Attributes:
        model: whose cross-attention it is.
        ranks: that share the sample.
        queries: of this call.
        frames: on this rank; a multiple of four.
        frame_tokens: visual tokens of a frame.
        heads, kv_heads, head_dim: of the layer.
        visibility: frames in order, each query sees a run of a quarter of them; else all.
    """

    model: str
    ranks: int
    queries: int
    frames: int
    frame_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    visibility: bool = False

    def __post_init__(self) -> None:
        if self.frames % WINDOW != 0:
            raise ValueError(f"frames: got {self.frames}; expected a multiple of {WINDOW}")

    @property
    def name(self) -> str:
        """Such as ``mllama-192`` or ``mllama-192-visibility``."""
        return f"{self.model}-{self.queries}" + ("-visibility" if self.visibility else "")

    @property
    def keys(self) -> int:
        """Visual tokens on this rank."""
        return self.frames * self.frame_tokens

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.head_dim**-0.5)

    def first_frames(self) -> list[int]:
        """The first frame that each query sees: from the start to the end of the video."""
        steps = max(self.queries - 1, 1)
        last = self.frames - self.frames // WINDOW
        return [query * last // steps for query in range(self.queries)]

    def problem(self, *, element_bytes: int = 2) -> Problem:
        """Its operations and bytes."""
        visible = seen = 1.0
        if self.visibility:
            width = self.frames // WINDOW
            runs = (range(first, first + width) for first in set(self.first_frames()))
            visible, seen = 1.0 / WINDOW, len({f for run in runs for f in run}) / self.frames
        return Problem(
            queries=self.queries,
            keys=self.keys,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            element_bytes=element_bytes,
            visible=visible,
            seen=seen,
        )

    def work(self, direction: str) -> Work:
        """Operations and bytes of ``"forward"`` or ``"backward"`` in 16 bits."""
        return _WORK[direction](self.problem())

    def rule(self, device: torch.device) -> Visibility | None:
        """The visibility, on a device."""
        if not self.visibility:
            return None
        first = torch.tensor([self.first_frames()], dtype=torch.int32, device=device)
        frame = torch.arange(self.frames, dtype=torch.int32, device=device)
        of_keys = frame.repeat_interleave(self.frame_tokens)[None]
        return Visibility(first, first + self.frames // WINDOW, of_keys)

    def tensors(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, standard normal."""
        generator = torch.Generator(device).manual_seed(0)
        rows = (1, self.queries, self.heads, self.head_dim)
        keys = (1, self.keys, self.kv_heads, self.head_dim)
        q, k, v, dout = (
            torch.randn(shape, dtype=dtype, device=device, generator=generator)
            for shape in (rows, keys, keys, rows)
        )
        return q, k, v, dout


def _both(*cases: KernelCase) -> tuple[KernelCase, ...]:
    """Without and with visibility."""
    with_rule = (KernelCase(**{**vars(case), "visibility": True}) for case in cases)
    return tuple(case for pair in zip(cases, with_rule, strict=True) for case in pair)


PAPER = _both(
    *(
        KernelCase("mllama", 6, queries, 20, 6404, heads=32, kv_heads=8, head_dim=128)
        for queries in (1, 192, 384, 4096)
    ),
    KernelCase("mplug_owl3", 16, 4096, 128, 729, heads=28, kv_heads=4, head_dim=128),
    KernelCase("openflamingo", 16, 32768, 2048, 64, heads=8, kv_heads=8, head_dim=64),
)
"""Llama-3.2-Vision on 6 ranks with 125K keys each, mPLUG-Owl3-7B on 16 with 91K, OpenFlamingo on 16
with 128K: whole frames, so 128,080, 93,312 and 131,072 keys."""

QUICK = _both(
    KernelCase("tiny", 2, 24, 8, 40, heads=4, kv_heads=2, head_dim=32),
    KernelCase("tiny", 2, 1, 4, 40, heads=2, kv_heads=2, head_dim=16),
)
"""To try the script."""
