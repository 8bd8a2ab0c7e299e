"""One attention by each method: by its public function, or with a kernel that notes its calls.

All that a comparison needs of `ds_lvx.attention` and of kernels is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

import ds_lvx
from ds_lvx.attention import recompute
from ds_lvx.attention.call import Call, settle
from ds_lvx.attention.common import LocalAttention
from ds_lvx.attention.layout import Layout
from ds_lvx.compare.harness import METHODS
from ds_lvx.compare.operators.tensors import Shards
from ds_lvx.config import registry
from ds_lvx.distributed.bundles import Spec
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.rule import Rule

_NOTED = ("forward", "fold", "backward")


class NotingKernel:
    """A kernel that also notes its calls, so that they can be made again without communication.

    Of tensors that look alike only the first is kept, for all of them: a time does not depend on
    the values, and the shards of all ranks need not fit in one.

    Args:
        kernel: who computes.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.calls: list[Callable[[], Any]] = []
        self._kernel = kernel
        self._kept: dict[Any, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernel, name)
        return partial(self._note, name, found) if name in _NOTED else found

    def _note(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        # Again it is to write to new memory, as a step does; what was written before is at hand.
        noted = {key: value for key, value in options.items() if key != "into"}
        places = [self._keep(place, argument) for place, argument in enumerate(args)]
        self.calls.append(partial(function, *places, **noted))
        return function(*args, **options)

    def _keep(self, place: int, argument: Any) -> Any:
        """The argument with tensors of ours; those that the call changes must be nobody else's."""
        changes = isinstance(argument, tuple)  # the running result of fold

        def kept(part: Any, name: str = "") -> Any:
            if not isinstance(part, Tensor):
                return part
            # A tensor takes the place of those that look alike, in the same place of a call.
            own = part.detach().clone() if changes else part.detach()
            return self._kept.setdefault((place, name, changes, Spec.of(part)), own)

        if is_dataclass(argument) and not isinstance(argument, type):
            parts = {each.name: getattr(argument, each.name) for each in fields(argument)}
            return replace(argument, **{name: kept(part, name) for name, part in parts.items()})
        return tuple(kept(part, str(index)) for index, part in enumerate(argument))

    def repeat(self, first: int, last: int | None = None) -> None:
        """Make calls ``first`` to ``last`` again, the last one excluded."""
        for call in self.calls[first:last]:
            call()


def recomputes(method: str, recompute_kv: bool) -> bool:
    """Whether a method projects K and V again in backward."""
    return recompute_kv and METHODS[method][0] == "lvx"


def attend(method: str, shards: Shards, *, kernel: str, recompute_kv: bool) -> Tensor:
    """The output by the public function of a method; on every rank, but for ``none``."""
    name, schedule = METHODS[method]
    if name == "none":
        return settled(method, shards, kernel_for(kernel, shards.q), recompute_kv=recompute_kv)[0]
    seen: dict[str, Any] = {"visibility": shards.visibility, "kernel": kernel}
    if recomputes(method, recompute_kv):
        features = shards.keys["features"]
        return ds_lvx.lv_xattn_recompute(
            shards.q, features, shards.project, schedule=str(schedule), **seen
        )
    tensors = (shards.q, *shards.k_and_v())
    if name == "lvx":
        return ds_lvx.lv_xattn(*tensors, schedule=str(schedule), **seen)
    function = ds_lvx.ring_attention if name == "ring" else ds_lvx.ulysses_attention
    return function(*tensors, **seen)


def settled(
    method: str, shards: Shards, kernel: Any, *, recompute_kv: bool
) -> tuple[Tensor, str | None]:
    """The same by the inner function, with a kernel of one's own; and the schedule of lvx."""
    name, _ = METHODS[method]
    if name == "none":
        call = _alone(shards, kernel)
        return LocalAttention.apply(call, shards.q, *shards.k_and_v())[0], None
    if recomputes(method, recompute_kv):
        features = shards.keys["features"]
        call = _call(method, shards, {"features": features}, kernel)
        found = recompute.attend_recompute(call, shards.q, features, shards.project)
        return found[0], call.schedule
    k, v = shards.k_and_v()
    call = _call(method, shards, {"k": k, "v": v}, kernel)
    entry = registry.METHODS[name]
    out: Tensor = entry.load()(call, shards.q, k, v)[0]
    return out, call.schedule if entry.has_schedules else None


def _call(method: str, shards: Shards, keys: dict[str, Tensor], kernel: Any) -> Call:
    call = settle(
        "compare",
        shards.q,
        keys,
        group=None,
        visibility=shards.visibility,
        softmax_scale=None,
        kernel=kernel.name,
        schedule=METHODS[method][1],
    )
    return replace(call, kernel=kernel)


def _alone(shards: Shards, kernel: Any) -> Call:
    _, seqlen_q, _, head_dim = shards.q.shape
    seqlen_kv = next(iter(shards.keys.values())).shape[1]
    rule = None if shards.visibility is None else Rule(shards.visibility)
    return Call(
        Layout(Channel(None), (seqlen_q,), (seqlen_kv,), rule, device=shards.q.device),
        kernel=kernel,
        softmax_scale=head_dim**-0.5,
        requires_grad=True,
    )
