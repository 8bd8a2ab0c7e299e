"""Generating by the number of ranks and of visual tokens: tokens a second, and memory of a rank.

Every number of ranks runs in fresh processes: a model with random weights, whose cross-attention
has real sizes and whose tower is small, encodes random frames and chooses tokens
(`ds_lvx.compare.decoding`). Beside what is measured stands what the planner predicts from a profile
that has seen nothing of these runs. A machine's speed drifts: the same processes measure the
profile before and after each length, and the samples of both count for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.peak import PROMPT_FREEING, meter
from bench.pooled import joined, short
from ds_lvx.attention import lvx
from ds_lvx.attention.call import Call
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.schedules.replicated import Parts
from ds_lvx.compare.case import DTYPES
from ds_lvx.compare.decoding import Clock, Job, batch_of, patched, timed
from ds_lvx.compare.document import Cells, Results, columns, percentiles, times
from ds_lvx.compare.harness import Ranks, meet, now, on_ranks, own_device, slowest, spread
from ds_lvx.config.words import in_ranks
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.merge import empty_part
from ds_lvx.plan import calibrate
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.generation import generation
from ds_lvx.plan.measure import Samples, measure
from ds_lvx.plan.scenario import Scenario

_KEYS = (16, 1024, 8192, 65_536)
_MESSAGE_BYTES = (2**8, 2**11, 2**14, 2**17)
_MESSAGES = 200  # of each sort
_ANSWERS = 4
_LEAST_S = 4.0
"""Over each length: so many answers, or those that take so long."""
_PREDICTED = ("token_s", "tokens_per_s", "kept_bytes", "peak_bytes", "prompt_s")


@dataclass(frozen=True)
class Request:
    """What a rank measures."""

    job: Job  # whose answers
    samples: Samples  # for the planner, before and after those of each length


def samples_for(job: Job, *, quick: bool = False) -> Samples:
    """What the planner has to know of the ranks that generate.

    Args:
        job: the dtype, the heads and the width that are measured.
        quick: tiny shapes, to try it.
    """
    case = job.case
    return Samples(
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim or case.hidden // case.heads,
        # A prompt's queries take long over many keys, and its time grows with them.
        lengths=(
            *((1, keys) for keys in _KEYS[: 2 if quick else None]),
            *((case.text_tokens, keys) for keys in _KEYS[: 2 if quick else 3]),
        ),
        message_bytes=_MESSAGE_BYTES,
        hidden=(2**10, 16, 1024),
        elements=2 ** (12 if quick else 22),
        repeats=2 if quick else 3,
        dtype=job.dtype,
        backward=False,
        width=case.hidden,
    )


def measured_around(request: Request) -> dict[str, Any]:
    """On a rank: the answers over each number of frames, and a profile's samples around them.

    Returns:
        ``answers``, a list for each number of frames; ``known``, of `measure.measure`, one more
        than these; and those of `messages`.
    """
    job = request.job
    with patched(job) as (model, session):
        # What the first use of anything costs, in seconds and in bytes, is not counted.
        answer(model, job, job.frames[0])
        found = messages(job, session.groups.channel)
    known, answers = [short(measure(request.samples))], []
    for frames in job.frames:
        with patched(job) as (model, _):
            answers.append(_answers(model, job, frames))
        known.append(short(measure(request.samples)))
    return {"answers": answers, "known": known, **found}


class _Clock(Clock):
    """Notes the memory when the first token is chosen, too."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.seconds:
            self.bytes_in_use = meter().now_bytes()
        return super().__call__(input_ids, scores, **kwargs)


def answer(model: Any, job: Job, frames: int) -> dict[str, Any]:
    """On a rank: one generation over so many frames.

    Returns:
        ``prompt_s``; ``token_s`` by token; ``kept_bytes`` after the prompt and ``peak_bytes``,
        above what was there before; ``tokens``, what was chosen.
    """
    given, memory, clock = batch_of(job, frames), meter(), _Clock()
    meet(Channel.world())
    memory.reset()
    before, start = memory.now_bytes(), now()
    found = timed(model, job, given, clock)
    return {
        "prompt_s": clock.seconds[0] - start,
        "token_s": clock.token_s,
        "kept_bytes": clock.bytes_in_use - before,
        "peak_bytes": memory.peak_bytes() - before,
        "tokens": found[0, job.case.text_tokens :].tolist(),
    }


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
    kernel = kernel_for("auto", q)
    call = Call(layout, kernel, softmax_scale=1.0, schedule="replicated", wants_lse=False)
    parts, (out, lse) = Parts(channel, q, seen=True), empty_part(q, torch.float32)
    lse.zero_()
    runs: dict[str, Callable[[], Any]] = {
        "exchange_s": lambda: parts.merged(out, lse, wants_lse=False),
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


def _answers(model: Any, job: Job, frames: int) -> list[dict[str, Any]]:
    """One answer, or several where that is short."""
    found: list[dict[str, Any]] = []
    start = now()
    while len(found) < _ANSWERS:
        found.append(answer(model, job, frames))
        spent = max(each["s"] for each in Channel.world().agree({"s": now() - start}))
        if spent > _LEAST_S:
            break
    return found


def scenario(job: Job, frames: int) -> Scenario:
    """One of the job's samples, as the planner is asked about it."""
    family, config = job.case.contract(), job.config()
    model = family.dimensions(config.to_dict(), "a model of random weights", "its configuration")
    return Scenario(
        model.with_frames(frames),
        text_tokens=job.case.text_tokens,
        frames=frames,
        zero_stage=0,
        element_bytes=DTYPES[job.dtype].itemsize,
    )


def predict(job: Job, frames: int, cluster: Cluster) -> dict[str, Any]:
    """What the planner says of one of the job's samples, by the names of what is measured.

    Memory is above what was there before, weights included: ``kept_bytes`` when the first token is
    chosen, ``peak_bytes`` of the whole.
    """
    asked, ranks = scenario(job, frames), cluster.gpus
    found = generation(asked, cluster, ranks=ranks, new_tokens=job.all_tokens)
    first = generation(asked, cluster, ranks=ranks, new_tokens=1).held
    return {
        "token_s": found.token_s,
        "tokens_per_s": found.tokens_per_s,
        "kept_bytes": first.kept,
        "peak_bytes": found.held.peak - found.held.weights,
        "prompt_s": found.prompt_s,
        "parts_s": {"token": found.token, "prompt": found.prompt},
        "message_bytes": found.bytes_sent,
    }


# --------------------------------------------------------------------------------------------
# The subject


def record(job: Job, ranks: Ranks, samples: Samples) -> dict[str, Any]:
    """All samples of a job on some ranks, beside what the planner predicts of them.

    Args:
        job: what runs.
        ranks: where.
        samples: for the planner.

    Returns:
        ``records``, one a sample; ``messages``: the exchange and the collective of a layer, and the
        whole call, None on one rank; and the ``profile`` of all samples around the answers, with
        ``known``, those by time and rank.

    Raises:
        RunError: a rank failed.
        NetworkError: the network cannot be made here.
        RuntimeError: the ranks chose different tokens.
    """
    # New memory takes its time, for the answers as for the profile.
    where = replace(ranks, environment={**ranks.environment, **PROMPT_FREEING})
    answers = on_ranks(measured_around, Request(job, samples), where, joins=True)
    by_sample = zip(*(answer["answers"] for answer in answers), strict=True)
    known = [list(each) for each in zip(*(answer["known"] for answer in answers), strict=True)]
    first = calibrate.profile_of(known[0], samples, ranks)
    found = []
    for number, (frames, each) in enumerate(zip(job.frames, by_sample, strict=True)):
        cluster = around(first, known, number)
        found.append(
            {
                "ranks": ranks.count,
                "visual_tokens": frames * job.case.frame_tokens,
                **_together(each),
                "predicted": predict(job, frames, Cluster.of(cluster)),
                "cluster": cluster,
            }
        )
    del first["answers"]  # they stand in ``known``
    return {
        "records": found,
        "messages": _messages(answers) if ranks.count > 1 else None,
        "profile": {**first, "known": known},
    }


def around(profile: Mapping[str, Any], known: Sequence[Any], number: int) -> dict[str, Any]:
    """The cluster by what was measured before and after the answers of a number.

    Args:
        profile: of the samples of any time.
        known: samples by time and rank.
        number: of the length, from 0.
    """
    both = joined(known[number], known[number + 1])
    return dict(calibrate.refit({**profile, "answers": both})["cluster"])


def _together(answers: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The answers over one length, by rank, as one."""
    every = [answer for of_rank in answers for answer in of_rank]
    if any(answer["tokens"] != every[0]["tokens"] for answer in every):
        raise RuntimeError("the ranks chose different tokens")
    tokens = [[s for answer in of_rank for s in answer["token_s"]] for of_rank in answers]
    prompts = [[answer["prompt_s"] for answer in of_rank] for of_rank in answers]
    seconds, prompt = spread(slowest(*tokens)), spread(slowest(*prompts))
    return {
        "token_s": seconds,
        "tokens_per_s": 1 / seconds["median"],
        "prompt_s": prompt["median"],
        "prompt_samples_s": prompt["samples"],
        **{name: max(each[name] for each in every) for name in ("kept_bytes", "peak_bytes")},
        "tokens": every[0]["tokens"],
    }


def _messages(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("exchange_s", "collective_s", "call_s")
    found = {name: spread(slowest(*(answer[name] for answer in answers))) for name in names}
    ratio = found["exchange_s"]["median"] / found["collective_s"]["median"]
    return {"ranks": len(answers), **found, "exchange_per_collective": ratio}


def assemble(job: Job, pieces: Sequence[Mapping[str, Any]], **head: Any) -> dict[str, Any]:
    """The JSON.

    Args:
        job: of which sizes.
        pieces: of `record`, one for each number of ranks.
        head: what it begins with.
    """
    records = [each for piece in pieces for each in piece["records"]]
    alone = {r["visual_tokens"]: r["tokens_per_s"] for r in records if r["ranks"] == 1}
    for each in records:
        one = alone.get(each["visual_tokens"])
        each["speed_to_one_process"] = None if one is None else each["tokens_per_s"] / one
        measured = {**each, "token_s": each["token_s"]["median"]}
        each["predicted_over_measured"] = {
            name: each["predicted"][name] / measured[name] for name in _PREDICTED if measured[name]
        }
    messages = [piece["messages"] for piece in pieces if piece["messages"] is not None]
    return {
        **head,
        "case": asdict(job.case),
        "dtype": job.dtype,
        "new_tokens": job.new_tokens,
        "records": sorted(records, key=lambda each: (each["visual_tokens"], each["ranks"])),
        "messages": messages,
        "profiles": [piece["profile"] for piece in pieces],
    }


def name(results: Results) -> str:
    """Of the files."""
    network = results["network"]
    return "generate" if network is None else f"generate-{network.replace(',', '-')}"


def text(results: Results) -> str:
    """The tables."""
    tables = [columns(results["records"], _CELLS)]
    if results["messages"]:
        tables += ["", columns(results["messages"], _MESSAGE_CELLS)]
    left_out = [
        f"{each['visual_tokens']:,} tokens on {in_ranks(each['ranks'])}: {each['why']}"
        for each in results["left_out"]
    ]
    return "\n".join([*tables, *(["", f"Left out: {'; '.join(left_out)}."] if left_out else [])])


def _mib(which: str) -> Any:
    """Measured / predicted."""
    return lambda r: f"{r[which] / 2**20:,.0f} / {r['predicted'][which] / 2**20:,.0f}"


_CELLS: Cells = {
    "visual tokens": "{visual_tokens:,}",
    "ranks": "{ranks}",
    "tokens a second, measured / predicted": lambda r: (
        f"{r['tokens_per_s']:.2f} / {r['predicted']['tokens_per_s']:.2f}"
    ),
    "predicted over measured": lambda r: f"{r['predicted_over_measured']['tokens_per_s']:.2f}",
    "to one process": lambda r: times(r["speed_to_one_process"]),
    "ms a token (p10 to p90)": lambda r: percentiles(r["token_s"], lambda s: f"{1e3 * s:.1f}"),
    "prompt, s": lambda r: f"{r['prompt_s']:.1f} / {r['predicted']['prompt_s']:.1f}",
    "keys of a rank, MiB": _mib("kept_bytes"),
    "peak of a rank, MiB": _mib("peak_bytes"),
}
_MESSAGE_CELLS: Cells = {
    "ranks": "{ranks}",
    "packing, collective and merge, us (p10 to p90)": lambda r: _microseconds(r["exchange_s"]),
    "the collective alone": lambda r: _microseconds(r["collective_s"]),
    "ratio": "{exchange_per_collective:.2f}",
    "a whole call without keys": lambda r: _microseconds(r.get("call_s")),
}


def draw(results: Results) -> Any:
    """Tokens a second and memory over the visual tokens, a line for each number of ranks, the
    planner's dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for place, ranks in enumerate(sorted({each["ranks"] for each in results["records"]})):
        mine = [each for each in results["records"] if each["ranks"] == ranks]
        tokens = [each["visual_tokens"] for each in mine]
        label = f"{ranks} ranks" if ranks > 1 else "one process"
        for axes, which, scale in ((speed, "tokens_per_s", 1), (memory, "kept_bytes", 2**20)):
            for source, style, words in (
                (mine, "o-", {"label": label}),
                ([each["predicted"] for each in mine], ":", {}),
            ):
                values = [each[which] / scale for each in source]
                axes.loglog(tokens, values, style, color=f"C{place}", **words)
    for axes, title in ((speed, "tokens a second"), (memory, "kept after the prompt, MiB a rank")):
        axes.set_xlabel("visual tokens (dotted: predicted)")
        axes.set_title(title)
        axes.legend()
    return figure


def _microseconds(seconds: Mapping[str, Any] | None) -> str:
    return "-" if seconds is None else percentiles(seconds, lambda each: f"{1e6 * each:.0f}")
