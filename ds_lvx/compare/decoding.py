"""What a rank does to measure generation: answers over visual inputs of several lengths.

Beside them it measures what a layer's message costs, with packing and merge and without, and, for
the planner, the steps of models on text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from ds_lvx.compare.harness import meet, now, own_device
from ds_lvx.compare.peak import meter
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.merge import empty_part
from ds_lvx.models.size import Size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNSETTLED = 2  # tokens after the prompt that are not counted
_MESSAGES = 200  # of each sort
_SMALLEST = Case(hidden=64, heads=4, kv_heads=4, cross_layers=1, text_tokens=16)
_LAYERS = ((2, 1), (6, 1), (3, 3))  # of text, and of cross-attention
_SWEPT_BYTES = 2**26
"""As much as the caches of a processor hold."""


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
    """Notes when each token is chosen, and the memory when the first one is; never stops.

    Args:
        between: runs after each token.
    """

    def __init__(self, between: Callable[[], Any] | None = None) -> None:
        self.seconds: list[float] = []
        self.bytes_in_use = 0
        self._begun: list[float] = []
        self._between, self._meter = between, meter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.seconds:
            self.bytes_in_use = self._meter.now_bytes()
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
            batch = _batch(job, *job.frames)
            _timed(model, job, batch, Clock())
            sweep()
            clock, start = Clock(sweep), now()
            _timed(model, job, batch, clock)
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


def answer(model: Any, job: Job, frames: int) -> dict[str, Any]:
    """On a rank: one generation over so many frames.

    Returns:
        ``prompt_s``; ``token_s`` by token; ``kept_bytes`` after the prompt and ``peak_bytes``,
        above what was there before; ``tokens``, what was chosen.
    """
    given, memory, clock = _batch(job, frames), meter(), Clock()
    meet(Channel.world())
    memory.reset()
    before, start = memory.now_bytes(), now()
    found = _timed(model, job, given, clock)
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


def _timed(model: Any, job: Job, batch: Mapping[str, Tensor], clock: Clock) -> Tensor:
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


def messages(job: Job, channel: Channel) -> dict[str, list[float]]:
    """On a rank: seconds of a layer's message for one token, in pairs with the collective alone.

    The collective is that of the message: the same buffers, of which nothing is written or read.
    Which of both is first changes from pair to pair. Beside them stands the whole call.
    """
    samples: dict[str, list[float]] = {"exchange_s": [], "collective_s": [], "call_s": []}
    if channel.size == 1:
        return samples
    case, dtype = job.case, DTYPES[job.dtype]
    head_dim = case.head_dim or case.hidden // case.heads
    q = torch.randn(1, 1, case.heads, head_dim, device=own_device(), dtype=dtype)
    nothing = q[:, :0, : case.kv_heads]
    layout = Layout(channel, (1,) * channel.size, (0,) * channel.size, device=q.device)
    call = Call(layout, kernel=kernel_for("auto", q), softmax_scale=1.0, schedule="replicated")
    parts, (out, lse) = Parts(channel, q, seen=True), empty_part(q, torch.float32)
    runs: dict[str, Callable[[], Any]] = {
        "exchange_s": lambda: parts.merged(out, lse.zero_()),
        "collective_s": parts.share,
        "call_s": lambda: lvx.attend(call, q, nothing, nothing),
    }
    with torch.no_grad():
        for number in range(_MESSAGES):
            for name in (list(runs), list(runs)[::-1])[number % 2]:
                start = now()
                runs[name]()
                samples[name].append(now() - start)
    return {name: each[_MESSAGES // 10 :] for name, each in samples.items()}
