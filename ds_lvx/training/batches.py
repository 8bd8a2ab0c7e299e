"""What a rank trains on: from a place in the data to a draft of its shard, in a data worker or not.

Places are counted in samples of all replicas (`ds_lvx.data.order`), and say all: a run that resumes
takes the samples that the run before it did not train on, whatever had been made ahead of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ds_lvx.data.batch import BatchMaker
from ds_lvx.data.chat import Chats
from ds_lvx.data.errors import Source as Line
from ds_lvx.data.feed import Feed, WorkerError
from ds_lvx.data.order import SampleOrder
from ds_lvx.data.text import IGNORED, TextEncoder
from ds_lvx.distributed.channel import Channel
from ds_lvx.models.cuts import span, split
from ds_lvx.models.draft import Draft
from ds_lvx.models.precision import training_dtype
from ds_lvx.training.check import Checks
from ds_lvx.training.model import Source
from ds_lvx.training.options import Options

if TYPE_CHECKING:
    from ds_lvx.training.inputs import BatchSizes, Inputs

TRAINING, EVALUATION = "training", "evaluation"


class Place(NamedTuple):
    """Where a micro-batch begins.

    Attributes:
        kind: `TRAINING` or `EVALUATION`.
        sample: samples before it, of all replicas.
    """

    kind: str
    sample: int


@dataclass(frozen=True, eq=False)
class Made:
    """One rank's micro-batch.

    Attributes:
        draft: of its shard.
        labelled: tokens learnt in the whole step that begins here, of this replica; else 0.
        num_tokens: text tokens of all samples, padding left out.
        num_frames: frames of all samples and all ranks, padding left out.
        failed: samples of which this rank could not decode its frames, by number: what is wrong.
        places: of each sample, its row of the text and its tokens there.
    """

    draft: Draft
    labelled: int
    num_tokens: int
    num_frames: int
    failed: Mapping[int, str]
    places: Sequence[tuple[int, slice]]

    def pin_memory(self) -> Made:
        """The same with its draft in pinned memory."""
        return replace(self, draft=self.draft.pin_memory())


@dataclass(frozen=True)
class Recipe:
    """All that decides what a micro-batch holds; pickles.

    Attributes:
        training, evaluation: the samples.
        lengths: of the samples to train on, where they are grouped by them.
        media: of the samples to train on, where those with the same are taken together.
        shares: samples of a micro-batch with the same media share what they begin with.
        checks: that they passed, with the rate and the limits of their media.
        sizes: of batches.
        seed: of their order.
        dtype: of pixels.
        skip: frames that cannot be decoded are no error, but black and `Made.failed`.
        pack: text tokens of a row up to which samples share one, or None.
        replica: this rank's data-parallel rank.
        place: this rank's number among those that share a sample, and how many there are.
    """

    training: Chats
    evaluation: Chats | None
    lengths: Sequence[int] | None
    media: Sequence[int] | None
    shares: bool
    checks: Checks
    sizes: BatchSizes
    seed: int
    dtype: torch.dtype
    skip: bool
    pack: int | None
    replica: int
    place: tuple[int, int]

    @classmethod
    def of(cls, inputs: Inputs, options: Options, world: Channel) -> Recipe:
        """This rank's."""
        size = world.size // inputs.sizes.replicas
        replica, rank = divmod(world.rank, size)
        return cls(
            inputs.training,
            inputs.evaluation,
            inputs.lengths,
            inputs.media,
            inputs.shares_prefixes,
            inputs.checks,
            inputs.sizes,
            seed=options.seed,
            dtype=training_dtype(inputs.ds_config),
            skip=options.on_bad_sample == "skip",
            pack=options.pack,
            replica=replica,
            place=(rank, size),
        )

    @cached_property
    def order(self) -> SampleOrder:
        """Of the samples to train on."""
        return SampleOrder(
            len(self.training),
            self.seed,
            blocks=self.training.blocks,
            lengths=self.lengths,
            together=self.sizes.per_step,  # the same for a run that resumes on other ranks
            media=self.media,
        )

    def lines(self, place: Place) -> list[Line]:
        """The lines that a micro-batch is made of."""
        chats, numbers = self.samples(place)
        return [chats.source(number) for number in numbers]

    def samples(self, place: Place) -> tuple[Chats, list[int]]:
        """The file, and which of its samples this replica takes."""
        micro = self.sizes.micro
        if place.kind == TRAINING:
            return self.training, self.order.micro_batch(place.sample, micro, replica=self.replica)
        assert self.evaluation is not None
        first, last = place.sample + self.replica * micro, len(self.evaluation) - 1
        # Past the end the last sample, with nothing to learn.
        return self.evaluation, [min(number, last) for number in range(first, first + micro)]

    def maker(self, source: Source | None = None) -> Maker:
        """What makes micro-batches; in a worker without the source, which is read again."""
        if source is None:
            self.checks.limits.tell_pil()
            trusts = self.checks.trust_remote_code
            source = Source.of(self.checks.model, trust_remote_code=trusts)
        return Maker(self, source)


class Maker:
    """Makes one rank's micro-batches.

    Args:
        recipe: what they hold.
        source: of the model.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self._recipe = recipe
        self._family = source.family
        self._model = SimpleNamespace(config=source.config)
        rank, size = recipe.place
        self._batches = BatchMaker(
            TextEncoder(source.processor, recipe.checks.max_length, family=source.family),
            recipe.checks.rate,
            owned=partial(_owned, rank=rank, size=size),
            min_tokens=recipe.checks.min_tokens,
            dtype=recipe.dtype,
            skip=recipe.skip,
            pack=recipe.pack,
            limits=recipe.checks.limits,
            deal=partial(self._family.owned, rank=rank, size=size),
            shares=recipe.shares,
        )

    def __call__(self, place: Place) -> Made:
        """The micro-batch of a place.

        Raises:
            DataError: with file and line.
        """
        recipe = self._recipe
        chats, numbers = recipe.samples(place)
        batch = self._batches.batch([chats[number] for number in numbers])
        if place.kind == EVALUATION:
            beyond = len(chats) - place.sample - recipe.replica * recipe.sizes.micro
            for row, tokens in batch.places[max(beyond, 0) :]:
                batch.inputs["labels"][row, tokens] = IGNORED
        draft = Draft.of(
            self._family, batch.inputs, self._model, place=recipe.place, frames="local"
        )
        draft.checked()
        return Made(
            draft,
            self._labelled(place),
            batch.num_tokens,
            batch.num_frames,
            dict(batch.failed),
            batch.places,
        )

    def _labelled(self, place: Place) -> int:
        sizes = self._recipe.sizes
        if place.kind == EVALUATION or place.sample % sizes.per_step != 0:
            return 0
        total = 0
        for first in range(place.sample, place.sample + sizes.per_step, sizes.per_forward):
            chats, numbers = self._recipe.samples(Place(TRAINING, first))
            total += self._batches.labelled([chats[number] for number in numbers])
        return total


class Batches:
    """A rank's micro-batches, made ahead by data workers.

    Args:
        inputs: of the run.
        options: of the run, ``workers`` among them.
        world: all ranks.
    """

    def __init__(self, inputs: Inputs, options: Options, world: Channel) -> None:
        cuda = torch.cuda.is_available()
        workers = int(cuda) if options.workers is None else options.workers
        self._recipe = Recipe.of(inputs, options, world)
        start = self._recipe.maker if workers > 0 else partial(self._recipe.maker, inputs.source)
        self._feed: Feed[Made] = Feed(start, workers=workers, pin=cuda)
        self._eval_steps = options.eval_steps
        self._total_steps = inputs.total_steps

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self._feed.close()

    def begin(self, step: int, sample: int) -> None:
        """Say where the run stands, before the first `get`: at a step and its first sample."""
        self._feed.begin(self._places(step, sample))

    def get(self, place: Place) -> Made:
        """The next micro-batch, which begins at a place.

        Raises:
            DataError: with file and line.
            ValueError: a worker ended; names the lines of the micro-batch that it leaves unmade.
        """
        try:
            return self._feed.get(place)
        except WorkerError as error:
            lines = ", ".join(map(str, self._recipe.lines(place)))
            raise ValueError(f"{error} (the next batch has {lines})") from error

    def evaluation(self) -> Sequence[Place]:
        """The places of an evaluation."""
        samples = self._recipe.evaluation
        count = 0 if samples is None else len(samples)
        return [Place(EVALUATION, n) for n in range(0, count, self._recipe.sizes.per_forward)]

    def _places(self, step: int, sample: int) -> Iterator[Place]:
        """All that the loop takes, in its order (`ds_lvx.training.loop.Trainer`)."""
        sizes, due = self._recipe.sizes, False
        for number in range(step + 1, self._total_steps + 1):
            for _ in range(sizes.accumulation):
                yield Place(TRAINING, sample)
                sample += sizes.per_forward
            due = self._eval_steps is not None and number % self._eval_steps == 0
            yield from self.evaluation() if due else ()
        if not due:
            yield from self.evaluation()


def _owned(count: int, *, rank: int, size: int) -> range:
    """`ds_lvx.owned` where no groups are at hand."""
    part = span(split(count, size), rank)
    return range(part.start, part.stop)
