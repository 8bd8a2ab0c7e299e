"""The positions of GLM-4.1V's tower, which it interpolates for the grid of each picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ds_lvx.kernels.transfer import to_device
from ds_lvx.models.patch import Hook


class SizeRows(Hook):
    """A forward pre-hook of the tower's position embeddings: patches find their picture's size by
    the rows of the grid.

    The model compares every patch with every picture for it. Pictures of one size share a row here;
    lengths and grid, which the host knows, go to the device.
    """

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        patches, _, grid, *places = args
        grid = to_device(grid, patches.device)
        return patches, grid.prod(dim=1), grid, *places
