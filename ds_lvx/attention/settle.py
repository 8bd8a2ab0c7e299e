"""The call of a bare operator: checked on this rank, and agreed on with the others.

What ranks disagree on would hang or corrupt. `settle` asks the other ranks, once, on the control
plane, and makes the layout. A patched model has a layout with its batch, and asks nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.auto import Wanted, decide
from ds_lvx.attention.call import Call, Group
from ds_lvx.attention.checks import (
    check_features,
    check_flag,
    check_hybrid,
    check_keys,
    check_scale,
    check_strided,
    check_visibility,
    is_count,
)
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.replay import once, recording, replaying
from ds_lvx.attention.shape import AttentionShape, Hybrid
from ds_lvx.config.registry import AUTO, SCHEDULES, can_chunk, schedule_words
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.groups import resolve
from ds_lvx.distributed.together import telling
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.visibility import Visibility

_MAY_DIFFER = ("q_length", "kv_length", "requires_grad")  # from rank to rank


@dataclass(frozen=True, eq=False)
class _Asked:
    """What an operator is asked on this rank; the fields are the arguments of `settle`."""

    operation: str
    q: Tensor
    keys: Mapping[str, Tensor]
    visibility: Visibility | None
    softmax_scale: float | None
    kernel: str
    schedule: str | None
    return_lse: bool
    kv_chunk_tokens: int | None
    hybrid: Hybrid | None

    @property
    def scale(self) -> float:
        """The factor on the scores."""
        given = self.softmax_scale
        return self.q.shape[-1] ** -0.5 if given is None else float(given)

    @property
    def first(self) -> Tensor:
        """K, or the features that it is projected from."""
        return next(iter(self.keys.values()))

    @property
    def recomputes(self) -> bool:
        """Whether K and V are projected from features."""
        return "features" in self.keys


def settle(
    operation: str,
    q: Tensor,
    keys: Mapping[str, Tensor],
    *,
    group: Group,
    visibility: Visibility | None,
    softmax_scale: float | None,
    kernel: str,
    schedule: str | None = None,
    return_lse: bool = False,
    kv_chunk_tokens: int | None = None,
    hybrid: Hybrid | None = None,
) -> Call:
    """Check a call on this rank and agree on it with the other ranks of the group.

    Args:
        operation: the public function's name; ranks that call different ones get an error.
        q: ``[batch, seqlen_q, num_heads, head_dim]``.
        keys: ``{"k": k, "v": v}`` or ``{"features": features}``.
        group, visibility, softmax_scale, kernel, return_lse, kv_chunk_tokens: the function's
            arguments.
        schedule: likewise; None for a method without schedules.
        hybrid: of `hybrid_attention`.

    Raises:
        ValueError, NotImplementedError: on all ranks, naming the rank that got something wrong, or
            what the ranks disagree on.

    Collectives: one all-gather of 2 KiB a rank on the control group; none for a group of one, or
    when a checkpointed layer runs again.
    """
    asked = _Asked(
        operation,
        q,
        keys,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
        schedule=schedule,
        return_lse=return_lse,
        kv_chunk_tokens=kv_chunk_tokens,
        hybrid=hybrid,
    )
    call = once(operation, lambda: _settle(asked, resolve(group)))
    # A checkpoint's first pass may run without gradients; its second has them, on every rank.
    return replace(call, requires_grad=True) if replaying() else call


def _settle(asked: _Asked, channel: Channel) -> Call:
    kernel, records = _agree(asked, channel)
    q_lengths = tuple(record["q_length"] for record in records)
    kv_lengths = tuple(record["kv_length"] for record in records)
    requires_grad = torch.is_grad_enabled() and any(r["requires_grad"] for r in records)
    # A checkpoint's first pass may run without gradients; both have to decide alike.
    backward = requires_grad or recording()
    schedule = _schedule(asked, channel, q_lengths, kv_lengths, backward=backward)
    layout = Layout.of_call(
        channel,
        q_lengths,
        kv_lengths,
        asked.visibility,
        device=asked.q.device,
        backward=backward,
        **_needs(asked.operation, schedule),
    )
    return Call(
        layout,
        kernel=kernel,
        softmax_scale=asked.scale,
        schedule="gather" if schedule is None else schedule,
        requires_grad=requires_grad,
        returns_lse=asked.return_lse,
        hybrid=asked.hybrid,
    )


def _agree(asked: _Asked, channel: Channel) -> tuple[Kernel, list[dict[str, Any]]]:
    """The kernel, and what every rank is asked, by rank."""
    with telling(channel):
        kernel = _check(asked, channel.size)
        record = _record(asked)
    records = channel.agree(record)
    # The operation first: where ranks call different ones, nothing else is comparable.
    same = [key for key in record if key not in _MAY_DIFFER]
    require_same(records, same, what=asked.operation)
    return kernel, records


def _record(asked: _Asked) -> dict[str, Any]:
    q, first, hybrid = asked.q, asked.first, asked.hybrid
    inputs = (q, *asked.keys.values())
    record = {
        "operation": asked.operation,
        "batch": q.shape[0],
        "num_heads": q.shape[2],
        "head_dim": q.shape[3],
        "q_length": q.shape[1],
        "kv_length": first.shape[1],
        "the shape of a key": list(first.shape[2:]),
        "dtype": str(q.dtype),
        "device": q.device.type,
        # Features on the host come in chunks, for which not every schedule serves.
        "the device of the keys": first.device.type,
        "visibility": asked.visibility is not None,
        "gaps in the visibility": asked.visibility is not None and asked.visibility.has_gaps,
        "softmax_scale": asked.scale,
        "kernel": asked.kernel,
        "schedule": asked.schedule,
        "return_lse": asked.return_lse,
        "kv_chunk_tokens": asked.kv_chunk_tokens,
        "grad_enabled": torch.is_grad_enabled(),
        # Only the projection of features knows whether its parameters need a gradient: assume so.
        "requires_grad": asked.recomputes or any(tensor.requires_grad for tensor in inputs),
    }
    return record | ({} if hybrid is None else {"ulysses": hybrid.ulysses, "across": hybrid.across})


def _schedule(
    asked: _Asked,
    channel: Channel,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    *,
    backward: bool,
) -> str | None:
    """The schedule, not ``auto`` any more; None for a method without schedules."""
    if asked.schedule is None:
        return None
    _check_replicated(asked, q_lengths)
    device = asked.q.device
    # Features on the host come in chunks as well.
    apart = any(tensor.device != device for tensor in asked.keys.values())
    wanted = Wanted(
        "lvx",
        asked.schedule,
        recompute_kv=asked.recomputes,
        chunked=asked.kv_chunk_tokens is not None or apart,
        hybrid=asked.hybrid,
    )
    if wanted.is_open and channel.size > 1:
        shape = _shape(asked, q_lengths, kv_lengths, backward=backward)
        return decide(wanted, shape, channel, device).schedule
    # In a group of one every schedule is the same.
    return "gather" if asked.schedule == AUTO else asked.schedule


def _needs(operation: str, schedule: str | None) -> dict[str, bool]:
    """Whose part of the rule a rank needs: what travels meets the other ranks' part."""
    if schedule is not None and operation != "hybrid_attention":  # lvx: keys stay
        return {"all_queries": not SCHEDULES[schedule].same_queries, "all_keys": False}
    return {"all_queries": operation != "ring_attention", "all_keys": True}


def _shape(
    asked: _Asked, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], *, backward: bool
) -> AttentionShape:
    """The call as the planner is asked about it: only what is the same on every rank."""
    batch, _, heads, head_dim = asked.q.shape
    recompute = asked.recomputes
    return AttentionShape(
        batch=max(batch, 1),  # of no samples: as of one
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        heads=heads,
        # What a projection makes of its features is not known before it has run.
        kv_heads=heads if recompute else asked.first.shape[2],
        head_dim=head_dim,
        element_bytes=asked.q.element_size(),
        recompute=recompute,
        visibility=asked.visibility is not None,
        backward=backward,
        features_dim=asked.first.shape[-1] if recompute else 0,
    )


def _check_replicated(asked: _Asked, q_lengths: Sequence[int]) -> None:
    schedule = asked.schedule
    if schedule is None or schedule == AUTO or not SCHEDULES[schedule].same_queries:
        return
    if len(set(q_lengths)) > 1:
        raise ValueError(
            f"{asked.operation}: schedule {schedule!r} wants the same queries on every rank; got "
            f"seqlen_q {list(q_lengths)}; use 'ring' or 'gather' for sharded queries"
        )


def _check_chunks(kv_chunk_tokens: int | None, schedule: str | None) -> None:
    if kv_chunk_tokens is None:
        return
    if not is_count(kv_chunk_tokens):
        raise ValueError(
            f"kv_chunk_tokens: got {kv_chunk_tokens!r}; expected 1 or more tokens, or None for all "
            "at once"
        )
    if schedule is not None and not can_chunk(schedule):
        raise NotImplementedError(
            f"kv_chunk_tokens: got {kv_chunk_tokens} with schedule {schedule!r}, which needs K and "
            "V whole for every query shard that passes; use schedule 'gather' or 'auto'"
        )


def _check(asked: _Asked, ranks: int) -> Kernel:
    q, keys, schedule = asked.q, asked.keys, asked.schedule
    for name, tensor in {"q": q, **keys}.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}; expected a tensor")
        check_strided(name, tensor)
    if q.dim() != 4:
        raise ValueError(
            f"q: got shape {list(q.shape)}; expected [batch, seqlen_q, num_heads, head_dim]"
        )
    if 0 in (q.shape[2], q.shape[3]):
        raise ValueError(
            f"q: got shape {list(q.shape)}; expected at least one head and a head_dim of at least "
            "1: only the batch and the lengths may be 0"
        )
    if schedule is not None and schedule not in schedule_words():
        raise ValueError(f"schedule: got {schedule!r}; expected one of {list(schedule_words())}")
    kernel = kernel_for(asked.kernel, q)
    if "k" in keys:
        check_keys(q, keys["k"], keys["v"])
    else:
        check_features(q, keys["features"])
    if asked.visibility is not None:
        check_visibility(q, asked.first.shape[1], asked.visibility)
    _check_chunks(asked.kv_chunk_tokens, schedule)
    check_scale(asked.softmax_scale)
    check_flag("return_lse", asked.return_lse)
    if asked.hybrid is not None:
        check_hybrid(asked.hybrid, q, schedule, ranks)
    return kernel
