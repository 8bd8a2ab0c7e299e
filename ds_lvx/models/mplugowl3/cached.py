"""The text of mPLUG-Owl3 in generation: whole on every rank, with transformers' cache.

The keys of the text so far are the same on every rank, and each attends to them by itself; in a
hyper layer they are one part of a softmax whose other part is that of the images, of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ds_lvx.models import cached


@dataclass(frozen=True, eq=False)
class Cached(cached.Cached):
    """What a layer attends by in a forward of generation.

    Attributes:
        norm: of the layer, through which features go before they are K and V of images.
    """

    norm: nn.Module
