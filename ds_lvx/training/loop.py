"""The training loop: DeepSpeed's step, with the batch sharded before it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

import ds_lvx
from ds_lvx.data.ahead import Ahead
from ds_lvx.data.batch import Batch, BatchMaker
from ds_lvx.data.chat import Conversation
from ds_lvx.data.order import SampleOrder
from ds_lvx.data.text import IGNORED
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.training.ending import EndAskedError, Ending, raise_if_asked
from ds_lvx.training.export import save_pretrained
from ds_lvx.training.inputs import Inputs
from ds_lvx.training.model import parameter_groups, training_dtype
from ds_lvx.training.options import Options
from ds_lvx.training.progress import Progress
from ds_lvx.training.run_state import Checkpoints, RunState, SaveError
from ds_lvx.training.together import told


def make_engine(model: Any, inputs: Inputs, options: Options) -> Any:
    """The engine, with AdamW and the schedule of the options where the ds_config has none.

    Raises:
        ValueError, NotImplementedError: what ``ds_lvx.initialize`` finds wrong.
    """
    groups = parameter_groups(model, options.weight_decay)
    optimizer = None
    if "optimizer" not in inputs.ds_config:
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)

    def schedule(of_engine: Any) -> Any:
        return get_scheduler(
            options.lr_scheduler,
            of_engine,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=inputs.total_steps,
        )

    engine, *_ = ds_lvx.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=groups,
        lr_scheduler=None if "scheduler" in inputs.ds_config else schedule,
        config=inputs.ds_config,
    )
    return engine


def renew_learning_rate(engine: Any) -> None:
    """After a resume, the learning rate of the schedule as it is now.

    The one restored with the optimizer is that of the schedule as it was: with another
    ``--max_steps`` they differ.
    """
    scheduler = engine.lr_scheduler
    if not isinstance(scheduler, LambdaLR):
        return  # DeepSpeed's own, from the ds_config: of no known length
    for group, base, factor in zip(
        engine.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(scheduler.last_epoch)


class Trainer:
    """One run: its engine, its data and where it stands.

    Args:
        engine: from `make_engine`.
        inputs: from `read_inputs`.
        options: of the run.
        world: all ranks.

    Attributes:
        step: optimizer steps done.
        samples_seen: by all replicas.
        maker: makes the batches.
    """

    def __init__(self, engine: Any, inputs: Inputs, options: Options, *, world: Channel) -> None:
        self.engine = engine
        self.step = 0
        self.samples_seen = 0
        self._inputs = inputs
        self._options = options
        self._world = world
        self._groups: SequenceParallelGroups = engine.ds_lvx.groups
        self._folder = Path(options.output_dir)
        self.maker = BatchMaker(
            inputs.encoder,
            inputs.rate,
            owned=ds_lvx.owned,
            min_tokens=self._groups.sp_size,
            dtype=training_dtype(inputs.ds_config),
            skip=options.on_bad_sample == "skip",
            limits=options.limits,
        )
        self._skipped = dict.fromkeys(inputs.skipped)
        self._order = SampleOrder(len(inputs.training), options.seed)
        self._checkpoints = Checkpoints(
            self._folder / "checkpoints",
            world,
            keep=options.keep_checkpoints,
            only_trained=options.lora_r > 0,
            trusted=options.trust_checkpoint,
        )
        self._saved_step: int | None = None
        self._ending = Ending()
        self._progress = Progress(self._folder, rank=world.rank, total_steps=inputs.total_steps)
        self._tokens_of_a_frame = inputs.source.family.frame_tokens(inputs.source.config)

    def run(self) -> None:
        """Resume where asked, train to the end, evaluate, and write the model.

        Raises:
            ValueError: bad data, on all ranks; checkpoints written before stay as they are.
            EndAskedError: a rank was asked to end; a checkpoint is written.
        """
        try:
            with self._ending:
                self.resume()
                self._progress.start(self.step)
                self._work()
                self.export()
        finally:
            self._progress.skipped([*self._skipped])
            self._progress.close()

    def _work(self) -> None:
        """Train and evaluate; save where the run is asked to end."""
        try:
            self.train()
            if self._inputs.evaluation and not self._due(self._options.eval_steps):
                self.evaluate()
        except EndAskedError as asked:
            self._progress.say(f"{asked.reason}: the run ends after step {self.step}")
            if self.step != self._saved_step and self.step > 0:
                path = self._checkpoints.save(self.engine, self._state())
                self._progress.say(f"saved {path}; --resume goes on from there")
            raise

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

    def train(self) -> None:
        """Take the steps that are left."""
        options, sizes = self._options, self._inputs.sizes
        end = self._inputs.total_steps * sizes.per_step
        ahead = Ahead(self._make, step=sizes.per_forward, end=end)
        self.engine.train()
        try:
            while self.step < self._inputs.total_steps:
                learning_rate = float(self.engine.get_lr()[0])  # the step's own, not the next's
                loss = self._take_step(ahead)
                if self._due(options.log_steps) or self.step == self._inputs.total_steps:
                    self._log(loss, learning_rate)
                if self._inputs.evaluation and self._due(options.eval_steps):
                    self.evaluate()
                if self._due(options.save_steps):
                    self._save()
        finally:
            ahead.close()

    def _save(self) -> None:
        """Write a checkpoint; where that cannot be, training goes on, and the next one may."""
        try:
            self._checkpoints.save(self.engine, self._state())
            self._saved_step = self.step
        except SaveError as error:
            self._progress.say(
                f"warning: no checkpoint of step {self.step}: {error}; training goes on, make room "
                "for the next"
            )

    def evaluate(self) -> float:
        """The mean loss of the labelled tokens of all evaluation samples, logged and returned."""
        samples = self._inputs.evaluation
        size, count = self._inputs.sizes.per_forward, 0 if samples is None else len(samples)
        total, tokens = 0.0, 0
        self.engine.eval()
        with torch.no_grad():
            for place in range(0, count, size):
                batch, records = self._agree(partial(self._make_evaluation, place))
                raise_if_asked(records)
                labelled = int((batch.inputs["labels"][:, 1:] != IGNORED).sum())
                total += float(self._forward(batch).detach()) * labelled
                tokens += labelled
        self.engine.train()
        records = self._world.agree({"total": total, "tokens": tokens})
        # Each rank has its share of a replica's loss, and all of the replica's tokens.
        everyone = sum(record["tokens"] for record in records) / self._groups.sp_size
        loss = sum(record["total"] for record in records) / everyone
        self._progress.log_evaluation(step=self.step, eval_loss=loss)
        return loss

    def export(self) -> None:
        """Write the model in Hugging Face's format to ``output_dir/model``."""
        folder = self._folder / "model"
        save_pretrained(
            self.engine,
            self._inputs.source.processor,
            folder,
            world=self._world,
            adapter=self._options.lora_r > 0,
        )
        self._progress.say(f"saved {folder}")

    def _take_step(self, ahead: Ahead[tuple[Batch, int]]) -> Tensor:
        """One optimizer step; returns the mean loss of its forwards, this rank's share.

        Every labelled token of the step weighs the same, whichever forward and replica it falls
        into: each loss is a sum over one number, that of all forwards and replicas by their count,
        because DeepSpeed averages over both.
        """
        sizes = self._inputs.sizes
        losses: list[Tensor] = []
        tokens, items = 0, 0.0
        for _ in range(sizes.accumulation):
            batch, records = self._agree(partial(ahead.get, self.samples_seen))
            if not losses:
                raise_if_asked(records)
                everyone = sum(record["labelled"] for record in records) / self._groups.sp_size
                items = everyone / (sizes.accumulation * sizes.replicas)
            loss = self._forward(batch, items)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
            tokens += batch.num_tokens + batch.num_frames * self._tokens_of_a_frame
            self.samples_seen += sizes.per_forward
        self.step += 1
        self._progress.advance(tokens * sizes.replicas)
        return torch.stack(losses).mean()

    def _forward(self, batch: Batch, items: float | None = None) -> Tensor:
        inputs = {**batch.inputs, "num_items_in_batch": items}
        shard = ds_lvx.shard_batch(inputs, model=self.engine.module, frames="local")
        loss: Tensor = self.engine(**shard).loss
        return loss

    def _make(self, place: int) -> tuple[Batch, int]:
        """The batch of a place, and the labelled tokens of the whole step that begins there."""
        sizes = self._inputs.sizes
        of_step = range(place, place + sizes.per_step, sizes.per_forward)
        begins = place % sizes.per_step == 0
        labelled = sum(self.maker.labelled(self._samples(p)) for p in of_step) if begins else 0
        return self.maker.batch(self._samples(place)), labelled

    def _samples(self, place: int) -> list[Conversation]:
        """Of this replica, for the forward that begins at a place."""
        micro, replica = self._inputs.sizes.micro, self._groups.dp_rank
        numbers = self._order.micro_batch(place, micro, replica=replica)
        return [self._inputs.training[number] for number in numbers]

    def _make_evaluation(self, place: int) -> tuple[Batch, int]:
        """A batch in the file's order; past the end the last sample, with nothing to learn."""
        micro, samples = self._inputs.sizes.micro, self._inputs.evaluation
        assert samples is not None
        first = place + self._groups.dp_rank * micro
        places = range(first, first + micro)
        batch = self.maker.batch([samples[min(p, len(samples) - 1)] for p in places])
        for row, p in enumerate(places):
            if p >= len(samples):
                batch.inputs["labels"][row] = IGNORED
        return batch, 0

    def _agree(self, make: Callable[[], tuple[Batch, int]]) -> tuple[Batch, list[dict[str, Any]]]:
        """Make a batch on every rank; nothing is learnt of a sample that failed on one of them.

        Raises:
            ValueError: a batch cannot be made; on all ranks.

        Collectives: one agreement on the control plane.
        """
        replica = self._groups.dp_rank

        def made() -> tuple[Batch, dict[str, Any]]:
            batch, labelled = make()
            failed = {n: problem[:500] for n, problem in batch.failed.items()}
            record = {"labelled": labelled, "replica": replica, "failed": failed}
            return batch, {**record, **self._ending.asked()}

        batch, records = told(self._world, made)
        for record in records:
            self._skipped |= dict.fromkeys(record["failed"].values())
            if record["replica"] == replica:
                for row in record["failed"]:
                    batch.inputs["labels"][int(row)] = IGNORED
        return batch, records

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _log(self, loss: Tensor, learning_rate: float) -> None:
        self._progress.log(
            step=self.step,
            epoch=round(self.samples_seen / len(self._inputs.training), 4),
            loss=float(ds_lvx.mean_loss(loss)),
            learning_rate=learning_rate,
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
        )
