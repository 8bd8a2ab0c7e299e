"""What the kernel benchmark computes: shapes of the paper's models, with random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_lvx.compare.kernels.roofline import Problem, Work, backward_work, forward_work
from ds_lvx.compare.operators.tensors import FRAMES, FRAMES_SEEN, Shape, first_frame

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class KernelCase:
    """Cross-attention of one layer on one rank.

    Attributes:
        model: whose cross-attention it is.
        ranks: that share the sample.
        shape: of the rank's queries and keys, in bf16.
    """

    model: str
    ranks: int
    shape: Shape

    @property
    def name(self) -> str:
        """Such as ``mllama-192`` or ``mllama-192-visibility``."""
        rule = "" if self.shape.visibility == "all" else "-visibility"
        return f"{self.model}-{self.shape.seqlen_q}{rule}"

    def problem(self) -> Problem:
        """What its operations and bytes follow from."""
        shape, visible, seen = self.shape, 1.0, 1.0
        if shape.visibility == "frames":
            firsts = {first_frame(row, shape.seqlen_q) for row in range(shape.seqlen_q)}
            frames = {frame + more for frame in firsts for more in range(FRAMES_SEEN)}
            visible, seen = FRAMES_SEEN / FRAMES, len(frames) / FRAMES
        return Problem(
            queries=shape.seqlen_q,
            keys=shape.seqlen_kv,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            element_bytes=shape.tensor_dtype.itemsize,
            visible=visible,
            seen=seen,
        )

    def work(self, direction: str) -> Work:
        """Operations and bytes of ``"forward"`` or ``"backward"``."""
        return (forward_work if direction == "forward" else backward_work)(self.problem())


def _cases(
    model: str, ranks: int, queries: tuple[int, ...], keys: int, heads: tuple[int, int, int]
) -> Iterator[KernelCase]:
    """Without and with visibility; heads are those of q, those of K and V, and their size."""
    for each in queries:
        shape = Shape(each, keys, heads=heads[0], kv_heads=heads[1], head_dim=heads[2])
        yield KernelCase(model, ranks, shape)
        yield KernelCase(model, ranks, replace(shape, visibility="frames"))


PAPER = (
    *_cases("mllama", 6, (1, 192, 384, 4096), 20 * 6404, (32, 8, 128)),
    *_cases("mplug_owl3", 16, (4096,), 128 * 729, (28, 4, 128)),
    *_cases("openflamingo", 16, (32768,), 2048 * 64, (8, 8, 64)),
)
"""Llama-3.2-Vision on 6 ranks with 125K keys each, mPLUG-Owl3-7B on 16 with 91K, OpenFlamingo on 16
with 128K: whole frames, so 128,080, 93,312 and 131,072 keys."""

QUICK = (*_cases("tiny", 2, (24,), 320, (4, 2, 32)), *_cases("tiny", 2, (1,), 160, (2, 2, 16)))
"""To try the script."""
