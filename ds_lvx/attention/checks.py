"""What a caller gives an operator, checked on its own rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_lvx.attention.shape import ACROSS, Hybrid, check_heads
from ds_lvx.config.registry import AUTO, SCHEDULES
from ds_lvx.distributed.subgroups import check_division
from ds_lvx.kernels.visibility import Visibility


def is_count(value: object) -> bool:
    """Whether a value is a whole number of 1 or more; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless a value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}; expected True or False")


def check_scale(value: object) -> None:
    """Raise a ValueError unless a value is None or a finite number above 0.

    The field's kernels hide keys by a score of -inf, and scale behind it: by a negative factor what
    is hidden is +inf, and by 0 NaN.
    """
    try:
        number = 1.0 if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 < number < math.inf:
        raise ValueError(
            f"softmax_scale: got {value!r}; expected a finite number above 0, or None for head_dim "
            "** -0.5; a sign belongs into q"
        )


def check_strided(name: str, tensor: Tensor) -> None:
    """Raise a ValueError for a sparse tensor, or another one that has no strides."""
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{name}: got a tensor of layout {tensor.layout}; expected torch.strided; convert it "
            "with .to_dense()"
        )


def check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a ValueError unless k and v fit q."""
    batch, _, heads, head_dim = q.shape
    for name, tensor in {"k": k, "v": v}.items():
        check_strided(name, tensor)
        fits = tensor.dim() == 4 and tensor.shape[0] == batch and tensor.shape[3] == head_dim
        if not fits:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)} for q {list(q.shape)}; expected "
                f"[{batch}, seqlen_kv, num_kv_heads, {head_dim}]"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} on {tensor.device} for q {q.dtype} on {q.device}; "
                "expected the same dtype and device; convert one with .to(...)"
            )
    if k.shape != v.shape:
        raise ValueError(
            f"v: got shape {list(v.shape)} for k {list(k.shape)}; expected the same shape"
        )
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(
            f"k, v: got {k.shape[2]} heads for {heads} query heads; expected a divisor of {heads}"
        )


def check_features(q: Tensor, features: Tensor) -> None:
    """Raise a ValueError unless features fit q."""
    elsewhere = features.device != q.device and features.device.type != "cpu"
    if features.dim() < 2 or features.shape[0] != q.shape[0] or elsewhere:
        raise ValueError(
            f"features: got shape {list(features.shape)} on {features.device} for q "
            f"{list(q.shape)} on {q.device}; expected [{q.shape[0]}, seqlen_kv, ...] on the same "
            "device or on the host"
        )


def check_visibility(q: Tensor, seqlen_kv: int, visibility: Visibility) -> None:
    """Raise a ValueError unless the rule is for these queries and keys."""
    if not isinstance(visibility, Visibility):
        raise ValueError(
            f"visibility: got {type(visibility).__name__}; expected ds_lvx.Visibility or None"
        )
    wanted = (q.shape[0], q.shape[1])
    if tuple(visibility.q_start.shape) != wanted or visibility.q_start.device != q.device:
        raise ValueError(
            f"visibility: got q_start {list(visibility.q_start.shape)} on "
            f"{visibility.q_start.device} for q {list(q.shape)} on {q.device}; expected "
            f"{list(wanted)}, this rank's queries, on q's device"
        )
    if visibility.kv_pos.shape[1] != seqlen_kv:
        raise ValueError(
            f"visibility: got kv_pos {list(visibility.kv_pos.shape)} for {seqlen_kv} keys; "
            "expected one position a key of this rank"
        )


def check_hybrid(hybrid: Hybrid, q: Tensor, schedule: str | None, ranks: int) -> None:
    """Raise a ValueError unless a group of so many ranks can run this hybrid."""
    if not is_count(hybrid.ulysses):
        raise ValueError(
            f"ulysses: got {hybrid.ulysses!r}; expected the ranks of a subgroup, 1 or more"
        )
    if hybrid.across not in ACROSS:
        raise ValueError(f"across: got {hybrid.across!r}; expected one of {list(ACROSS)}")
    if hybrid.across == "ring" and schedule not in (None, AUTO):
        raise ValueError(
            f"schedule: got {schedule!r} with across 'ring', which has no schedules; use across "
            "'lvx', or leave schedule out"
        )
    check_division(ranks, hybrid.ulysses)
    check_heads(q.shape[2], hybrid.ulysses)
    if schedule is not None and schedule != AUTO and SCHEDULES[schedule].same_queries:
        raise ValueError(
            f"hybrid_attention: got schedule {schedule!r}; expected 'ring', 'gather' or 'auto'"
        )
