"""LLaVA-OneVision's tower, and how its features become tokens.

As the model's own ``get_image_features``, which tells the device lengths that the host knows, and
waits for that. Legend: ``P`` patches of a tile by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from ds_lvx.models.llava_onevision.batch import scaled, side


def encoded(module: Any, pixels: Tensor) -> Tensor:
    """Features of tiles ``[tiles, 3, H, W]``: ``[tiles, P^2, hidden]``."""
    chosen = module.config.vision_feature_layer
    states = module.vision_tower(
        pixels, output_hidden_states=chosen, return_dict=True
    ).hidden_states
    layers = [chosen] if isinstance(chosen, int) else chosen
    features: Tensor = module.multi_modal_projector(torch.cat([states[n] for n in layers], dim=-1))
    return features


def packed(module: Any, tiles: Tensor, size: Sequence[int]) -> Tensor:
    """The tokens of an image, ``[tokens, hidden]``: of the whole, then lines without padding.

    Args:
        module: that has the newline.
        tiles: ``[tiles, P^2, hidden]``; one that is alone has one newline.
        size: height and width of the image.
    """
    config, newline = module.config, module.image_newline.to(tiles)
    if len(tiles) == 1:
        return torch.cat((tiles[0], newline[None]))
    each = side(config)
    rows, columns = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    grid = tiles[1:].view(rows, columns, each, each, -1).permute(4, 0, 2, 1, 3)
    grid = unpad_image(grid.reshape(-1, rows * each, columns * each), size)
    height, width = scaled(grid.shape[1:], config)
    if (height, width) != tuple(grid.shape[1:]):
        grid = torch.nn.functional.interpolate(grid[None], [height, width], mode="bilinear")[0]
    lines = torch.cat((grid, newline[:, None, None].expand(-1, height, 1)), dim=-1)
    return torch.cat((tiles[0], lines.flatten(1).T))
