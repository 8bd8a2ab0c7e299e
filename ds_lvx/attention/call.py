"""One attention call: the layout of its batch, and what its layer adds to it.

What ranks disagree on would hang or corrupt. `settle` asks the other ranks, once, on the control
plane, and makes the layout of a bare operator's call. A patched model has a layout with its batch,
and asks nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.auto import Wanted, decide
from ds_lvx.attention.checks import (
    check_features,
    check_flag,
    check_hybrid,
    check_keys,
    check_strided,
    check_visibility,
    is_count,
)
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.order import Arrival
from ds_lvx.attention.replay import once, recording, replaying
from ds_lvx.attention.shape import AttentionShape, Hybrid
from ds_lvx.attention.witness import Witness
from ds_lvx.config.registry import AUTO, SCHEDULES, can_chunk, schedule_words
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel, ProcessGroup
from ds_lvx.distributed.groups import SequenceParallelGroups, resolve
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel, Problem
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility

Group = ProcessGroup | SequenceParallelGroups | None


@dataclass(frozen=True)
class Call:
    """A call as all ranks agree on it; the same on all of them but for ``channel.rank``.

    Attributes:
        layout: who holds and who sees what.
        kernel: who computes a block.
        softmax_scale: factor on the scores.
        schedule: lvx's way to move queries, not ``auto`` any more; ignored by other methods.
        requires_grad: some rank needs a gradient, so every rank takes part in backward.
        returns_lse: lse is an output that may get a gradient of its own.
        witness: what travels with the parts of the schedule ``replicated``.
        hybrid: the subgroups inside which heads are split, if that is the method.
    """

    layout: Layout
    kernel: Kernel
    softmax_scale: float
    schedule: str = "gather"
    requires_grad: bool = False
    returns_lse: bool = False
    witness: Witness | None = None
    hybrid: Hybrid | None = None

    @property
    def channel(self) -> Channel:
        """The ranks that share the sequence."""
        return self.layout.channel

    @property
    def q_lengths(self) -> tuple[int, ...]:
        """Queries of every rank."""
        return self.layout.q_lengths

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """Keys of every rank."""
        return self.layout.kv_lengths

    def across(self, batch: int) -> tuple[Call, Arrival]:
        """The same call over a hybrid's subgroups: each is one rank, with some of the heads; and
        how tokens arrive there."""
        assert self.hybrid is not None
        layout, arrival = self.layout.across(self.hybrid, batch)
        return replace(self, layout=layout, hybrid=None), arrival

    def problem(
        self, q: Tensor, k: Tensor, v: Tensor, rule: Rule | None, *, partial: bool = False
    ) -> Problem:
        """What its kernel is asked for one block."""
        return Problem(q, k, v, rule, softmax_scale=self.softmax_scale, partial=partial)

    def anchor(self, device: torch.device) -> Tensor:
        """An input that makes the output of a Function require a gradient on every rank or on none.

        A rank whose own q, k and v need none would otherwise stay out of backward's collectives.
        """
        return torch.empty((), device=device, requires_grad=self.requires_grad)


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
    call = once(
        operation,
        lambda: _settle(
            operation,
            q,
            keys,
            channel=resolve(group),
            visibility=visibility,
            softmax_scale=softmax_scale,
            kernel=kernel,
            schedule=schedule,
            return_lse=return_lse,
            kv_chunk_tokens=kv_chunk_tokens,
            hybrid=hybrid,
        ),
    )
    # A checkpoint's first pass may run without gradients; its second has them, on every rank.
    return replace(call, requires_grad=True) if replaying() else call


def _settle(
    operation: str,
    q: Tensor,
    keys: Mapping[str, Tensor],
    *,
    channel: Channel,
    visibility: Visibility | None,
    softmax_scale: float | None,
    kernel: str,
    schedule: str | None,
    return_lse: bool,
    kv_chunk_tokens: int | None,
    hybrid: Hybrid | None,
) -> Call:
    error: Exception | None = None
    record: dict[str, Any] = {}
    try:
        chosen = _check(q, keys, visibility, kernel=kernel, schedule=schedule)
        _check_chunks(kv_chunk_tokens, schedule)
        check_flag("return_lse", return_lse)
        if hybrid is not None:
            check_hybrid(hybrid, q, schedule, channel.size)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        record = _signature(operation, q, keys, visibility)
        record |= {"softmax_scale": scale, "kernel": kernel, "schedule": schedule}
        record |= {"return_lse": return_lse, "grad_enabled": torch.is_grad_enabled()}
        record |= {"kv_chunk_tokens": kv_chunk_tokens}
        record |= {} if hybrid is None else {"ulysses": hybrid.ulysses, "across": hybrid.across}
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as raised:  # noqa: BLE001
        error = raised
    # The operation first: where ranks call different ones, nothing else is comparable.
    same = ["operation", *sorted(record.keys() - {"operation", "q_length", "kv_length"})]
    # Only the projection of features knows whether its parameters need a gradient: assume so.
    record["requires_grad"] = "features" in keys or any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (q, *keys.values())
    )
    records = channel.agree(record, error)
    require_same(records, same, what=operation)
    q_lengths = tuple(other["q_length"] for other in records)
    kv_lengths = tuple(other["kv_length"] for other in records)
    requires_grad = torch.is_grad_enabled() and any(r["requires_grad"] for r in records)
    if schedule is not None:
        _check_replicated(operation, schedule, q_lengths)
        # A checkpoint's first pass may run without gradients; both have to decide alike.
        backward = requires_grad or recording()
        shape = _shape(q, keys, q_lengths, kv_lengths, visibility, backward=backward)
        # Features on the host come in chunks as well.
        chunked = kv_chunk_tokens is not None or any(t.device != q.device for t in keys.values())
        wanted = Wanted(
            "lvx", schedule, recompute_kv="features" in keys, chunked=chunked, hybrid=hybrid
        )
        choice = decide(wanted, shape, channel, q.device)
        if choice is not None:
            schedule = choice.schedule
        elif schedule == AUTO:  # a group of one, where every schedule is the same
            schedule = "gather"
    layout = Layout.of_call(
        channel,
        q_lengths,
        kv_lengths,
        visibility,
        device=q.device,
        **_needs(operation, schedule),
    )
    return Call(
        layout,
        kernel=chosen,
        softmax_scale=scale,
        schedule="gather" if schedule is None else schedule,
        requires_grad=requires_grad,
        returns_lse=return_lse,
        hybrid=hybrid,
    )


def _needs(operation: str, schedule: str | None) -> dict[str, bool]:
    """Whose part of the rule a rank needs: what travels meets the other ranks' part."""
    if schedule is not None and operation != "hybrid_attention":  # lvx: keys stay
        return {"all_queries": not SCHEDULES[schedule].same_queries, "all_keys": False}
    return {"all_queries": operation != "ring_attention", "all_keys": True}


def _shape(
    q: Tensor,
    keys: Mapping[str, Tensor],
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    visibility: Visibility | None,
    *,
    backward: bool,
) -> AttentionShape:
    """The call as the planner is asked about it: only what is the same on every rank."""
    batch, _, heads, head_dim = q.shape
    features = keys.get("features")
    return AttentionShape(
        batch=max(batch, 1),  # of no samples: as of one
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        heads=heads,
        # What a projection makes of its features is not known before it has run.
        kv_heads=heads if features is not None else keys["k"].shape[2],
        head_dim=head_dim,
        element_bytes=q.element_size(),
        recompute=features is not None,
        visibility=visibility is not None,
        backward=backward,
        features_dim=0 if features is None else features.shape[-1],
    )


def _check_replicated(operation: str, schedule: str, q_lengths: tuple[int, ...]) -> None:
    same = schedule != AUTO and SCHEDULES[schedule].same_queries
    if same and len(set(q_lengths)) > 1:
        raise ValueError(
            f"{operation}: schedule {schedule!r} wants the same queries on every rank; got "
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


def _signature(
    operation: str, q: Tensor, keys: Mapping[str, Tensor], visibility: Visibility | None
) -> dict[str, Any]:
    first = next(iter(keys.values()))
    return {
        "operation": operation,
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
        "visibility": visibility is not None,
    }


def _check(
    q: Tensor,
    keys: Mapping[str, Tensor],
    visibility: Visibility | None,
    *,
    kernel: str,
    schedule: str | None,
) -> Kernel:
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
    chosen = kernel_for(kernel, q)
    if "k" in keys:
        check_keys(q, keys["k"], keys["v"])
    else:
        check_features(q, keys["features"])
    if visibility is not None:
        check_visibility(q, next(iter(keys.values())).shape[1], visibility)
    return chosen
