"""Text and pixels for VideoLLaMA 3, from the files of a checkpoint: as Qwen2.5-VL's, but a unit of
a video is one frame, with its time in front.

Of a video what hardly differs from the frame before is left out of the text, unless its settings
have ``use_token_compression`` off: all frames are looked at before a text is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import smart_resize

from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.qwen2_5_vl import processor as qwen
from ds_lvx.models.video_llama_3.batch import MASK, MERGES, VIDEO_MERGES

_DIFFERS = 0.1
"""Times 1 / 255: the mean difference of two normalised patches from which on both are kept."""


class Processor(qwen.Processor):
    """See `ds_lvx.models.qwen2_5_vl.processor.Processor`; ``video_pixels`` are the least of a frame
    and the most of a video.

    Attributes:
        compresses: what hardly changes in a video is left out.
    """

    settings: Mapping[str, Any] = MappingProxyType(
        {
            "merge_size": 1,
            "temporal_patch_size": 1,
            "image_mean": IMAGENET_STANDARD_MEAN,
            "image_std": IMAGENET_STANDARD_STD,
        }
    )
    video_settings: Mapping[str, Any] = MappingProxyType({"merge_size": 2})
    says_seconds = False  # they stand in the text
    image_ends = video_ends = ("", "\n")

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(tokenizer, files)
        self.compresses = bool(self.of_videos.get("use_token_compression", True))

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`; all tokens of a video are kept whose pictures
        are not at hand."""
        whole = super().shown(medium)
        if medium.times is None or medium.decoded is None or not self.compresses:
            return whole
        kept = self._kept(medium)
        return replace(whole, tokens=tuple(kept.sum(dim=1).tolist()), seen=kept)

    def written(self, times: Sequence[float]) -> str:
        """The time of each frame, and its token."""
        return ",".join(f"Time {each:.1f}s:{self.video_token}" for each in times)

    def grid(self, medium: Medium) -> tuple[int, int]:
        """``h, w`` in patches of an image, or of a frame of a video: the longer, the smaller.

        Raises:
            ValueError: it is more than 200 times as long as wide.
        """
        if medium.times is None:
            return super().grid(medium)
        patches, (low, high) = self.videos, medium.pixels
        sides = smart_resize(
            *medium.sides,
            factor=patches.side * patches.merge,
            min_pixels=patches.least if low is None else low,
            # A sample says them of a frame; where the two are at odds, the most count.
            max_pixels=patches.most // len(medium.times) if high is None else high,
        )
        return sides[0] // patches.side, sides[1] // patches.side

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
        pairs = [pair for s in samples for pair in zip(s.media, s.shown, strict=True)]
        videos = [shown for medium, shown in pairs if medium.times is not None]
        found, images = super().media(samples, dtype=dtype), len(pairs) - len(videos)
        if images:
            found[MERGES] = torch.full((images,), self.images.merge)
        if videos:
            found[VIDEO_MERGES] = torch.full((len(videos),), self.videos.merge)
            found[MASK] = torch.cat([_mask(shown) for shown in videos])
        return found

    def _kept(self, medium: Medium) -> Tensor:
        """The tokens of a video that are kept, bool ``[frames, tokens]``: those that differ from
        the frame's before, and of each frame one."""
        assert medium.decoded is not None
        grid, merged = self.grid(medium), self.videos.merge**2
        found: list[Tensor] = []
        before = None
        for picture in medium.decoded():
            rows = self.videos.rows([picture], grid, dtype=torch.float32)
            here = rows.view(len(rows) // merged, -1)
            kept = torch.ones(len(here), dtype=torch.bool)
            if before is not None:
                kept = (here - before).abs().mean(dim=-1) * 255 > _DIFFERS
            kept[0] |= ~kept.any()
            found.append(kept)
            before = here
        return torch.stack(found)


def _mask(shown: Shown) -> Tensor:
    """Of a video's tokens, whether each is kept, bool ``[frames * tokens]``."""
    whole = torch.ones(sum(shown.tokens), dtype=torch.bool)
    return whole if shown.seen is None else shown.seen.flatten()
