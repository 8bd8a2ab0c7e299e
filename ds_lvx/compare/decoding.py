"""Tokens of a generation, timed on a rank; for the planner those of models of few layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria

import ds_lvx
from ds_lvx.compare.case import DTYPES, Case, make_batch
from ds_lvx.compare.harness import meet, now, own_device
from ds_lvx.distributed.channel import Channel

_UNSETTLED = 2  # tokens after the prompt that are not counted
_SMALLEST = Case(hidden=64, heads=4, kv_heads=4, cross_layers=1, text_tokens=16)
_LAYERS = ((2, 1), (6, 1), (3, 3))  # of text, and of cross-attention
_SWEPT_BYTES = 2**26
"""As much as the caches of a processor hold."""


@dataclass(frozen=True)
class Job:
    """Generations by one model. Sizes are those of the whole sample."""

    case: Case  # sizes, and tokens of the prompt; every second layer is cross-attention
    frames: tuple[int, ...]  # of each sample
    new_tokens: int = 16  # that are chosen and timed, of each answer
    dtype: str = "float32"  # a key of `DTYPES`

    def config(self) -> Any:
        """Of the model, whose layer 0 is of text: its cache tells where a token stands."""
        at = range(1, 2 * self.case.cross_layers, 2)
        return self.case.config(cross_at=at, positions=self.case.text_tokens + self.all_tokens)

    @property
    def all_tokens(self) -> int:
        """Of an answer, with those that are not counted."""
        return self.new_tokens + _UNSETTLED + 1


class Clock(StoppingCriteria):
    """Notes when each token is chosen; never stops.

    Args:
        between: runs after each token.
    """

    def __init__(self, between: Callable[[], Any] | None = None) -> None:
        self.seconds: list[float] = []
        self._begun: list[float] = []
        self._between = between

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.seconds.append(now())
        if self._between is not None:
            self._between()
        self._begun.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def token_s(self) -> list[float]:
        """Seconds of each token that counts, without what runs ``between`` two of them."""
        tokens = zip(self._begun, self.seconds[1:], strict=False)
        return [chosen - begun for begun, chosen in tokens][_UNSETTLED:]


def own_steps(*, dtype: str, tokens: int) -> list[dict[str, Any]]:
    """On a rank: what the host takes for so many tokens, by models of few and of more layers.

    They have next to no weights and keys. Before each token all ranks go through the caches, as the
    keys of an answer do, and meet.

    Returns:
        By model: its layers of ``text`` and of ``cross``-attention; ``seconds`` of each token; and
        ``begin_seconds``, from the call to the first one.
    """
    swept = torch.zeros(_SWEPT_BYTES, dtype=torch.uint8, device=own_device())

    def sweep() -> None:
        swept.add_(1)
        meet(Channel.world())

    found = []
    for text, cross in _LAYERS:
        case = replace(_SMALLEST, self_layers=text, cross_layers=cross)
        job = Job(case, (Channel.world().size,), tokens, dtype)
        with patched(job) as (model, _):
            batch = batch_of(job, *job.frames)
            timed(model, job, batch, Clock())
            sweep()
            clock, start = Clock(sweep), now()
            timed(model, job, batch, clock)
        times = {"seconds": clock.token_s, "begin_seconds": [clock.seconds[0] - start]}
        found.append({"text": text, "cross": cross, **times})
    return found


@contextmanager
def patched(job: Job) -> Iterator[tuple[Any, Any]]:
    """A model with random weights on this rank's device, patched for all ranks, and its session."""
    torch.manual_seed(0)
    family = job.case.contract()
    model = family.build(job.config(), gate=1.0, dtype=torch.float32)
    model = model.to(own_device(), DTYPES[job.dtype])
    match = family.patterns
    methods = {"local": "none", "cross": "lvx", "self": "ring"}
    rules = [{"match": match[kind], "method": method} for kind, method in methods.items()]
    section = {"sequence_parallel_size": Channel.world().size, "layers": rules}
    session = ds_lvx.apply(model, {"ds_lvx": section})
    try:
        yield model, session
    finally:
        session.close()


def batch_of(job: Job, total: int) -> dict[str, Tensor]:
    """The prompt, with this rank's of so many frames."""
    own: dict[str, Any] = {"frames": ds_lvx.owned(total), "config": job.config()}
    return make_batch(job.case, total=total, dtype=DTYPES[job.dtype], **own)


def timed(model: Any, job: Job, batch: Mapping[str, Tensor], clock: Clock) -> Tensor:
    """Generate over a batch by `batch_of`; the prompt and what was chosen."""
    found: Tensor = ds_lvx.generate(
        model,
        batch,
        frames="local",
        max_new_tokens=job.all_tokens,
        min_new_tokens=job.all_tokens,
        do_sample=False,
        stopping_criteria=[clock],
    )
    return found
