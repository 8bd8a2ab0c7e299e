"""Pictures as packed patches, as Qwen's towers take them.

Legend: ``h, w`` patches of a picture, ``P`` pixels of a patch by side, ``t`` frames of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

_BICUBIC = 3


@dataclass(frozen=True)
class Patches:
    """How pictures become patches.

    Attributes:
        least, most: pixels that a picture is scaled to.
        side: P.
        merge: patches of a visual token by side.
        frames: t.
        mean, deviation: of the channels.
    """

    least: int
    most: int
    side: int = 14
    merge: int = 2
    frames: int = 2
    mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    deviation: tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, least: int, most: int, side: int = 14) -> Self:
        """As an image or video processor's settings have it.

        Args:
            settings: of the checkpoint.
            least, most, side: where they do not say it.
        """
        size = settings.get("size") or {}
        return cls(
            int(settings.get("min_pixels") or size.get("shortest_edge") or least),
            int(settings.get("max_pixels") or size.get("longest_edge") or most),
            int(settings.get("patch_size", side)),
            int(settings.get("merge_size", 2)),
            int(settings.get("temporal_patch_size", 2)),
            tuple(settings.get("image_mean") or cls.mean),
            tuple(settings.get("image_std") or cls.deviation),
        )

    def within(self, least: int | None, most: int | None) -> Self:
        """The same for a picture of at least and at most so many pixels; None: as it is. Where the
        two are at odds, the one that is given counts."""
        low = self.least if least is None else least
        high = self.most if most is None else most
        if low > high:
            low, high = (low, low) if most is None else (high, high)
        return replace(self, least=low, most=high)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """``h, w`` of a picture of a size in pixels, scaled as transformers does.

        Raises:
            ValueError: it is more than 200 times as long as wide.
        """
        sides = smart_resize(height, width, self.side * self.merge, self.least, self.most)
        return sides[0] // self.side, sides[1] // self.side

    def tokens(self, grid: tuple[int, int]) -> int:
        """Visual tokens of ``h, w`` patches."""
        return grid[0] * grid[1] // self.merge**2

    def rows(self, pictures: Sequence[Any], grid: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
        """Patches of up to t frames; the last one stands in for those that are missing.

        Args:
            pictures: PIL images, at least one.
            grid: ``h, w``.
            dtype: of the result.

        Returns:
            ``[h w, 3 t P^2]``: blocks of merged patches in order, then the patches of a block; of
            each patch channels, then frames, then lines.
        """
        height, width = (count * self.side for count in grid)
        frames = [self._pixels(picture, (width, height)) for picture in pictures]
        pixels = torch.stack(frames + frames[-1:] * (self.frames - len(frames)))
        merge, side = self.merge, self.side
        blocks = pixels.view(
            self.frames, 3, grid[0] // merge, merge, side, grid[1] // merge, merge, side
        )
        return blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(grid[0] * grid[1], -1).to(dtype)

    def _pixels(self, picture: Any, sides: tuple[int, int]) -> Tensor:
        """``[3, height, width]``, normalised."""
        resized = picture.convert("RGB").resize(sides, resample=_BICUBIC)
        raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = raw.view(sides[1], sides[0], 3).permute(2, 0, 1) / 255
        mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (self.mean, self.deviation))
        return (pixels - mean) / deviation
