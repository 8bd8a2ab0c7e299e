"""Text and pixels for Qwen3-VL, from the files of a checkpoint: as Qwen2.5-VL's, but a video's text
says the time of every two frames, and a video's pixels are counted over all of its frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from ds_lvx.models.media import Medium
from ds_lvx.models.qwen2_5_vl import processor as qwen

_CAP_TOKENS = 768


class Processor(qwen.Processor):
    """See `ds_lvx.models.qwen2_5_vl.processor.Processor`; ``video_pixels`` are of a whole video."""

    image_pixels = (256 * 256, 4096 * 4096)
    video_pixels = (128 * 32 * 32, 768 * 32 * 32)
    settings: Mapping[str, Any] = MappingProxyType(
        {"patch_size": 16, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    )
    says_seconds = False  # they stand in the text

    def written(self, times: Sequence[float]) -> str:
        """The time of each temporal patch, between its first and last frame, and its token."""
        each, last = self.videos.frames, len(times) - 1
        patches = [(times[n], times[min(n + each - 1, last)]) for n in range(0, len(times), each)]
        token = f"{qwen.START}{qwen.VIDEO_TOKEN}{qwen.END}"
        return "".join(f"<{(first + end) / 2:.1f} seconds>{token}" for first, end in patches)

    def grid(self, medium: Medium) -> tuple[int, int]:
        """``h, w`` in patches of an image, or of a frame of a video: the longer, the smaller.

        Raises:
            ValueError: it is more than 200 times as long as wide.
        """
        if medium.times is None:
            return super().grid(medium)
        patches, count = self.videos, max(len(medium.times), self.videos.frames)
        factor, least, most = patches.side * patches.merge, patches.least, patches.most
        if self.of_videos.get("cap_pixels_per_frame"):
            cap = int(self.of_videos.get("max_video_tokens", _CAP_TOKENS)) * factor**2
            most = count * max(min(cap, most // count), int(least * 1.05))
        if medium.pixels != (None, None):  # of a frame
            low, high = (None if each is None else count * each for each in medium.pixels)
            bounded = replace(patches, least=least, most=most).within(low, high)
            least, most = bounded.least, bounded.most
        sides = smart_resize(
            count,
            *medium.sides,
            temporal_factor=patches.frames,
            factor=factor,
            min_pixels=least,
            max_pixels=most,
        )
        return sides[0] // patches.side, sides[1] // patches.side
