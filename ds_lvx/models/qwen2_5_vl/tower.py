"""What Qwen's towers make of the grids of their pictures, made with the batch, and handed to them.

A tower would read its grids on the device for it, and the host would wait. What it takes there is a
tensor, and goes along with the pixels; what the host reads, where pictures end, is a tuple.

Legend: ``N`` patches of all pictures, ``m`` merged ones by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ds_lvx.kernels.transfer import to_device
from ds_lvx.models.visual import PIXELS

GRID = "image_grid_thw"
_OURS = "tower_"
"""Before the names of the tower's keywords, of which the text has some as well."""
_ENDS = "cu_"

Follow: TypeAlias = Callable[[Tensor], dict[str, Any]]
"""A grid int64 ``[pictures, 3]`` on the CPU -> what a tower makes of it, by its keywords. It
pickles."""


def whole(grid: Tensor, *, merge: int | Tensor) -> dict[str, Any]:
    """`Follow` of Qwen2-VL's, whose layers see a whole picture each.

    Args:
        grid: see `Follow`.
        merge: patches of a visual token by side; or of each picture's, int64 ``[pictures]``.
    """
    return {
        "position_ids": get_vision_position_ids(grid, merge),  # [N, 2]
        "cu_seqlens": tuple(get_vision_cu_seqlens(grid).tolist()),
    }


def windows(grid: Tensor, *, merge: int, window: int, patch: int) -> dict[str, Any]:
    """`Follow` of Qwen2.5-VL's.

    Args:
        grid: see `Follow`.
        merge: patches of a visual token by side.
        window, patch: their sides in pixels.
    """
    order, ends = get_vision_window_index(grid, merge, window, patch)
    return {
        **whole(grid, merge=merge),
        "window_index": order,  # [N / m^2]
        "cu_window_seqlens": tuple(ends.tolist()),
    }


def interpolated(grid: Tensor, *, merge: int, side: int) -> dict[str, Any]:
    """`Follow` of Qwen3-VL's, whose positions are between those of a table of ``side`` squared."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, side, align_corners=True, spatial_merge_size=merge
    )
    return {
        **whole(grid, merge=merge),
        "interp_indices": indices,
        "interp_weights": weights,
    }  # [N, 4]


def arguments(grid: Sequence[Sequence[int]], follow: Follow) -> dict[str, Any]:
    """The model's arguments of pictures of ``t, h, w`` patches each, beside their pixels."""
    made = follow(torch.tensor(grid))
    return {GRID: tuple(map(tuple, grid)), **{_OURS + key: value for key, value in made.items()}}


def names(*keywords: str) -> tuple[str, ...]:
    """`arguments` of the tower's keywords."""
    return (PIXELS, GRID, *(_OURS + key for key in keywords))


def run(tower: Any, given: Mapping[str, Any]) -> Any:
    """What a tower returns; the host waits for nothing.

    Args:
        tower: of the model.
        given: pixels and `arguments`.
    """
    pixels, grid = given[PIXELS].type(tower.dtype), torch.tensor(given[GRID], device="cpu")
    made = {k.removeprefix(_OURS): each for k, each in given.items() if k.startswith(_OURS)}
    flash = is_flash_attention_requested(tower.config)
    for key, ends in [pair for pair in made.items() if isinstance(pair[1], tuple)]:
        made[key] = torch.tensor(ends, dtype=torch.int32, device="cpu")
        # Its kernel reads them on the device, and has to be told what is longest.
        if flash and key.startswith(_ENDS):
            made[key] = to_device(made[key], pixels.device)
            longest = max(end - start for start, end in pairwise(ends))
            made[key.replace(_ENDS, "max_").removesuffix("s")] = longest
    return tower(pixels, grid_thw=grid, return_dict=True, **made)
