"""Images whose tokens see each other in both directions: where what each token sees ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.text import described, is_integer


def token_types(batch: Mapping[str, Any], key: str, ids: Tensor) -> Tensor | None:
    """What a batch says of the kind of each token, int ``[B, T]`` on the CPU; None: nothing.

    Args:
        batch: what the caller gave.
        key: of its entry.
        ids: int64 ``[B, T]``.

    Raises:
        ValueError: an entry of another shape than ``ids``.
    """
    types = batch.get(key)
    if types is None:
        return None
    if not is_integer(types) or types.shape != ids.shape:
        raise ValueError(
            f"got {key} {described(types)}; expected integers of the shape of input_ids, "
            f"{tuple(ids.shape)}: the whole sequence, as the processor returns it"
        )
    found: Tensor = types.cpu()
    return found


def ends_of_runs(inside: Tensor) -> Tensor:
    """int64 ``[B, T]``, one past the last place that each token sees: of a run's its end, of others
    their own.

    Args:
        inside: bool ``[B, T]`` on the CPU, runs of tokens that see each other.
    """
    length = inside.shape[1]
    behind = torch.arange(1, length + 1, device="cpu")
    # The next place that is in no run is where a run ends.
    stops = torch.where(inside, length, behind - 1)
    of_runs = stops.flip(1).cummin(dim=1).values.flip(1)
    return torch.maximum(of_runs, behind)
