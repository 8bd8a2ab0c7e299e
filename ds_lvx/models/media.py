"""How images and videos become a batch, as a family has it.

Shapes: ``B`` samples, ``T`` text tokens of the whole sequence. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        pixels: least and most that a picture is to have for the model, where the sample says them.
        decoded: its pictures, for a family whose tokens follow from what they show: PIL images, one
            at a time, decoded anew by each call; None: they are not at hand.
    """

    times: tuple[float, ...] | None
    sides: tuple[int, int]
    alone: bool = True
    pixels: tuple[int | None, int | None] = (None, None)
    decoded: Callable[[], Iterable[Any]] | None = field(default=None, compare=False, repr=False)


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
        seen: what the family made of its pictures for that, for `Held.shown`.
    """

    text: str
    frames: tuple[int, ...]
    tokens: tuple[int, ...]
    seen: Any = None


@dataclass(frozen=True)
class Held:
    """A sample's media, and what a rank holds of them.

    Attributes:
        media: all of them, in the order of the text.
        units: numbers of the units that this rank holds, over all media, in order.
        pictures: their frames, as PIL images, one at a time; take each once, in order. Of units
            that are pieces of a frame it comes once.
        shown: what each medium is in the text.
    """

    media: Sequence[Medium]
    units: Sequence[int]
    pictures: Iterable[Any]
    shown: Sequence[Shown]


class TakesMedia:
    """The parts of `ds_lvx.models.contract.Family` by which images, videos and conversations become
    batches: who holds what, what stands in the text, and what the processor returns.

    Attributes:
        model_type: the key it is registered under, which its models carry as
            ``model.config.model_type`` or ``model.model_type``; set by the registry.
        sized_media: how many tokens a frame takes follows from its size: `shown` and `media` are
            asked, and none of `media_text`, `frame_places` and `frames`.
        bounded_media: a sample may say the `Medium.pixels` of each, which `shown` and `media` heed.
    """

    model_type: str = ""
    sized_media: bool = False
    bounded_media: bool = False

    def owned(self, tokens: Sequence[int], rank: int, size: int) -> Sequence[int]:
        """Which of a sample's units a rank holds, in order; see `ds_lvx.owned`.

        Args:
            tokens: visual tokens of each unit of the sample.
            rank, size: its number, and how many ranks share the sample.
        """
        part = span(split(len(tokens), size), rank)
        return range(part.start, part.stop)

    def media_text(self, processor: Any, times: Sequence[float] | None) -> str | None:
        """What a medium is in the text, with an image token for each frame; None leaves it to the
        chat template, which writes an image for each.

        Args:
            processor: the checkpoint's.
            times: of a video's frames, in seconds; None for an image.
        """
        return None

    def finish_text(self, processor: Any, written: str) -> str:
        """What the processor makes of a text that its chat template wrote, before it is tokenized.

        The text may grow before the first answer only.
        """
        return written

    def frame_places(self, processor: Any) -> int:
        """Tokens of the text that a frame takes; its image token, once in what a chat template
        writes, is so many of them.

        Args:
            processor: the checkpoint's.
        """
        return 1

    def beside_text(self, processor: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the processor returns beside a text with frames, of the text alone.

        Args:
            processor: the checkpoint's.
            prompts: of each sample, its tokens before the first that is learnt.
        """
        return {}

    def inputs(
        self, processor: Any, input_ids: Sequence[int], labels: Sequence[int]
    ) -> Mapping[str, Sequence[int]]:
        """What the model takes of a conversation's text, each padded at the end in a batch.

        Args:
            processor: the checkpoint's.
            input_ids, labels: of the whole conversation; -100 where nothing is learnt.

        Raises:
            ValueError: the model cannot take such a conversation.
        """
        return {"input_ids": input_ids, "labels": labels}

    def frames(
        self,
        processor: Any,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        count: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """What the processor returns beside the text, for this rank's frames alone.

        Args:
            processor: the checkpoint's.
            input_ids: ``[B, T]``, the whole text of the batch.
            pictures: of each sample the frames that this rank holds, as PIL images, one at a time;
                take each once, in order.
            count: frames that this rank holds of the sample with the most; others are padded.
            dtype: of the pixels.

        Returns:
            For ``ds_lvx.shard_batch(..., frames="local")``.
        """
        raise self.lacks("frames", "training on images and videos")

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
        """`frames` where a row of text may hold several samples, each
        of which sees its own frames only. The batch says so by ``position_ids``, which start anew.

        Args:
            processor, pictures, count, dtype: as there, by row; a row's frames are its samples'.
            input_ids: ``[B, T]``, rows.
            begins: bool ``[B, T]``, where a sample begins, the first of a row too, and its padding.
            first: which frame of its row the first of ``pictures`` is; they are neighbours.
        """
        raise self.lacks("packed_frames", "--pack")

    # ---- where tokens follow from sizes

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

    def lacks(self, part: str, what: str) -> NotImplementedError:
        """The error for an optional part that a tool needs and this family has not."""
        return NotImplementedError(
            f"the model family {self.model_type!r} ({type(self).__name__}) has no {part}(), which "
            f"{what} needs; add it as ds_lvx.models.contract.Family.{part} describes"
        )
