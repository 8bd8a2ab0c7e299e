"""Text and pixels for GLM-4.1V, from the files of a checkpoint: as Qwen2.5-VL's, but every two
frames of a video are an image in the text, with their time behind it. Pixels are counted over all
frames of a video, and twice for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

from ds_lvx.models.media import Medium
from ds_lvx.models.qwen2_5_vl import processor as qwen

IMAGE_ENDS = ("<|begin_of_image|>", "<|end_of_image|>")
VIDEO_ENDS = ("<|begin_of_video|>", "<|end_of_video|>")
IMAGE_TOKEN, VIDEO_TOKEN = "<|image|>", "<|video|>"
_CLASS = "processor_class"
_TENTHS = "Glm46VProcessor"


class Processor(qwen.Processor):
    """See `ds_lvx.models.qwen2_5_vl.processor.Processor`; pixels are of all frames.

    Attributes:
        tenths: times are written in tenths of a second, not in whole ones. A checkpoint says so by
            the class of its processor, whichever its model.
    """

    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN
    image_ends, video_ends = IMAGE_ENDS, VIDEO_ENDS
    image_pixels = (112 * 112, 28 * 28 * 15_000)
    video_pixels = (112 * 112, 28 * 28 * 2 * 30_000)
    says_seconds = False  # they stand in the text
    tenths = False

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(tokenizer, files)
        said = [(each or {}).get(_CLASS) for each in (*files.values(), tokenizer.init_kwargs)]
        found = next(filter(None, said), None)
        self.tenths = self.tenths if found is None else found == _TENTHS

    def written(self, times: Sequence[float]) -> str:
        """The token of each temporal patch, and the time of its first frame."""
        start, end = self.image_ends
        firsts = times[:: self.videos.frames]
        return "".join(f"{start}{self.image_token}{end}{self._time(each)}" for each in firsts)

    def _time(self, seconds: float) -> str:
        return f"{seconds:.1f} seconds" if self.tenths else f"{int(seconds)}"

    def grid(self, medium: Medium) -> tuple[int, int]:
        """``h, w`` in patches of an image, or of a frame of a video: the longer, the smaller.

        Raises:
            ValueError: it is more than 200 times as long as wide.
        """
        patches = self.images if medium.times is None else self.videos
        count = max(1 if medium.times is None else len(medium.times), patches.frames)
        # A sample says them of a frame.
        low, high = (None if each is None else count * each for each in medium.pixels)
        patches = patches.within(low, high)
        sides = smart_resize(
            count,
            *medium.sides,
            temporal_factor=patches.frames,
            factor=patches.side * patches.merge,
            min_pixels=patches.least,
            max_pixels=patches.most,
        )
        return sides[0] // patches.side, sides[1] // patches.side


class Tenths(Processor):
    """GLM-4.6V's: times are in tenths of a second, unless the checkpoint says otherwise."""

    tenths = True
