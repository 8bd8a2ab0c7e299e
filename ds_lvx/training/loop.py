"""The training loop: DeepSpeed's step, with the batch sharded before it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ds_lvx
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.together import together, told
from ds_lvx.models.layers import table
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.precision import dtype_of, is_packed
from ds_lvx.models.shares import Share, counted, saved, shared_rows, shares
from ds_lvx.sharding import finish_batch
from ds_lvx.training.answers import Answers, means
from ds_lvx.training.batches import TRAINING, Batches, Made, Place
from ds_lvx.training.best import Watch
from ds_lvx.training.ending import EndAskedError, Ending, raise_if_asked
from ds_lvx.training.engine import renew_learning_rate
from ds_lvx.training.export import save_pretrained
from ds_lvx.training.inputs import Inputs
from ds_lvx.training.lengths import tokens_beside
from ds_lvx.training.options import Options
from ds_lvx.training.progress import Progress
from ds_lvx.training.run_state import Checkpoints, RunState, SaveError
from ds_lvx.training.trackers import Trackers

Records = list[dict[str, Any]]


class Trainer:
    """One run: its engine, its data and where it stands.

    Args:
        engine: from `ds_lvx.training.engine.make_engine`.
        inputs: from `read_inputs`.
        options: of the run.
        batches: what the run takes.
        world: all ranks.

    Attributes:
        step: optimizer steps done.
        samples_seen: by all replicas.
    """

    def __init__(
        self, engine: Any, inputs: Inputs, options: Options, *, batches: Batches, world: Channel
    ) -> None:
        self.engine = engine
        self.step = 0
        self.samples_seen = 0
        self._inputs = inputs
        self._options = options
        self._world = world
        self._groups: SequenceParallelGroups = engine.ds_lvx.groups
        self._folder = Path(options.output_dir)
        self._skipped = dict.fromkeys(inputs.skipped)
        self._untold: list[str] = []
        self._batches = batches
        self._held: Exception | None = None
        self._all_know = False
        self._last: tuple[Made, Records] | None = None
        self._checkpoints = Checkpoints(
            self._folder / "checkpoints",
            world,
            keep=options.keep_checkpoints,
            only_trained=options.lora_r > 0,
            trusted=options.trust_checkpoint,
        )
        self._saved_step: int | None = None
        self._watch = Watch(options)
        self._shares: list[Share] | None = None
        self._shared = ""
        self._ending = Ending()
        names = options.report_to if world.rank == 0 else []
        trackers = together(world, lambda: Trackers(names, self._folder, asdict(options)))
        self._progress = Progress(
            self._folder, rank=world.rank, total_steps=inputs.total_steps, trackers=trackers
        )
        self._answers: Answers | None = None
        if options.eval_generate > 0:
            self._answers = Answers(engine, inputs, options, world=world)
        self._tokens_of_a_frame = tokens_beside(inputs.source)

    def run(self) -> None:
        """Resume where asked, train to the end, evaluate, and write the model.

        Raises:
            ValueError: bad data, on all ranks; a checkpoint is written.
            EndAskedError: a rank was asked to end; a checkpoint is written.
        """
        try:
            with self._ending:
                self.resume()
                self._progress.start(self.step)
                self._progress.text("layers", table(self.engine.ds_lvx.patch.plans))
                self._batches.begin(self.step, self.samples_seen)
                self._work()
                self.take_best()
                self.export()
        finally:
            self._progress.skipped([*self._skipped])
            self._progress.close()

    def _work(self) -> None:
        """Train and evaluate; save where the run is asked to end, or cannot go on."""
        try:
            self.train()
            if self._inputs.evaluation and not self._due(self._options.eval_steps):
                self.evaluate()
        except EndAskedError as asked:
            self._progress.say(f"{asked.reason}: the run ends after step {self.step}")
            self._save_at_end()
            raise
        except ValueError:
            if self._all_know:
                self._save_before_error()
            raise

    def _save_at_end(self) -> None:
        """Write a checkpoint of the last whole step, where there is none yet."""
        if self.step != self._saved_step and self.step > 0:
            path = self._checkpoints.save(self.engine, self._state(), best=self._kept)
            self._progress.say(f"saved {path}; --resume goes on from there")

    def _save_before_error(self) -> None:
        with suppress(SaveError):  # what ended the run is to be said, not this
            self._save_at_end()

    def resume(self) -> None:
        """Go on from a checkpoint, where the options ask for it."""
        if self._options.resume is None:
            return
        path = self._checkpoints.find(self._options.resume)
        if path is None:
            return
        state = self._checkpoints.load(self.engine, path, self._state())
        self.step, self.samples_seen = state.step, state.samples_seen
        self._saved_step = self.step
        renew_learning_rate(self.engine)
        self._progress.say(f"resumed from {path} at step {self.step}")
        if (word := self._watch.resume(state.best)) is not None:
            self._progress.say(f"warning: {word}")
        if self._kept is not None and self._checkpoints.at(self._kept) is None:
            self._progress.say(
                f"warning: the checkpoint of step {self._kept}, the best so far, is gone; the next "
                "evaluation counts as the best"
            )
            self._watch = Watch(self._options)

    def train(self) -> None:
        """Take the steps that are left."""
        options = self._options
        self.engine.train()
        while self.step < self._inputs.total_steps and not self._watch.stops:
            learning_rate = float(self.engine.get_lr()[0])  # the step's own, not the next's
            loss = self._take_step()
            if self._due(options.log_steps) or self.step == self._inputs.total_steps:
                self._log(loss, learning_rate)
            if self._inputs.evaluation and self._due(options.eval_steps):
                self.evaluate()
            if self._due(options.save_steps):
                self._save()
        if self._watch.stops:
            best = self._watch.best
            self._progress.say(
                f"the run ends after step {self.step}: {best.waited} evaluations without a better "
                f"{best.metric} than {best.value} of step {best.step}"
            )

    @property
    def _kept(self) -> int | None:
        """The step of the best evaluation, where its checkpoint is kept."""
        return self._watch.best.step if self._options.load_best_model_at_end else None

    def _save(self) -> None:
        """Write a checkpoint; where that cannot be, training goes on, and the next one may."""
        if self._saved_step == self.step:  # it was the best
            return
        try:
            self._checkpoints.save(self.engine, self._state(), best=self._kept)
            self._saved_step = self.step
        except SaveError as error:
            self._progress.say(
                f"warning: no checkpoint of step {self.step}: {error}; training goes on, make room "
                "for the next"
            )

    def evaluate(self) -> None:
        """Log the mean loss of all evaluation samples' labelled tokens, and scores of answers."""
        total, tokens = 0.0, 0
        self.engine.eval()
        with torch.no_grad():
            for place in self._batches.evaluation():
                made, records = self._agree(place, everyone=True)
                raise_if_asked(records)
                total += float(self._forward(made, records).detach()) * made.draft.labelled
                tokens += made.draft.labelled
        self.engine.train()
        records = self._world.agree({"total": total, "tokens": tokens})
        # Each rank has its share of a replica's loss, and all of the replica's tokens.
        everyone = sum(record["tokens"] for record in records) / self._groups.sp_size
        rows = [] if self._answers is None else self._answers.rows(self._ending.asked)
        self._progress.answers(self.step, rows)
        values = means(rows) if rows else {}
        if everyone > 0:
            values = {"eval_loss": sum(record["total"] for record in records) / everyone, **values}
        else:
            self._progress.say("warning: no evaluation sample could be read: there is no eval_loss")
        self._progress.log_evaluation(step=self.step, **values)
        self._compare(values)

    def _compare(self, values: dict[str, float]) -> None:
        """Whether this evaluation is the best so far; its checkpoint, where it is kept."""
        before = self._watch.best
        if not self._watch.take(self.step, values) or self._kept is None:
            return
        self._save()
        if self._saved_step != self.step:  # there was no room: the one before stays the best
            self._watch.best = replace(before, waited=0)

    def take_best(self) -> None:
        """Take the weights of the best evaluation, where the options ask for them.

        Raises:
            ValueError: their checkpoint is gone or damaged; on all ranks. The last weights have a
                checkpoint then.
        """
        step = self._kept
        if step is None or step == self.step:
            return
        try:
            path = self._checkpoints.take(self.engine, step, self._state())
        except ValueError as error:
            self._save_before_error()
            raise ValueError(
                f"--load_best_model_at_end: {error}\nexpected the best as it was written; resume "
                "without --load_best_model_at_end to save the last weights"
            ) from None
        self._saved_step = self.step  # there is none to be written of what is here now
        best = self._watch.best
        self._progress.say(f"took {path}, the best by {best.metric}: {best.value}")

    def export(self) -> None:
        """Write the model in Hugging Face's format to ``output_dir/model``."""
        folder, adapter = self._folder / "model", self._options.lora_r > 0
        try:
            save_pretrained(
                self.engine, self._inputs.source, folder, world=self._world, adapter=adapter
            )
        except ValueError:  # on all ranks
            self._save_before_error()
            raise
        self._progress.say(f"saved {folder}")

    def _take_step(self) -> Tensor:
        """One optimizer step; returns the mean loss of its forwards, this rank's share.

        Every labelled token of the step weighs the same, whichever forward and replica it falls
        into: each loss is a sum over one number, that of all forwards and replicas by their count,
        because DeepSpeed averages over both.

        Collectives: one agreement a forward on the control plane (`_agree`): of the first and the
        last one by all ranks, of the others inside the group.
        """
        sizes, is_first = self._inputs.sizes, self._shares is None
        losses: list[Tensor] = []
        tokens, items = 0, 0.0
        for number in range(sizes.accumulation):
            everyone = number in (0, sizes.accumulation - 1)
            place = Place(TRAINING, self.samples_seen + number * sizes.per_forward)
            made, records = self._agree(place, everyone=everyone)
            if not losses:
                raise_if_asked(records)
                labelled = sum(record["labelled"] for record in records) / self._groups.sp_size
                items = labelled / (sizes.accumulation * sizes.replicas)
            loss = self._forward(made, records, items)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
            tokens += made.num_tokens + made.num_frames * self._tokens_of_a_frame
        self.samples_seen += sizes.per_step
        self.step += 1
        if self._shares is not None and is_first:
            self._progress.log_shares(self.step, self._shares)
            if self._inputs.shares_prefixes:
                self._progress.say(self._shared)
        self._progress.advance(tokens * sizes.replicas)
        return torch.stack(losses).mean()

    def _forward(self, made: Made, records: Records, items: float | None = None) -> Tensor:
        draft = made.draft.learning(items)
        drafts = [record["draft"] for record in self._of_group(records)]
        shard = finish_batch(draft, drafts, model=self.engine.module)
        if items is not None and self._shares is None:
            return self._first_forward(shard)
        loss: Tensor = self.engine(**shard).loss
        return loss

    def _first_forward(self, shard: dict[str, Any]) -> Tensor:
        """A forward that finds out what each rank of the group holds.

        Collectives: one agreement of the group.
        """
        with saved() as count:
            loss: Tensor = self.engine(**shard).loss
        records = self._groups.channel.agree({"bytes": count.bytes})
        found = shares(
            self.engine.ds_lvx.patch,
            shard[KEYWORD],
            samples=shard["input_ids"].shape[0],
            element_bytes=dtype_of(self.engine.module).itemsize,
        )
        self._shares = counted(found, [record["bytes"] for record in records])
        self._shared = shared_rows(shard[KEYWORD], len(shard["input_ids"]))
        return loss

    def _agree(self, place: Place, *, everyone: bool) -> tuple[Made, Records]:
        """The next micro-batch, when the ranks know of it; nothing is learnt of a sample that
        failed on one of them.

        What this rank finds wrong while only its group listens is held back until all ranks do,
        before the step is taken: the others must not wait in ZeRO's collectives for a group that
        has left. In its place the group takes the micro-batch before it again.

        Raises:
            ValueError: a batch cannot be made; on all ranks.

        Collectives: one agreement on the control plane.
        """
        if everyone:
            self._all_know = True  # of what is raised here
            made, records = told(self._world, lambda: self._told_of(place))
            self._all_know = False
            self._skipped |= dict.fromkeys(text for r in records for text in r["untold"])
            self._untold.clear()
        else:
            try:
                made, record = self._told_of(place)
            except Exception as error:  # noqa: BLE001  all ranks are to hear of it
                self._held, record = error, {"held": True}
            records = self._groups.channel.agree(record)
            if any("held" in each for each in records):
                assert self._last is not None
                return self._last
        failed = {row for record in self._of_group(records) for row in record["failed"]}
        unlearnt = [made.places[number] for number in failed]
        made = replace(made, draft=made.draft.learning(None, but=unlearnt))
        if self._inputs.sizes.accumulation > 2:  # between the first forward and the last
            self._last = made, records
        return made, records

    def _told_of(self, place: Place) -> tuple[Made, dict[str, Any]]:
        """The micro-batch of a place, and what other ranks must know of it and of this rank."""
        if self._held is not None:
            raise self._held
        made = self._batches.get(place)
        self._untold += [problem[:500] for problem in made.failed.values()]
        record = {"draft": made.draft.record(), "labelled": made.labelled, "untold": self._untold}
        return made, {**record, "failed": [*made.failed], **self._ending.asked()}

    def _of_group(self, records: Records) -> Records:
        """Those of the ranks that share a sample with this one."""
        size = self._groups.sp_size
        first = self._groups.dp_rank * size if len(records) > size else 0
        return records[first : first + size]

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _log(self, loss: Tensor, learning_rate: float) -> None:
        norm = self.engine.get_global_grad_norm()  # None at stage 0 in fp32
        self._progress.log(
            step=self.step,
            epoch=round(self.samples_seen / len(self._inputs.training), 4),
            loss=float(ds_lvx.mean_loss(loss)),
            learning_rate=learning_rate,
            **({} if norm is None else {"grad_norm": float(norm)}),
        )

    def _state(self) -> RunState:
        named = self.engine.module.named_parameters()
        shapes = [(n, tuple(getattr(p, "ds_shape", p.shape))) for n, p in named if p.requires_grad]
        return RunState(
            step=self.step,
            samples_seen=self.samples_seen,
            world_size=self._world.size,
            sequence_parallel_size=self._groups.sp_size,
            zero_stage=self.engine.zero_optimization_stage(),
            samples_per_step=self._inputs.sizes.per_step,
            seed=self._options.seed,
            data=self._inputs.fingerprint,
            trained=hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            best=self._watch.record(),
            quantized=any(map(is_packed, self.engine.module.parameters())),
        )
