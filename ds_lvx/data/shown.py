"""A decoded frame as it is shown: pixels square, turned and mirrored as the file says, on white."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ds_lvx.data.images import on_white
from ds_lvx.data.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image


def shown_size(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Pixels of a frame when they are made square; none is lost, the short side grows.

    Args:
        width, height: as stored.
        aspect: width by height of one pixel; None or 0 where the file does not say.
    """
    if not aspect or aspect < 0 or aspect == 1:
        return width, height
    if aspect > 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def picture(frame: Any, *, aspect: Fraction | None, limits: Limits) -> Image:
    """RGB, upright.

    Args:
        frame: PyAV's.
        aspect: of a pixel, as the container says.
        limits: for the size as shown.

    Raises:
        ValueError: the frame is damaged or too large, or is to be turned by no right angle.
    """
    from PIL import Image

    if frame.is_corrupt:
        raise ValueError(
            "got a damaged picture; expected a whole one; replace the file, or write what can be "
            "decoded of it anew with ffmpeg"
        )
    size = shown_size(frame.width, frame.height, aspect)
    limits.check_size(*size)
    scaling = {} if size == (frame.width, frame.height) else {"width": size[0], "height": size[1]}
    if _has_alpha(frame):
        pixels = frame.reformat(format="rgba", **scaling).to_ndarray()
        if frame.format.has_palette and not pixels[..., 3].any():
            pixels[..., 3] = 255  # palettes of decoders that leave this byte alone
        image = on_white(Image.fromarray(pixels, "RGBA"))
    else:
        image = frame.to_image(**scaling)
    turn = _turn(frame)
    return image if turn is None else image.transpose(turn)


def _has_alpha(frame: Any) -> bool:
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def _turn(frame: Any) -> Any:
    """What PIL has to do to a frame; None for nothing.

    A display matrix ``a b u, c d v, x y w`` shows pixel (p, q) at (a p + c q + x, b p + d q + y).
    """
    from PIL.Image import Transpose

    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return None
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    largest = max(abs(value) for value in (a, b, c, d))
    signs = tuple(0 if 100 * abs(v) < largest else (v > 0) - (v < 0) for v in (a, b, c, d))
    turns = {
        (0, 0, 0, 0): None,  # says nothing
        (1, 0, 0, 1): None,
        (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM,
        (-1, 0, 0, -1): Transpose.ROTATE_180,
        (0, 1, -1, 0): Transpose.ROTATE_270,
        (0, -1, 1, 0): Transpose.ROTATE_90,
        (0, 1, 1, 0): Transpose.TRANSPOSE,
        (0, -1, -1, 0): Transpose.TRANSVERSE,
    }
    if largest == 0:
        return None
    if signs not in turns:
        raise ValueError(
            f"got a picture to be turned by about {frame.rotation} degrees; expected right "
            "angles and mirrors; write it anew as it is to be seen"
        )
    return turns[signs]
