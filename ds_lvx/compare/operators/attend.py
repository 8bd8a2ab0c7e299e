"""One attention by each method, with a kernel that may note its calls.

All that a comparison needs of `ds_lvx.attention` and of kernels is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention import recompute
from ds_lvx.attention.call import Call
from ds_lvx.attention.common import LocalAttention
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.sequence import gather_sequence
from ds_lvx.attention.settle import settle
from ds_lvx.compare.harness import GATHERED, METHODS
from ds_lvx.compare.operators.tensors import Shards
from ds_lvx.config import registry
from ds_lvx.distributed.bundles import Spec
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility

_OPERATIONS = {"lvx": "lv_xattn", "ring": "ring_attention", "ulysses": "ulysses_attention"}
_NOTED = ("forward", "fold", "backward")


class NotingKernel:
    """A kernel that also notes its calls, so that they can be made again without communication.

    Of tensors that look alike only the first is kept, for all of them: a time does not depend on
    the values, and the shards of all ranks need not fit in one.
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

        def kept(name: str | int, part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            # A tensor takes the place of those that look alike, in the same place of a call.
            own = part.detach().clone() if changes else part.detach()
            return self._kept.setdefault((place, name, Spec.of(part)), own)

        if changes:
            return tuple(kept(index, part) for index, part in enumerate(argument))
        parts = {name: kept(name, part) for name, part in vars(argument).items()}
        return replace(argument, **parts)

    def repeat(self, first: int, last: int | None = None) -> None:
        """Make calls ``first`` to ``last`` again, the last one excluded."""
        for call in self.calls[first:last]:
            call()


def recomputes(method: str, recompute_kv: bool) -> bool:
    """Whether a method projects K and V again in backward."""
    return recompute_kv and METHODS[method][0] == "lvx"


def attend(
    method: str, shards: Shards, kernel: Any, *, recompute_kv: bool
) -> tuple[Tensor, str | None]:
    """The output by a method, as its public function makes it, and the schedule that lvx took.

    For ``none`` the shards are those of the whole sequence. K and V are projected again where the
    method can.

    Collectives: the method's, and one agreement; none for ``none``.
    """
    name, schedule = METHODS[method]
    if name in ("none", GATHERED):
        gathered = name == GATHERED
        k, v = _gathered(shards) if gathered else shards.k_and_v()
        sees = shards.over_all if gathered else shards.visibility
        return LocalAttention.apply(_alone(shards.q, k, sees, kernel), shards.q, k, v)[0], None
    again = recomputes(method, recompute_kv)
    if again:
        keys = {"features": shards.keys["features"]}
    else:
        keys = dict(zip("kv", shards.k_and_v(), strict=True))
    call = settle(
        _OPERATIONS.get(name, name),
        shards.q,
        keys,
        group=None,
        visibility=shards.visibility,
        softmax_scale=None,
        kernel=kernel.name,
        schedule=schedule,
    )
    call = replace(call, kernel=kernel)
    if again:
        out, _ = recompute.attend_recompute(call, shards.q, keys["features"], shards.project)
    else:
        out = registry.METHODS[name].load()(call, shards.q, keys["k"], keys["v"])[0]
    return out, None if schedule is None else call.schedule


def _gathered(shards: Shards) -> tuple[Tensor, Tensor]:
    """K and V of all ranks, on every rank: of all features, where they are projected."""
    if shards.is_projected:
        return shards.project(gather_sequence(shards.keys["features"]))
    k, v = gather_sequence(torch.cat(shards.k_and_v(), dim=2)).chunk(2, dim=2)
    return k, v


def _alone(q: Tensor, k: Tensor, visibility: Visibility | None, kernel: Any) -> Call:
    head_dim = q.shape[3]
    rule = None if visibility is None else Rule(visibility)
    return Call(
        Layout(Channel(None), q.shape[1:2], k.shape[1:2], rule, device=q.device),
        kernel=kernel,
        softmax_scale=head_dim**-0.5,
        requires_grad=True,
    )
