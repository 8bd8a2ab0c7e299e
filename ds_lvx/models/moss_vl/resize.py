"""How large MOSS-VL makes a frame. Imports no torch.

Sides are multiples of 32 pixels, a visual token's. The frames of a sample share a budget of pixels:
the more there are, the smaller each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Pixels that frames may have.

    Attributes:
        least, most: of a frame.
        total: of all frames of a sample.
    """

    least: int = 4_096
    most: int = 16_777_216
    total: int = 201_326_592

    def sides(self, height: int, width: int, *, frames: int, multiple: int) -> tuple[int, int]:
        """Height and width of one of ``frames`` frames, from those of the picture.

        Args:
            height, width: in pixels.
            frames: of the sample.
            multiple: of both sides.
        """
        return fitted(
            height,
            width,
            multiple=multiple,
            least=self.least,
            most=min(self.most, self.total // max(frames, 1)),
        )


def fitted(height: int, width: int, *, multiple: int, least: int, most: int) -> tuple[int, int]:
    """Sides of about the same shape, multiples of ``multiple``, with a bounded number of pixels.

    The lower bound goes first: a frame has at least one token.
    """
    tall, wide = (max(round(side / multiple), 1) * multiple for side in (height, width))
    if tall * wide > most:
        shrink = math.sqrt(height * width / most)
        tall, wide = (
            max(math.floor(side / shrink / multiple), 1) * multiple for side in (height, width)
        )
    if tall * wide < least:
        grow = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * grow / multiple) * multiple for side in (height, width))
    return tall, wide
