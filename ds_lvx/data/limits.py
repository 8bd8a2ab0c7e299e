"""How large data may be: what lies above is refused with a word, not computed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of what one line, image or film may cost; each has an option of `launch/finetune.py`.

    Attributes:
        max_pixels: of an image, or of one frame of a film, as stored and as shown. The default is
            ``PIL.Image.MAX_IMAGE_PIXELS``; PIL itself refuses images of twice that.
        max_film_frames: of a film, chosen or not.
        max_lead_in_frames: that are decoded and thrown away to get at a chosen one. All of a film
            whose container does not say which frames it has (`ds_lvx.data.frames.probe`).
        max_gap_s: seconds between two frames of a film.
        max_line_bytes: of a line of a JSONL file. The default is more text than any model reads: a
            longer line is no chat but a damaged or misnamed file.
    """

    max_pixels: int = 89_478_485
    max_film_frames: int = 1_000_000
    max_lead_in_frames: int = 100_000
    max_gap_s: float = 86_400.0
    max_line_bytes: int = 64 << 20

    def tell_pil(self) -> None:
        """Set PIL's own limit, which is one of the process, to ``max_pixels``."""
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = self.max_pixels

    def check_size(self, width: int, height: int) -> None:
        """Refuse a picture that would fill the memory.

        Args:
            width, height: pixels, as the header of the file says.

        Raises:
            ValueError: the picture has more pixels than ``max_pixels``, or none.
        """
        if width < 1 or height < 1:
            raise ValueError(f"got {width} x {height} pixels; expected a picture; replace the file")
        if width * height > self.max_pixels:
            raise ValueError(
                f"got {width} x {height} = {width * height:,} pixels; expected at most "
                f"{self.max_pixels:,}; scale it down, or raise --max_pixels"
            )


DEFAULT_LIMITS = Limits()

# Frames decoded, for no picture yet, after which a word is said of it.
_PATIENCE = 5_000


def say_if_long(frames: int, path: str, why: str) -> None:
    """Warn, once a film, of decoding that may take minutes.

    Args:
        frames: decoded so far.
        path: of the film.
        why: it takes so many, and what would spare them.
    """
    if frames == _PATIENCE:
        warnings.warn(f"{path}: {frames:,} frames decoded so far, {why}", stacklevel=2)
