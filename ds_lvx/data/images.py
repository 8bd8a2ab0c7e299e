"""Images from files: the size in the header is looked at before a pixel is decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ds_lvx.data.extras import need
from ds_lvx.data.held import Held
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from PIL.Image import Image

# PIL's names. Not among them: formats whose readers start programs (EPS) or are stubs.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI"),
    *("TGA", "TIFF", "WEBP"),
)
# A photograph with others in the same file, smaller or of its depth: the first is the photograph.
_FIRST_COUNTS = ("MPO", "ICO")
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr")
# Whose 16 bits PIL reads as 32, some of its versions.
_SIXTEEN = ("PNG", "PPM")
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
_CURE = "save it as PNG with 8 bits a channel"


def load_image(path: str | Held, *, limits: Limits = DEFAULT_LIMITS) -> Image:
    """Decode an image: upright, RGB, what is transparent on white, 16 bits scaled to 8.

    Args:
        path: a file in a format of ``FORMATS``, or what another file holds of it.
        limits: for its size.

    Raises:
        ValueError: the file is missing, no image, broken, larger than ``limits`` allow, an
            animation, or of pixels that have no place in RGB (32-bit numbers, floats).
    """
    from PIL import ImageOps

    with _opened(path, limits) as image:
        return _rgb(ImageOps.exif_transpose(image))


def check_image(path: str | Held, *, limits: Limits = DEFAULT_LIMITS) -> None:
    """Look at the header of an image alone.

    Args:
        path, limits: as of `load_image`.

    Raises:
        ValueError: as of `load_image`, for what the header tells.
    """
    with _opened(path, limits):
        pass


def image_sides(path: str | Held, *, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Height and width of what `load_image` returns, from the header alone.

    Args:
        path, limits: as of `load_image`.

    Raises:
        ValueError: as of `load_image`, for what the header tells.
    """
    with _opened(path, limits) as image:
        width, height = image.size
        # A TIFF's size is PIL's of the upright picture already.
        lies = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        return (width, height) if lies else (height, width)


@contextmanager
def _opened(path: str | Held, limits: Limits) -> Iterator[Any]:
    """An image whose header has been looked at; what it raises while open is about the file."""
    need("PIL", "video", why=str(path))
    from PIL import Image

    Image.init()
    readable = [name for name in FORMATS if name in Image.OPEN]  # an older PIL has no AVIF
    try:
        file = path if isinstance(path, str) else BytesIO(path.read())
        with Image.open(file, formats=readable) as image:
            limits.check_size(*image.size)
            _check(image)
            yield image
    except Image.DecompressionBombError as error:
        # PIL's limit of its own, found before there is an image to ask: "Image size (N pixels) ..."
        pixels = int(re.findall(r"\d+", str(error))[0])
        raise ValueError(
            f"{path}: got {pixels:,} pixels; expected at most {limits.max_pixels:,}; scale it down"
        ) from None
    except Exception as error:  # PIL's readers raise whatever broken files lead them to
        if isinstance(error, ValueError) and str(error).startswith("got "):
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(
            f"{path}: got a file that cannot be decoded ({error or type(error).__name__}); "
            f"expected an image ({', '.join(FORMATS)}); replace the file or drop the line"
        ) from error


def on_white(image: Image) -> Image:
    """RGB of an RGBA image: what is transparent shows white, as image processors have it."""
    from PIL import Image

    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _check(image: Any) -> None:
    """Refuse what has no one place in RGB."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _FIRST_COUNTS:
        raise ValueError(
            f"got {frames} pictures in one file ({image.format}); expected one; save the one you "
            'mean by itself, or give an animated GIF or APNG as {"type": "video"}'
        )

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN)
    if not sixteen and image.mode not in _EIGHT_BITS:
        raise ValueError(
            f"got pixels of mode {image.mode}; expected 8 or 16 bits a channel, in grey or colour; "
            f"scale them as you mean it, and {_CURE}"
        )
    tags = getattr(image, "tag_v2", {})
    bits, black = tags.get(258, (16,)), tags.get(262, 1)
    if sixteen and (bits[0] != 16 or black != 1):
        raise ValueError(
            f"got grey of {bits[0]} bits with photometric {black}; expected 16 bits from black (0) "
            f"to white, which is photometric 1; {_CURE}"
        )


def _rgb(image: Any) -> Image:
    if image.mode.startswith("I"):
        return _sixteen_bits(image)
    if image.has_transparency_data:
        return on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _sixteen_bits(image: Any) -> Image:
    """Grey of 0 to 65,535 as 0 to 255; one level may be the transparent one."""
    import numpy as np
    from PIL import Image

    levels = np.asarray(image).astype(np.int64)
    grey = ((levels + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
