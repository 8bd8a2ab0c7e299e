"""From conversations to a batch: the whole text on every rank, the pixels of its own frames.

Shapes: ``B`` samples, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_lvx.data.chat import Conversation
from ds_lvx.data.chosen import Chooser, FrameRate, Frames
from ds_lvx.data.errors import DataError, Source
from ds_lvx.data.frames import DecodeCount
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from ds_lvx.data.packing import packed_text, rows_of
from ds_lvx.data.text import IGNORED, EncodedText, TextEncoder
from ds_lvx.kernels.transfer import HOST
from ds_lvx.models.media import Held, Medium, Shown, of_sample
from ds_lvx.models.prefixes import TOGETHER


@dataclass(frozen=True)
class Sample:
    """A conversation made ready: its text, and where its frames are to be found.

    Attributes:
        source: where it stands.
        text: of it.
        frames: of its media.
        shown: what each medium is in the text, where the family says it by their sizes.
    """

    source: Source
    text: EncodedText
    frames: tuple[Frames, ...]
    shown: tuple[Shown, ...] = ()

    @property
    def num_frames(self) -> int:
        """Frames of all its media."""
        return sum(len(frames.indices) for frames in self.frames)


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's batch.

    Attributes:
        inputs: for ``ds_lvx.shard_batch(..., frames="local")``.
        num_tokens: text tokens of all samples, padding left out.
        num_frames: frames of all samples and all ranks, padding left out.
        failed: samples of which this rank could not decode its frames, black now, by their place:
            what is wrong, with file and line.
        places: of each sample, its row of the text and its tokens there.
    """

    inputs: dict[str, Tensor]
    num_tokens: int
    num_frames: int
    failed: Mapping[int, str]
    places: Sequence[tuple[int, slice]]


class BatchMaker:
    """Makes one rank's batches.

    Args:
        encoder: for the text; its processor and family make the pixels.
        rate: which frames of a video are taken.
        owned: the number of frames of a sample to those that this rank holds (`ds_lvx.owned`).
        min_tokens: text tokens a sample must have: one for each rank that shares it.
        dtype: of ``pixel_values``.
        skip: frames that cannot be decoded are no error, but black and `Batch.failed`.
        limits: for images and films.
        deal: the tokens of a sample's units to those that this rank holds, for a family whose
            frames take tokens by their size (`ds_lvx.models.contract.Family.owned`); None: all.
        pack: text tokens of a row up to which samples share one (`rows_of`), of a family that has
            ``packed_frames``; None: each has its own.
        shares: samples that begin alike, with the same media, share these, which are decoded once
            (`ds_lvx.models.prefixes`), of a family that ``shares_prefixes``.

    Attributes:
        chooser: of frames.
        counter: frames decoded so far.
        limits: for images and films.
        pads_left: short texts are padded at the beginning, not at the end.
    """

    pads_left = False

    def __init__(
        self,
        encoder: TextEncoder,
        rate: FrameRate,
        *,
        owned: Callable[[int], Sequence[int]],
        min_tokens: int = 1,
        dtype: torch.dtype = torch.float32,
        skip: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        deal: Callable[[Sequence[int]], Sequence[int]] | None = None,
        pack: int | None = None,
        shares: bool = False,
    ) -> None:
        self.encoder = encoder
        self._deal = deal
        self._pack = pack
        self._shares = shares
        self._skip = skip
        self.counter = DecodeCount()
        self._owned = owned
        self._min_tokens = min_tokens
        self._dtype = dtype
        self.limits = limits
        self.chooser = Chooser(rate, limits, sized=encoder.family.sized_media)
        # A step asks for the labels of all its samples before it comes to the first of them.
        self._sample = lru_cache(maxsize=256)(self.sample)
        # Some families look at all frames; samples on the same ones mostly follow each other.
        self._latest: tuple[Sequence[Frames], tuple[Shown, ...]] = ((), ())

    def sample(self, conversation: Conversation) -> Sample:
        """Look at the media of a conversation, choose frames and write its text.

        Decodes nothing; of a video whose size counts, the first frame; and all where a family asks
        what they show (`ds_lvx.models.media.Medium.decoded`).

        Raises:
            DataError: with file and line, for media that cannot be read and text that does not fit.
        """
        source = conversation.source
        self._check_bounds(conversation)
        try:
            frames = tuple(self.chooser.frames(part) for part in conversation.media)
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
        counts, times = [len(f.indices) for f in frames], [f.times for f in frames]
        shown = self._shown(source, frames)
        text = self.encoder.encode(conversation, counts, times, shown)
        if len(text.input_ids) < self._min_tokens:
            raise DataError.at(
                source,
                got=f"{len(text.input_ids)} text tokens",
                expected=f"at least {self._min_tokens}, one for each rank that shares a sample",
                do="lengthen the text or lower sequence_parallel_size",
            )
        sample = Sample(source, text, frames, shown)
        self._inputs(sample)  # what is wrong with it is said before anything is decoded
        return sample

    def labelled(self, conversations: Sequence[Conversation]) -> int:
        """How many tokens of some conversations are learnt. Decodes nothing.

        Raises:
            DataError: as of `sample`.
        """
        samples = [self._sample(conversation) for conversation in conversations]
        # The first token is predicted by nobody.
        return sum(label != IGNORED for s in samples for label in s.text.labels[1:])

    def batch(self, conversations: Sequence[Conversation]) -> Batch:
        """The batch of some conversations, for ``ds_lvx.shard_batch(..., frames="local")``.

        Args:
            conversations: B of them, the same on every rank that shares them.

        Returns:
            Its inputs: ``input_ids``, ``attention_mask``, ``labels`` int64 ``[B, T]``, or what
            the family has of the text, padded at the end; where a sample has frames also what the
            family's processor returns for this rank's frames
            (`ds_lvx.models.contract.Family.frames`). Of packed samples fewer rows, with
            ``position_ids`` in place of ``attention_mask``. Of samples that share media frames of
            the first, and `ds_lvx.models.prefixes.TOGETHER`.

        Raises:
            DataError: with file and line.
        """
        with HOST:
            return self._batch([self._sample(conversation) for conversation in conversations])

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        family, processor = self.encoder.family, self.encoder.processor
        failed: dict[int, str] = {}
        frames = sum(sample.num_frames for sample in samples)
        tokens = sum(len(sample.text.input_ids) for sample in samples)
        if self._pack is not None:
            inputs, places = self._packed(samples, failed)
            return Batch(inputs, tokens, frames, failed, places)
        inputs, together = self._text(samples), self._together(samples)
        if frames > 0 and family.sized_media:
            held = [
                self._held(sample, partial(failed.__setitem__, n), shared=together[n] != n)
                for n, sample in enumerate(samples)
            ]
            inputs |= family.media(processor, held, dtype=self._dtype)
        elif frames > 0:
            rows = [[number] if first == number else [] for number, first in enumerate(together)]
            pictures, mine = self._rows(samples, rows, failed)
            given = inputs["input_ids"], pictures
            inputs |= family.frames(processor, *given, count=len(mine), dtype=self._dtype)
            inputs |= family.beside_text(processor, [sample.text.prompt for sample in samples])
        places = [(number, slice(None)) for number in range(len(samples))]
        if len({*together}) < len(together):
            inputs[TOGETHER] = torch.tensor(together)
            for number, first in enumerate(together):
                if first in failed:
                    what = failed[first].removeprefix(str(samples[first].source))
                    failed[number] = f"{samples[number].source}{what}"
        return Batch(inputs, tokens, frames, failed, places)

    def _together(self, samples: Sequence[Sample]) -> list[int]:
        """Of each sample, the number of the first one that begins as it does, with all its media;
        its own where it shares none."""
        found: list[int] = []
        for number, sample in enumerate(samples):
            others = sorted({*found}) if self._shares and sample.num_frames > 0 else []
            first = (n for n in others if self._begin_alike(samples[n], sample))
            found.append(next(first, number))
        return found

    def _begin_alike(self, one: Sample, other: Sample) -> bool:
        if one.frames != other.frames:
            return False
        shared, media = one.text.shared(other.text), self.encoder.media_token_ids
        return media.isdisjoint(one.text.input_ids[shared:] + other.text.input_ids[shared:])

    def _packed(
        self, samples: Sequence[Sample], failed: dict[int, str]
    ) -> tuple[dict[str, Tensor], list[tuple[int, slice]]]:
        """The inputs of samples that share rows, and where each is."""
        assert self._pack is not None
        rows = rows_of([len(sample.text.input_ids) for sample in samples], self._pack)
        inputs, begins, places = packed_text(
            [sample.text for sample in samples],
            rows,
            pad=self.encoder.pad_token_id,
            min_tokens=self._min_tokens,
        )
        if any(sample.num_frames > 0 for sample in samples):
            pictures, mine = self._rows(samples, rows, failed)
            inputs |= self.encoder.family.packed_frames(
                self.encoder.processor,
                inputs["input_ids"],
                pictures,
                begins=begins,
                first=mine[0] if len(mine) > 0 else 0,
                count=len(mine),
                dtype=self._dtype,
            )
        return inputs, places

    def _rows(
        self, samples: Sequence[Sample], rows: Sequence[Sequence[int]], failed: dict[int, str]
    ) -> tuple[list[Iterator[Any]], Sequence[int]]:
        """The frames of each row that this rank holds, and which of the row with the most."""
        mine = self._owned(max(sum(samples[n].num_frames for n in row) for row in rows))

        def pictures(row: Sequence[int]) -> Iterator[Any]:
            first = 0
            for number in row:
                sample, last = samples[number], first + samples[number].num_frames
                here = [n - first for n in mine if first <= n < last]
                yield from self._of_sample(sample, here, partial(failed.__setitem__, number))
                first = last

        return [pictures(row) for row in rows], mine

    def decode(self, sample: Sample) -> None:
        """Decode every frame of a sample, one at a time, and keep none.

        Raises:
            DataError: with file and line.
        """
        for _ in self._pictures(sample, range(sample.num_frames)):
            pass

    def _shown(self, source: Source, frames: Sequence[Frames]) -> tuple[Shown, ...]:
        family = self.encoder.family
        if not family.sized_media:
            return ()
        if frames == self._latest[0]:
            return self._latest[1]
        media = [
            replace(medium, decoded=partial(self._decoded, each))
            for medium, each in zip(_media(frames), frames, strict=True)
        ]
        try:
            shown = tuple(family.shown(self.encoder.processor, each) for each in media)
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
        self._latest = frames, shown
        return shown

    def _check_bounds(self, conversation: Conversation) -> None:
        family = self.encoder.family
        if not family.bounded_media and any(p.pixels != (None, None) for p in conversation.media):
            raise DataError.at(
                conversation.source,
                got="min_pixels or max_pixels of an image or a video",
                expected=f"none for a model of type {family.model_type!r}, whose files say the "
                "sizes of all",
                do="take them out",
            )

    def _held(self, sample: Sample, fail: Callable[[str], None], *, shared: bool) -> Held:
        """The units of a sample that this rank holds, and their frames; none that another sample
        has already."""
        tokens = [n for shown in sample.shown for n in shown.tokens]
        units = range(len(tokens)) if self._deal is None else self._deal(tokens)
        units = [] if shared else units
        ends = [*accumulate((n for shown in sample.shown for n in shown.frames), initial=0)]
        # A unit without a frame of its own is a further piece of the frame before it.
        starts = [end - (end == ends[unit + 1]) for unit, end in enumerate(ends[:-1])]
        mine = sorted({n for unit in units for n in range(starts[unit], ends[unit + 1])})
        pictures = self._of_sample(sample, mine, fail)
        return Held(_media(sample.frames), units, pictures, sample.shown)

    def _of_sample(
        self, sample: Sample, mine: Sequence[int], fail: Callable[[str], None]
    ) -> Iterator[Any]:
        """The frames ``mine`` of a sample."""
        count = sum(n < sample.num_frames for n in mine)
        return self._or_black(self._pictures(sample, mine), count, fail)

    def _decoded(self, frames: Frames) -> Iterator[Any]:
        """All frames of a medium. What fails is reported where they are decoded for their rank."""
        pictures = self.chooser.pictures(frames, frames.indices, self.counter)
        return self._or_black(pictures, len(frames.indices), lambda reason: None)

    def _or_black(
        self, pictures: Iterator[Any], count: int, fail: Callable[[str], None]
    ) -> Iterator[Any]:
        """So many pictures; black ones from where it fails, if that is no error."""
        done = 0
        try:
            for picture in pictures:
                yield picture
                done += 1
        except ValueError as error:
            if not self._skip:
                raise
            from PIL import Image

            fail(str(error))
            for _ in range(count - done):
                yield Image.new("RGB", (32, 32))

    def _inputs(self, sample: Sample) -> Mapping[str, Sequence[int]]:
        try:
            text = sample.text
            return self.encoder.family.inputs(self.encoder.processor, text.input_ids, text.labels)
        except ValueError as error:
            raise DataError(f"{sample.source}: {error}") from None

    def _text(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        rows = [self._inputs(sample) for sample in samples]

        def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            # What is shorter than there are ranks (an answer may be) is padded, too.
            length = max(self._min_tokens, *map(len, rows))
            pads = [[fill] * (length - len(row)) for row in rows]
            pairs = zip(pads, rows, strict=True) if self.pads_left else zip(rows, pads, strict=True)
            return torch.tensor([[*first, *second] for first, second in pairs])

        def fill(key: str) -> int:
            if key.endswith("input_ids"):
                return self.encoder.pad_token_id
            return IGNORED if key == "labels" else 0

        batch = {key: padded([row[key] for row in rows], fill(key)) for key in rows[0]}
        ones = [[1] * len(row["input_ids"]) for row in rows]
        return {**batch, "attention_mask": padded(ones, 0)}

    def _pictures(self, sample: Sample, mine: Sequence[int]) -> Iterator[Any]:
        """Decode the frames ``mine`` of a sample, file by file, and no others."""
        first = 0
        for frames in sample.frames:
            count = len(frames.indices)
            wanted = tuple(frames.indices[n - first] for n in mine if 0 <= n - first < count)
            first += count
            try:
                if not wanted:
                    continue
                yield from self.chooser.pictures(frames, wanted, self.counter)
            except ValueError as error:
                raise DataError(f"{sample.source}: {error}") from None


def _media(frames: Sequence[Frames]) -> list[Medium]:
    return of_sample(each.medium for each in frames)
