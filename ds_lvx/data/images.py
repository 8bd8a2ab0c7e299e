"""Images from files: the size in the header is looked at before a pixel is decoded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def check_size(width: int, height: int) -> None:
    """Refuse a picture that would fill the memory.

    Args:
        width, height: pixels, as the header of the file says.

    Raises:
        ValueError: the picture has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"got {width} x {height} = {width * height:,} pixels; expected at most {limit:,}; "
            "scale it down"
        )


def load_image(path: str) -> Image:
    """Decode an image, upright, as RGB.

    Args:
        path: a file in any format that PIL reads.

    Raises:
        ValueError: the file is missing, no image, broken, or larger than `check_size` allows.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            check_size(*image.size)
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        # PIL's limit of its own, found before there is an image to ask: "Image size (N pixels) ..."
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise ValueError(
            f"{path}: got {pixels:,} pixels; expected at most {Image.MAX_IMAGE_PIXELS:,}; "
            "scale it down"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, SyntaxError) as error:  # PIL's readers raise both for broken files
        raise ValueError(
            f"{path}: got a file that cannot be decoded ({error}); expected an image; "
            "replace the file or drop the line"
        ) from None
