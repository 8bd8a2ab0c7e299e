"""Generating by the number of ranks and of visual tokens: tokens a second, and memory of a rank.

Every run is in fresh processes. A model with random weights, whose cross-attention has real sizes
and whose tower is small, encodes random frames and chooses tokens. Beside it stands what a layer's
message costs: the exchange of parts that are merged, and the bare collective of as many bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers.generation import StoppingCriteria

import ds_lvx
from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.layout import Layout
from ds_lvx.compare.case import Case
from ds_lvx.compare.document import Results, columns, percentiles, times
from ds_lvx.compare.harness import Ranks, now, on_ranks, slowest, spread
from ds_lvx.compare.peak import PROMPT_FREEING, meter
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.models.size import Size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNSETTLED = 2  # tokens after the prompt that are not counted
_MESSAGES = 100  # of each sort


@dataclass(frozen=True)
class Job:
    """One generation. Sizes are those of the whole sample.

    Attributes:
        case: sizes of the model, and tokens of the prompt; every second layer is cross-attention.
        frames: of the sample.
        new_tokens: that are chosen and timed.
        dtype: a key of `DTYPES`.
    """

    case: Case
    frames: int
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
            positions=case.text_tokens + self.new_tokens + _UNSETTLED + 1,
            rope_theta=5e5,
            pad=None,
        )
        return case.contract().config(size)

    @property
    def tokens(self) -> int:
        """Visual tokens of the sample."""
        return self.frames * self.case.frame_tokens

    def kept_bytes(self, ranks: int) -> int:
        """K and V of the rank that has most frames (`docs/generation.md`)."""
        head_dim = self.case.head_dim or self.case.hidden // self.case.heads
        mine = -(-self.frames // ranks) * self.case.frame_tokens
        token = 2 * self.case.kv_heads * head_dim * DTYPES[self.dtype].itemsize
        return self.case.cross_layers * mine * token

    def needed_bytes(self, ranks: int) -> int:
        """At the peak of the prompt: K and V, and twice the features they are made of."""
        mine = -(-self.frames // ranks) * self.case.frame_tokens
        features = mine * self.case.hidden * DTYPES[self.dtype].itemsize
        return self.kept_bytes(ranks) + 2 * features


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


def generate(job: Job) -> dict[str, Any]:
    """On a rank: one generation, and the messages of a layer.

    Returns:
        ``prompt_s``; ``token_s`` by token; ``kept_bytes`` after the prompt and ``peak_bytes``,
        above what was there before; ``exchange_s`` and ``collective_s`` by message, empty on one
        rank; ``tokens``, what was chosen.
    """
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    device, dtype = get_accelerator().current_device_name(), DTYPES[job.dtype]
    torch.manual_seed(0)
    family = job.case.contract()
    model = family.build(job.config(), gate=1.0, dtype=torch.float32).to(device, dtype)
    session = ds_lvx.apply(model, _ds_config(job, ranks=int(os.environ["WORLD_SIZE"])))
    small = replace(job, frames=session.groups.sp_size, new_tokens=1)
    _timed(model, small, _batch(small))  # what the first use of anything costs is not counted
    given, memory = _batch(job), meter()
    memory.reset()
    before, start = memory.now_bytes(), now()
    found, clock = _timed(model, job, given)
    peak = memory.peak_bytes()
    messages = _messages(job, session.groups.channel, device)
    session.close()
    ds_lvx.shutdown()
    marks = clock.seconds
    return {
        "prompt_s": marks[0] - start,
        "token_s": [b - a for a, b in pairwise(marks)][_UNSETTLED:],
        "kept_bytes": clock.bytes_in_use - before,
        "peak_bytes": peak - before,
        "tokens": found[0, job.case.text_tokens :].tolist(),
        **messages,
    }


def _batch(job: Job) -> dict[str, Tensor]:
    """The prompt, with this rank's frames."""
    family, frames, dtype = job.case.contract(), ds_lvx.owned(job.frames), DTYPES[job.dtype]
    batch = family.random_frames(
        job.config(), text_tokens=job.case.text_tokens, total=job.frames, frames=frames, seed=0
    )
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.items()}


def _timed(model: Any, job: Job, batch: Mapping[str, Tensor]) -> tuple[Tensor, Clock]:
    clock, count = Clock(), job.new_tokens + _UNSETTLED + 1
    found = ds_lvx.generate(
        model,
        batch,
        frames="local",
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        stopping_criteria=[clock],
    )
    return found, clock


def _ds_config(job: Job, *, ranks: int) -> dict[str, Any]:
    match = job.case.contract().patterns
    methods = {"local": "none", "cross": "lvx", "self": "ring"}
    rules = [{"match": match[kind], "method": method} for kind, method in methods.items()]
    return {"ds_lvx": {"sequence_parallel_size": ranks, "layers": rules}}


def _messages(job: Job, channel: Channel, device: str) -> dict[str, list[float]]:
    """Seconds of the exchange of a layer's parts for one token, and of the bare collective."""
    samples: dict[str, list[float]] = {"exchange_s": [], "collective_s": []}
    if channel.size == 1:
        return samples
    heads, head_dim = job.case.heads, job.case.head_dim or job.case.hidden // job.case.heads
    q = torch.randn(1, 1, heads, head_dim, device=device, dtype=DTYPES[job.dtype])
    nothing, one_each = q[:, :0, : job.case.kv_heads], (1,) * channel.size
    layout = Layout(channel, one_each, (0,) * channel.size, device=q.device)
    kernel = kernel_for("auto", q)
    call = Call(layout, kernel=kernel, softmax_scale=1.0, schedule="replicated")
    part = torch.zeros(1, heads * (head_dim + 1), device=device)
    for _ in range(_MESSAGES):  # side by side, so that both have the same neighbours
        start = now()
        lvx.attend(call, q, nothing, nothing)
        middle = now()
        channel.gather_rows([part], [0], one_each).wait()
        samples["exchange_s"].append(middle - start)
        samples["collective_s"].append(now() - middle)
    return {name: each[_MESSAGES // 10 :] for name, each in samples.items()}


# --------------------------------------------------------------------------------------------
# The subject


def record(job: Job, ranks: Ranks) -> dict[str, Any]:
    """One run, and what its ranks say together.

    Raises:
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
        RuntimeError: the ranks chose different tokens.
    """
    environment = {**ranks.environment, **PROMPT_FREEING}
    answers = on_ranks(generate, job, Ranks(**{**vars(ranks), "environment": environment}))
    if any(answer["tokens"] != answers[0]["tokens"] for answer in answers):
        raise RuntimeError("the ranks chose different tokens")
    seconds = slowest(*(answer["token_s"] for answer in answers))
    found = {
        "ranks": ranks.count,
        "visual_tokens": job.tokens,
        "prompt_s": max(answer["prompt_s"] for answer in answers),
        "token_s": spread(seconds),
        "tokens_per_s": 1 / spread(seconds)["median"],
        "kept_bytes": max(answer["kept_bytes"] for answer in answers),
        "predicted_kept_bytes": job.kept_bytes(ranks.count),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "tokens": answers[0]["tokens"],
    }
    if ranks.count > 1:
        for name in ("exchange_s", "collective_s"):
            found[name] = spread(slowest(*(answer[name] for answer in answers)))
        found["exchange_per_collective"] = (
            found["exchange_s"]["median"] / found["collective_s"]["median"]
        )
    return found


def assemble(job: Job, records: Sequence[Mapping[str, Any]], **head: Any) -> dict[str, Any]:
    """The JSON.

    Args:
        job: of which sizes; its number of frames is none of the records'.
        records: of `record`, and what was too large.
        head: what it begins with.
    """
    alone = {r["visual_tokens"]: r["tokens_per_s"] for r in records if r["ranks"] == 1}
    compared = [
        {**r, "speed_to_one_process": r["tokens_per_s"] / alone[r["visual_tokens"]]}
        if r["visual_tokens"] in alone
        else {**r, "speed_to_one_process": None}
        for r in records
    ]
    sizes = {"case": asdict(job.case), "dtype": job.dtype, "new_tokens": job.new_tokens}
    return {**head, **sizes, "records": compared}


def name(results: Results) -> str:
    """Of the files."""
    network = results["network"]
    return "generate" if network is None else f"generate-{network.replace(',', '-')}"


def text(results: Results) -> str:
    """The table."""
    mib = 2**20
    table = columns(
        results["records"],
        {
            "visual tokens": "{visual_tokens:,}",
            "ranks": "{ranks}",
            "tokens a second": "{tokens_per_s:.2f}",
            "of one process": lambda r: times(r["speed_to_one_process"]),
            "ms a token (p10 to p90)": lambda r: percentiles(_ms(r["token_s"]), "{:.1f}".format),
            "prompt, s": "{prompt_s:.1f}",
            "keys of a rank, MiB": lambda r: f"{r['predicted_kept_bytes'] / mib:,.0f}",
            "kept, measured": lambda r: f"{r['kept_bytes'] / mib:,.0f}",
            "peak": lambda r: f"{r['peak_bytes'] / mib:,.0f}",
            "a layer's message to the collective's own": lambda r: (
                f"{r['exchange_per_collective']:.2f}" if "exchange_per_collective" in r else "-"
            ),
        },
    )
    left_out = [
        f"{each['visual_tokens']:,} tokens on {each['ranks']} ranks: {each['why']}"
        for each in results["left_out"]
    ]
    return "\n".join([table, *(["", f"Left out: {'; '.join(left_out)}."] if left_out else [])])


def draw(results: Results) -> Any:
    """Tokens a second and memory over the visual tokens, a line for each number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for ranks in sorted({each["ranks"] for each in results["records"]}):
        mine = [each for each in results["records"] if each["ranks"] == ranks]
        tokens = [each["visual_tokens"] for each in mine]
        label = f"{ranks} ranks" if ranks > 1 else "one process"
        speed.loglog(tokens, [each["tokens_per_s"] for each in mine], "o-", label=label)
        memory.loglog(tokens, [each["kept_bytes"] / 2**20 for each in mine], "o-", label=label)
    for axes, title in ((speed, "tokens a second"), (memory, "kept after the prompt, MiB a rank")):
        axes.set_xlabel("visual tokens")
        axes.set_title(title)
        axes.legend()
    return figure


def _ms(seconds: Mapping[str, Any]) -> dict[str, float]:
    return {key: 1e3 * seconds[key] for key in ("median", "p10", "p90")}
