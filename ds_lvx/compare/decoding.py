"""What a rank does to measure generation: answers over visual inputs of several lengths.

Beside them it measures what a layer's message costs, with packing and merge and without, and, for
the planner, the steps of models on text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria

import ds_lvx
from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.schedules.replicated import Parts
from ds_lvx.compare.case import Case
from ds_lvx.compare.harness import joined, meet, now, own_device
from ds_lvx.compare.peak import meter
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.merge import empty_part
from ds_lvx.models.size import Size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNSETTLED = 2  # tokens after the prompt that are not counted
_MESSAGES = 200  # of each sort
_SMALLEST = Case(hidden=64, heads=4, kv_heads=4, cross_layers=1, text_tokens=16)
_LAYERS = (2, 6)  # of text


@dataclass(frozen=True)
class Job:
    """Generations by one model. Sizes are those of the whole sample.

    Attributes:
        case: sizes of the model, and tokens of the prompt; every second layer is cross-attention.
        frames: of each sample.
        new_tokens: that are chosen and timed, of each answer.
        dtype: a key of `DTYPES`.
    """

    case: Case
    frames: tuple[int, ...]
    new_tokens: int = 16
    dtype: str = "float32"

    def config(self) -> Any:
        """Of the model, whose layer 0 is of text: its cache tells where a token stands."""
        case = self.case
        words = {k: v for k, v in vars(case).items() if k in Size.__dataclass_fields__}
        layers = max(2 * case.cross_layers, case.cross_layers + case.self_layers)
        size = Size(
            **words,
            layers=layers,
            cross_at=tuple(range(1, 2 * case.cross_layers, 2)),
            positions=case.text_tokens + self.all_tokens,
            rope_theta=5e5,
            pad=None,
        )
        return case.contract().config(size)

    @property
    def all_tokens(self) -> int:
        """Of an answer, with those that are not counted."""
        return self.new_tokens + _UNSETTLED + 1


class Clock(StoppingCriteria):
    """Notes when each token is chosen, and the memory when the first one is; never stops."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes_in_use = 0
        self._meter = meter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.seconds:
            self.bytes_in_use = self._meter.now_bytes()
        self.seconds.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def token_s(self) -> list[float]:
        """Seconds of each token that counts."""
        return [b - a for a, b in pairwise(self.seconds)][_UNSETTLED:]


def generate(job: Job) -> dict[str, Any]:
    """On a rank: one generation a sample, and the messages of a layer.

    Returns:
        ``answers``, one a sample: ``prompt_s``; ``token_s`` by token; ``kept_bytes`` after the
        prompt and ``peak_bytes``, above what was there before; ``tokens``, what was chosen. And
        ``exchange_s``, ``collective_s`` and ``call_s`` by message, empty on one rank.
    """
    with joined(), _patched(job) as (model, session):
        # What the first use of anything costs, in seconds and in bytes, is not counted.
        _timed(model, job, _batch(job, job.frames[0]))
        answers = [_answer(model, job, frames) for frames in job.frames]
        return {"answers": answers, **_messages(job, session.groups.channel)}


def own_steps(*, dtype: str, tokens: int) -> list[dict[str, Any]]:
    """On a rank: seconds of each of so many tokens of text alone, by models of few and of more
    layers, with next to no weights. All ranks do the same, and nothing travels."""
    found = []
    for layers in _LAYERS:
        job = Job(replace(_SMALLEST, self_layers=layers), (1,), tokens, dtype)
        with _patched(job) as (model, session):
            batch = _batch(job, session.groups.sp_size)
            for _ in range(2):
                meet(session.groups.channel)
                _, clock = _timed(model, job, {"input_ids": batch["input_ids"]})
        found.append({"layers": layers, "seconds": clock.token_s})
    return found


@contextmanager
def _patched(job: Job) -> Iterator[tuple[Any, Any]]:
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


def _answer(model: Any, job: Job, frames: int) -> dict[str, Any]:
    given, memory = _batch(job, frames), meter()
    meet(Channel.world())
    memory.reset()
    before, start = memory.now_bytes(), now()
    found, clock = _timed(model, job, given)
    return {
        "prompt_s": clock.seconds[0] - start,
        "token_s": clock.token_s,
        "kept_bytes": clock.bytes_in_use - before,
        "peak_bytes": memory.peak_bytes() - before,
        "tokens": found[0, job.case.text_tokens :].tolist(),
    }


def _batch(job: Job, total: int) -> dict[str, Tensor]:
    """The prompt, with this rank's of so many frames."""
    family, frames, dtype = job.case.contract(), ds_lvx.owned(total), DTYPES[job.dtype]
    batch = family.random_frames(
        job.config(), text_tokens=job.case.text_tokens, total=total, frames=frames, seed=0
    )
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.items()}


def _timed(model: Any, job: Job, batch: Mapping[str, Tensor]) -> tuple[Tensor, Clock]:
    clock = Clock()
    found = ds_lvx.generate(
        model,
        batch,
        frames="local",
        max_new_tokens=job.all_tokens,
        min_new_tokens=job.all_tokens,
        do_sample=False,
        stopping_criteria=[clock],
    )
    return found, clock


def _messages(job: Job, channel: Channel) -> dict[str, list[float]]:
    """Seconds of a layer's message for one token, in pairs with the collective alone.

    The collective is that of the message: the same buffers, of which nothing is written or read.
    Which of both is first changes from pair to pair. Beside them stands the whole call.
    """
    samples: dict[str, list[float]] = {"exchange_s": [], "collective_s": [], "call_s": []}
    if channel.size == 1:
        return samples
    q, call = token_call(
        channel,
        heads=job.case.heads,
        kv_heads=job.case.kv_heads,
        head_dim=_head_dim(job.case),
        dtype=DTYPES[job.dtype],
    )
    parts, (out, lse) = Parts(channel, q, seen=True), empty_part(q, torch.float32)
    runs: dict[str, Callable[[], Any]] = {
        "exchange_s": lambda: parts.merged(out, lse.zero_()),
        "collective_s": parts.share,
        "call_s": call,
    }
    with torch.no_grad():
        for number in range(_MESSAGES):
            for name in (list(runs), list(runs)[::-1])[number % 2]:
                start = now()
                runs[name]()
                samples[name].append(now() - start)
    return {name: each[_MESSAGES // 10 :] for name, each in samples.items()}


def token_call(
    channel: Channel, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Callable[[], Any]]:
    """One query on this rank's device, and the attention of a layer to no key of any rank.

    Args:
        channel: two ranks or more.
        heads, kv_heads, head_dim, dtype: of the layer.
    """
    q = torch.randn(1, 1, heads, head_dim, device=own_device(), dtype=dtype)
    nothing, ranks = q[:, :0, :kv_heads], channel.size
    layout = Layout(channel, (1,) * ranks, (0,) * ranks, device=q.device)
    call = Call(layout, kernel=kernel_for("auto", q), softmax_scale=1.0, schedule="replicated")
    return q, lambda: lvx.attend(call, q, nothing, nothing)


def _head_dim(case: Case) -> int:
    return case.head_dim or case.hidden // case.heads
