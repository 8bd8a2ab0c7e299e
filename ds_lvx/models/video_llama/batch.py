"""Video-LLaMA's batches: a video of each sample, whose frames lie on the ranks in order.

Shapes: ``B`` samples, ``T`` text tokens, ``V`` videos, ``P`` rows of a video in the text, ``Q``
rows of a frame, which the video's own are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lvx.attention.layout import Layout
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.rule import Rule
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.adapters.batch import Images, images_of, places_of
from ds_lvx.models.samples import images_at_hand
from ds_lvx.models.text import Here, Text
from ds_lvx.models.video_llama.dimensions import MODEL_TYPE
from ds_lvx.models.visual import COUNTS

PIXELS = "images"
KEYS = (PIXELS, COUNTS)
VIDEO = "video"
"""The layout of the video Q-Former's queries, those of all videos, over the rows of all frames."""
NUMBERS = "frame_numbers"
"""int64 ``[frames]``: of this rank's frames, the number of each in its video."""
ROWS = "video_rows"
"""int64 ``[m]``: what stands at this rank's places, in order, of the rows of all videos."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Frames(Images):
    """The frames of a batch, ``unit_tokens`` rows each, and who holds them.

    Attributes:
        video_tokens: P.
        most: frames that a video may have.
    """

    video_tokens: int
    most: int

    @property
    def replaced(self) -> Tensor:
        """Places of videos, whose token the language model's embedding has no row for."""
        return self.places

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """Which rows this rank's places take, and the numbers of its frames."""
        number = self.places.flatten().cumsum(0).view(self.places.shape) - 1
        before, mine = self._held[:rank].sum(dim=0), self._held[rank]
        first = (mine.cumsum(0) - mine - before).repeat_interleave(mine)
        return {
            ROWS: number[:, here][self.places[:, here]],
            NUMBERS: torch.arange(int(mine.sum())) - first,
        }

    def layouts(
        self, text: Text, *, channel: Channel, lengths: tuple[int, ...], device: torch.device
    ) -> Mapping[str, Layout]:
        """The queries of all videos, on every rank, over this rank's frames, each its own video's.

        A batch without videos has the queries of one, which sees nothing.
        """
        rank, kv_lengths = channel.rank, tuple((self._held.sum(dim=1) * self.unit_tokens).tolist())
        videos = self._held.sum(dim=0) > 0
        count = max(int(videos.sum()), 1)
        rule = None
        if count > 1:
            number = (videos.cumsum(0) - 1).to(torch.int32)
            query = torch.arange(count, dtype=torch.int32).repeat_interleave(self.video_tokens)
            key = number.repeat_interleave(self._held[rank] * self.unit_tokens)
            rule = Rule.on(Visibility(query[None], query[None] + 1, key[None]), device)
        queries = count * self.video_tokens
        found = Layout(
            channel,
            (queries,) * channel.size,
            kv_lengths,
            rule,
            device=device,
            first_query=rank * queries,
            first_key=sum(kv_lengths[:rank]),
        )
        return {VIDEO: found}

    def _check(self, found: Tensor) -> None:
        """Compare frames by sample, int64 ``[B]``, with the text."""
        videos = images_of(self.places, self.video_tokens)
        if bool(((found > 0) != (videos > 0)).any()):
            raise ValueError(
                f"got {PIXELS} of {found.tolist()} frames by sample, and a text with places for "
                f"{videos.tolist()} videos, {self.video_tokens} tokens each; expected frames where "
                f"there are places, and none elsewhere, with {COUNTS} where samples have unequal "
                'ones: pass the frames of all ranks, or frames="local" and on all ranks together '
                "all"
            )
        if int(found.max()) > self.most:
            raise ValueError(
                f"got a video of {int(found.max())} frames; expected at most {self.most}, for "
                "which video_frame_position_embedding has rows: take fewer, or build the model "
                "with a greater max_frame_pos"
            )


def visual(batch: Mapping[str, Any], text: Text, model: Any) -> Frames:
    """The visual part of a batch: frames, and the places of videos in the text.

    Args:
        batch: with ``images [B, 3, frames, height, width]`` or ``[B, 3, height, width]``, or
            ``[frames, 3, height, width]`` of all samples one after the other beside
            ``images_per_sample [B]``; or with nothing but text.
        text: its text.
        model: a `VideoLLAMA` of the repository's code, or what has a config of ours.
    """
    text.refuse_packed()
    sizes = Sizes.of(model)
    _refuse_audio(text, sizes.audio)
    places = places_of(text, sizes.token, unit_tokens=sizes.video_rows)
    _check_places(places, sizes.video_rows)
    pixels, here = _at_hand(batch, sizes.sides, batch_size=text.shape[0])
    return Frames(
        count=int(here.sum()),
        unit_tokens=sizes.frame_rows,
        arguments={} if pixels is None else {PIXELS: pixels},
        places=places,
        here=here,
        video_tokens=sizes.video_rows,
        most=sizes.most,
    )


@dataclass(frozen=True)
class Sizes:
    """What a batch has to fit.

    Attributes:
        token, audio: ids of a video's places, and of sound's, if there are some.
        frame_rows, video_rows: Q and P.
        most: frames that a video may have.
        sides: height and width of a frame.
    """

    token: int
    audio: int | None
    frame_rows: int
    video_rows: int
    most: int
    sides: tuple[int, int]

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Those of a model with a config of its own, or of the repository's, by its modules."""
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) == MODEL_TYPE:
            sides = (int(config.vision["image_size"]),) * 2
            rows = config.queries, config.video_queries, config.frames
            return cls(config.image_token_id, None, *rows, sides)
        size = model.visual_encoder.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            token=model.IMAGE_PATCH_TOKEN_ID,
            audio=getattr(model, "AUDIO_PATCH_TOKEN_ID", None),
            frame_rows=rows_of(model.query_tokens),
            video_rows=rows_of(model.video_query_tokens),
            most=int(model.video_frame_position_embedding.num_embeddings),
            sides=(int(height), int(width)),
        )


def blank(model: Any) -> dict[str, Tensor]:
    """One blank frame."""
    return {PIXELS: torch.zeros(1, 3, *Sizes.of(model).sides)}


def rows_of(queries: Tensor) -> int:
    """Of query tokens ``[1, rows, width]``."""
    # Of a parameter that ZeRO-3 has partitioned the shape is empty.
    return int(getattr(queries, "ds_shape", queries.shape)[1])


def _at_hand(
    batch: Mapping[str, Any], sides: tuple[int, int], *, batch_size: int
) -> tuple[Tensor | None, Tensor]:
    """Frames ``[frames, 3, height, width]``, and how many of each sample they are, ``[B]``."""
    pixels, given = batch.get(PIXELS), batch.get(COUNTS)
    if pixels is None:
        return None, torch.zeros(batch_size, dtype=torch.int64)
    found: Any = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
    shaped = isinstance(found, tuple) and len(found) in (4, 5)
    by_sample = given is None and found[0] == batch_size
    fits = shaped and found[1] == 3 and found[-2:] == sides
    if not fits or not (by_sample or (given is not None and len(found) == 4)):
        raise ValueError(
            f"got {PIXELS} {found}; expected ({batch_size}, 3, frames, {sides[0]}, {sides[1]}), or "
            f"(frames, 3, {sides[0]}, {sides[1]}) of all samples one after the other, with {COUNTS}"
        )
    if len(found) == 5:
        given, pixels = [found[2]] * batch_size, pixels.transpose(1, 2).flatten(0, 1)
    given = [1] * batch_size if given is None else given
    of_samples = torch.zeros(batch_size, dtype=torch.int64)
    return pixels, images_at_hand(given, len(pixels), of_samples)


def _check_places(places: Tensor, each: int) -> None:
    """One video a sample, its places side by side."""
    number = places.sum(dim=1)
    runs = places.long().diff(dim=1, prepend=torch.zeros(len(places), 1, dtype=torch.int64)) == 1
    wrong = ((number > each) | (runs.sum(dim=1) > 1)).nonzero().flatten()
    if len(wrong) > 0:
        sample = int(wrong[0])
        raise ValueError(
            f"got {int(number[sample])} places of videos in {int(runs[sample].sum())} runs in "
            f"sample {sample}; expected {each} side by side: one video a sample, as the model's "
            "own code has it"
        )


def _refuse_audio(text: Text, token: int | None) -> None:
    if token is not None and bool((text.input_ids == token).any()):
        raise NotImplementedError(
            f"got the token {token} of audio in the text; expected videos alone: the audio branch "
            "is not sharded"
        )
