"""Which frames of the media of a sample are taken, and their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ds_lvx.data.conversation import Part
from ds_lvx.data.extras import need
from ds_lvx.data.frames import DecodeCount, Video, choose, decode, probe, segment
from ds_lvx.data.held import Films, Held, Stills
from ds_lvx.data.images import check_image, image_sides, load_image
from ds_lvx.data.kept import kept_probe
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from ds_lvx.data.stills import sides_of, video_of
from ds_lvx.models.media import Medium


@dataclass(frozen=True)
class FrameRate:
    """Which frames of a video are taken: ``fps`` a second, or ``count`` in all, or every one.

    Attributes:
        fps: frames a second.
        count: frames of a video, evenly spaced.
        max_frames: of those at ``fps``, or of all, at most so many, evenly spaced.
    """

    fps: float | None = None
    count: int | None = None
    max_frames: int | None = None

    @classmethod
    def asked(cls, options: Any) -> FrameRate:
        """What ``--fps``, ``--frames`` and ``--max_frames`` say; one frame a second without.

        Raises:
            ValueError: the last two stand together.
        """
        if options.frames is not None and options.max_frames is not None:
            raise ValueError("--max_frames: not allowed with --frames, which is a number itself")
        fps = 1.0 if options.fps is None and options.frames is None else options.fps
        return cls(fps=fps, count=options.frames, max_frames=options.max_frames)


@dataclass(frozen=True)
class Frames:
    """Consecutive visual inputs of a sample that one file holds, or that are one video.

    Attributes:
        path: the file, or what another file holds of it; of a list of frames all of them.
        video: what its container says, or None for an image.
        indices: the chosen frames of the video; ``(0,)`` for an image.
        first: frame of the video at which the part begins that is taken.
        sides: height and width of a picture, where the family asks for them.
        pixels: least and most that a picture is to have, where the sample says them.
    """

    path: str | Held | Stills
    video: Video | None
    indices: tuple[int, ...]
    first: int = 0
    sides: tuple[int, int] = (0, 0)
    pixels: tuple[int | None, int | None] = (None, None)

    @property
    def times(self) -> list[float] | None:
        """Seconds of a video's chosen frames, from the part's beginning; None for an image."""
        if self.video is None:
            return None
        begin = self.video.seconds(self.first)
        return [self.video.seconds(index) - begin for index in self.indices]

    @property
    def medium(self) -> Medium:
        """What the family has to know of it."""
        times = None if self.times is None else tuple(self.times)
        return Medium(times, self.sides, pixels=self.pixels)


class Chooser:
    """Looks at media, and decodes what is chosen of them.

    Args:
        rate: which frames of a video are taken.
        limits: for images and films.
        sized: the sides of pictures are found, too.
    """

    def __init__(
        self, rate: FrameRate, limits: Limits = DEFAULT_LIMITS, *, sized: bool = False
    ) -> None:
        self._rate = rate
        self._limits = limits
        self._sized = sized
        # Every epoch comes back to the same films. Times take 8 bytes a frame.
        self._probe = lru_cache(maxsize=64)(self._probed)
        self._video_sides = lru_cache(maxsize=256)(self._sides_of_video)
        self._films = Films()

    def frames(self, part: Part) -> Frames:
        """The chosen frames of an image or a video. Decodes nothing, or its first for its sides.

        Raises:
            ValueError: it is no video, has not the part that is asked for, or frames of several
                sizes where these count.
        """
        file, rate = part.file, self._rate
        if isinstance(file, Stills):
            video, rate = video_of(file), replace(rate, fps=None)  # at a rate they were taken
        elif part.kind == "image":
            sides = image_sides(file, limits=self._limits) if self._sized else (0, 0)
            return Frames(file, None, (0,), sides=sides, pixels=part.pixels)
        else:
            video = self._probe(file)
        if part.fps is not None:  # the line's own go first
            rate = replace(rate, fps=part.fps, count=None)
        elif part.nframes is not None:
            rate = FrameRate(count=part.nframes)
        taken = range(len(video))
        if part.start is not None or part.end is not None:
            taken = segment(video, part.start, part.end)
        piece = replace(video, timestamps=video.timestamps[taken.start : taken.stop])
        chosen = choose(piece, fps=rate.fps, count=rate.count, max_frames=rate.max_frames)
        indices, sides = tuple(taken[n] for n in chosen), (0, 0)
        if self._sized and isinstance(file, Stills):
            sides = sides_of(file, indices, limits=self._limits)
        elif self._sized:
            sides = self._video_sides(file)
        return Frames(file, video, indices, taken.start, sides, part.pixels)

    def check(self, part: Part) -> None:
        """Look at the headers of an image, or of a video's frames that are images.

        Raises:
            ValueError: one cannot be read, or the frames are not of one size.
        """
        if isinstance(part.file, Stills):
            sides_of(part.file, limits=self._limits)
        elif part.kind == "image":
            check_image(part.file, limits=self._limits)

    def pictures(
        self, frames: Frames, indices: Sequence[int], counter: DecodeCount | None = None
    ) -> Iterator[Any]:
        """The pictures of some of the frames.

        Raises:
            ValueError: one cannot be decoded.
        """
        if isinstance(frames.path, Stills):
            for index in indices:
                if counter is not None:
                    counter.frames += 1
                yield load_image(frames.path.files[index], limits=self._limits)
            return
        if frames.video is None:
            yield load_image(frames.path, limits=self._limits)
            return
        video = frames.video
        if isinstance(frames.path, Held):  # its file may have gone since
            video = replace(video, path=self._films.path(frames.path))
        yield from decode(video, indices, counter=counter, limits=self._limits)

    def _sides_of_video(self, file: str | Held) -> tuple[int, int]:
        """Height and width of its pictures, upright; no header tells how a frame is turned."""
        first = Frames(file, self._probe(file), (0,))
        picture = next(iter(self.pictures(first, (0,))))
        return picture.height, picture.width

    def _probed(self, file: str | Held) -> Video:
        need("av", "video", why=str(file))
        if isinstance(file, str):
            return kept_probe(file, limits=self._limits)
        return probe(self._films.path(file), limits=self._limits)
