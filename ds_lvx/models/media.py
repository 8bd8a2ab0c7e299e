"""Which frames a rank holds, and media whose tokens are as many as their size asks for.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ds_lvx.models.cuts import span, split

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Medium:
    """An image, or the chosen frames of a video.

    Attributes:
        times: of a video's frames, in seconds; None for an image.
        sides: height and width of a picture, in pixels.
        alone: no other image is in its sample.
    """

    times: tuple[float, ...] | None
    sides: tuple[int, int]
    alone: bool = True


def of_sample(media: Iterable[Medium]) -> list[Medium]:
    """The media of a sample, each knowing whether it is its only image."""
    each = list(media)
    alone = sum(medium.times is None for medium in each) <= 1
    return [replace(medium, alone=alone) for medium in each]


@dataclass(frozen=True)
class Shown:
    """What a medium is in the text.

    Attributes:
        text: with one of `ds_lvx.models.contract.Family.media_tokens` for each unit.
        frames: of each unit, in order; 0: it is a further piece of the frame before.
        tokens: of each unit; its token in the text is so many of them.
    """

    text: str
    frames: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """A sample's media, and what a rank holds of them.

    Attributes:
        media: all of them, in the order of the text.
        units: numbers of the units that this rank holds, over all media, in order.
        pictures: their frames, as PIL images, one at a time; take each once, in order. Of units
            that are pieces of a frame it comes once.
    """

    media: Sequence[Medium]
    units: Sequence[int]
    pictures: Iterable[Any]


class Parts:
    """The part of `ds_lvx.models.contract.Family` that is about media.

    Attributes:
        model_type: see `ds_lvx.models.contract.Family`.
        sized_media: how many tokens a frame takes follows from its size: `shown` and `media` are
            asked, and none of ``media_text``, ``frame_places`` and ``frames``.
    """

    model_type: str = ""
    sized_media: bool = False

    def owned(self, tokens: Sequence[int], rank: int, size: int) -> Sequence[int]:
        """Which of a sample's units a rank holds, in order; see `ds_lvx.owned`.

        Args:
            tokens: visual tokens of each unit of the sample.
            rank, size: its number, and how many ranks share the sample.
        """
        part = span(split(len(tokens), size), rank)
        return range(part.start, part.stop)

    def media_tokens(self, processor: Any) -> tuple[str, ...]:
        """The tokens that stand for images and frames in a text."""
        return (processor.image_token,)

    def shown(self, processor: Any, medium: Medium) -> Shown:
        """What a medium is in the text.

        Raises:
            ValueError: the model takes no medium of such a size.
        """
        raise self.lacks("shown", "training on images and videos")

    def media(
        self, processor: Any, samples: Sequence[Held], *, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """What the processor returns beside the text: all of it but pixels, and these for the units
        that this rank holds.

        Args:
            processor: the checkpoint's.
            samples: of the batch.
            dtype: of the pixels.

        Returns:
            For ``ds_lvx.shard_batch(..., frames="local")``.
        """
        raise self.lacks("media", "training on images and videos")

    def packed_frames(
        self,
        processor: Any,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        begins: Tensor,
        first: int,
        count: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """`ds_lvx.models.contract.Family.frames` where a row of text may hold several samples, each
        of which sees its own frames only. The batch says so by ``position_ids``, which start anew.

        Args:
            processor, pictures, count, dtype: as there, by row; a row's frames are its samples'.
            input_ids: ``[B, T]``, rows.
            begins: bool ``[B, T]``, where a sample begins, the first of a row too, and its padding.
            first: which frame of its row the first of ``pictures`` is; they are neighbours.
        """
        raise self.lacks("packed_frames", "--pack")

    def lacks(self, part: str, what: str) -> NotImplementedError:
        """The error for an optional part that a tool needs and this family has not."""
        return NotImplementedError(
            f"the model family {self.model_type!r} ({type(self).__name__}) has no {part}(), which "
            f"{what} needs; add it as ds_lvx.models.contract.Family.{part} describes"
        )
