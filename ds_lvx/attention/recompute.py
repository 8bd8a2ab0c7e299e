"""lvx with K and V projected again in backward: nothing of their size is kept.

The cross-attention layers of these models project K and V from one shared visual tensor. A layer
keeps q, out, lse and a reference to that tensor; backward runs the projection again, under the
transfer of the queries, and pushes dk and dv through it while dq is on its way home, so that the
parameters' own hooks fire (ZeRO 1, 2 and 3 depend on them). LV-XAttn, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import get_device_states, set_device_states

from ds_lvx.attention.call import Call, Group, check_keys, check_visibility, settle
from ds_lvx.attention.lvx import saved_for
from ds_lvx.attention.schedules import SCHEDULES
from ds_lvx.comm import Channel
from ds_lvx.visibility import Visibility

ProjectKV: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


@overload
def lv_xattn_recompute(
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def lv_xattn_recompute(
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    group: Group = ...,
    visibility: Visibility | None = ...,
    softmax_scale: float | None = ...,
    schedule: str = ...,
    kernel: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def lv_xattn_recompute(
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    *,
    group: Group = None,
    visibility: Visibility | None = None,
    softmax_scale: float | None = None,
    schedule: str = "auto",
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lv_xattn` over ``project_kv(features)``, which runs again in backward instead of being kept.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``, this rank's queries.
        features: ``[batch, seqlen_kv, ...]``, this rank's visual features, shared by all layers.
        project_kv: ``features -> (k, v)``, each ``[batch, seqlen_kv, num_kv_heads, head_dim]`` in
            q's dtype. It runs once in forward and once in backward, with the same random numbers
            and autocast. Parameters that it uses get their gradients in ``.grad``, by way of
            ``torch.autograd.backward`` (``torch.autograd.grad`` does not see them). Anything else
            that needs a gradient must come in through ``features``.
        group, visibility, softmax_scale, schedule, kernel, return_lse: as in `lv_xattn`.

    Returns:
        As `lv_xattn`. Gradients reach q, features, and every parameter that ``project_kv`` uses.

    Raises:
        ValueError, NotImplementedError: bad arguments of any rank, on every rank; also keys of
            another shape, or an error, from the ``project_kv`` of any rank.

    Collectives: those of `lv_xattn`, the first under the projection, in backward the last as well;
    and an agreement of 2 KiB on the CPU after the projection in forward.
    Kept for backward: q, out, lse, the state of the random generators, and references to features
    and visibility.

    Source: the paper's section 3.2.
    """
    call = settle(
        "lv_xattn_recompute",
        q,
        {"features": features},
        group=group,
        visibility=visibility,
        softmax_scale=softmax_scale,
        kernel=kernel,
        schedule=schedule,
        return_lse=return_lse,
    )
    # Ranks that agree on a call may still project something else.
    checked = _agreeing(call.channel, project_kv, q, visibility)
    out, lse = attend_recompute(call, q, features, checked, visibility)
    return (out, lse) if return_lse else out


def attend_recompute(
    call: Call,
    q: Tensor,
    features: Tensor,
    project_kv: ProjectKV,
    visibility: Visibility | None,
) -> tuple[Tensor, Tensor]:
    """`lv_xattn_recompute` for a call that is settled: ``(out, lse)``.

    The call must be settled with ``requires_grad`` wherever gradients are enabled: only the
    projection knows whether its parameters need one.
    """
    out, lse = _LVXRecompute.apply(call, visibility, project_kv, call.anchor(q.device), q, features)
    return out, lse


class _LVXRecompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        visibility: Visibility | None,
        project_kv: ProjectKV,
        anchor: Tensor,
        q: Tensor,
        features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.setting = _Setting(features) if call.requires_grad else None

        out, lse = SCHEDULES[call.schedule].forward(
            call, q, visibility, lambda: project_kv(features)
        )
        out = out.to(q.dtype)
        ctx.save_for_backward(q, features, out, lse)
        ctx.call, ctx.visibility, ctx.project_kv = call, visibility, project_kv
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, features, out, lse = ctx.saved_tensors
        leaf = features.detach().requires_grad_(ctx.needs_input_grad[5])
        projected: list[Tensor] = []

        def source() -> tuple[Tensor, Tensor]:
            with torch.enable_grad(), ctx.setting.restored():
                projected.extend(ctx.project_kv(leaf))
            k, v = projected
            return k.detach(), v.detach()

        def sink(dk: Tensor, dv: Tensor) -> None:
            # Edges of the graph, not its tensors: K and V themselves are needed no more.
            pairs = [
                (get_gradient_edge(tensor), gradient)
                for tensor, gradient in zip(projected, (dk, dv), strict=True)
                if tensor.requires_grad
            ]
            projected.clear()
            if pairs:
                torch.autograd.backward([edge for edge, _ in pairs], [g for _, g in pairs])

        dq = SCHEDULES[ctx.call.schedule].backward(
            ctx.call, saved_for(q, out, lse, dout, dlse), ctx.visibility, source, sink
        )
        return None, None, None, None, dq.to(q.dtype), leaf.grad


def _agreeing(
    channel: Channel, project_kv: ProjectKV, q: Tensor, visibility: Visibility | None
) -> ProjectKV:
    """``project_kv`` whose first run, in forward, ends on all ranks alike."""
    agreed = False

    def projection(features: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal agreed
        if agreed:
            return project_kv(features)
        projected, error = None, None
        try:
            projected = _checked(q, visibility, project_kv(features))
        # Whatever it is: the other ranks must not wait for this one.
        except Exception as raised:  # noqa: BLE001
            error = raised
        channel.agree({}, error)
        agreed = True
        assert projected is not None
        return projected

    return projection


def _checked(
    q: Tensor, visibility: Visibility | None, projected: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    try:
        k, v = projected
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"project_kv: got {type(projected).__name__}; expected it to return (k, v)"
        ) from error
    check_keys(q, k, v)
    if visibility is not None:
        check_visibility(q, k.shape[1], visibility)
    return k, v


class _Setting:
    """Random state and autocast of forward's projection, for the one in backward."""

    def __init__(self, features: Tensor) -> None:
        self._device = features.device.type
        self._cpu_state = torch.get_rng_state()
        self._devices, self._states = get_device_states(features)
        self._autocast = (
            torch.is_autocast_enabled(self._device),
            torch.get_autocast_dtype(self._device),
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run with forward's random numbers and autocast; leave the generators as they are."""
        enabled, dtype = self._autocast
        devices = self._devices if self._device != "cpu" else []
        with (
            torch.random.fork_rng(devices=devices, device_type=_fork_type(self._device)),
            torch.autocast(self._device, dtype=dtype, enabled=enabled),
        ):
            torch.set_rng_state(self._cpu_state)
            if devices:
                set_device_states(self._devices, self._states, device_type=self._device)
            yield


def _fork_type(device: str) -> str:
    # fork_rng asks for a device module even when there are no devices to fork.
    return "cuda" if device == "cpu" else device
