"""One rank that trains: the times of its steps, and where they go."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

import ds_lvx
from ds_lvx.compare.case import DTYPES, Case, build_model, ds_config, make_batch
from ds_lvx.compare.harness import GATHERED, METHODS, now, own_device
from ds_lvx.compare.network import counting
from ds_lvx.compare.training import gathered
from ds_lvx.compare.training.breakdown import Parts
from ds_lvx.distributed.pending import without_overlap
from ds_lvx.plan.memory import Setting

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Task:
    """A fine-tuning task by one method, and its steps. Sizes are those of the whole sample."""

    model: str  # its name, or folder or hub name of a checkpoint
    case: Case  # its sizes, the text's tokens, and what trains
    frames: int  # of the one sample
    dtype: str = "float32"  # a key of `DTYPES`
    zero_stage: int = 2  # of DeepSpeed
    text_method: str = "ulysses"  # of the text's own attention, ``"ulysses"`` or ``"ring"``
    recompute: bool = True  # lvx projects K and V again in backward
    checkpointing: bool = False  # of the layers
    checkpoint: bool = False  # the weights are those of the checkpoint ``model``, not random
    method: str = "none"  # of the cross-attention, one of `METHODS`
    overlap: bool = True  # transfers run under what is computed
    warmup: int = 1  # steps after the first and before the timed ones
    repeats: int = 5  # timed steps, and broken-down ones

    def build(self) -> torch.nn.Module:
        """The model, on the device that tensors are made on."""
        checkpoint = self.model if self.checkpoint else None
        return build_model(self.case, checkpoint=checkpoint, dtype=DTYPES[self.dtype])

    def ds_config(self, *, ranks: int) -> dict[str, Any]:
        """For ``ranks`` ranks that share the sample."""
        name, schedule = METHODS["ulysses" if self.method == GATHERED else self.method]
        return ds_config(
            Setting(name, self.recompute and name == "lvx", self.checkpointing),
            self.case,
            ranks=ranks,
            schedule=schedule,
            dtype=self.dtype,
            zero_stage=self.zero_stage,
            text_method=self.text_method,
        )


@contextmanager
def training(
    model: Any, optimizer: type[torch.optim.Optimizer], config: Any, *, gathers: str | None = None
) -> Iterator[Any]:
    """The engine of a model, until the ranks part.

    Of a model of type ``gathers`` every rank gathers the visual embeddings.
    """
    # torch 2.13 renamed collectives that DeepSpeed calls by their old names: a warning each.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    own_device()
    weights = [p for p in model.parameters() if p.requires_grad]
    with nullcontext() if gathers is None else gathered.instead_of(gathers):
        engine, *_ = ds_lvx.initialize(
            model=model,
            optimizer=optimizer(weights, lr=LEARNING_RATE),  # type: ignore[call-arg]
            model_parameters=weights,
            config=config,
        )
        del model, weights  # the engine's alone, so that nothing of them outlives the shutdown
        try:
            yield engine
        finally:
            ds_lvx.shutdown(engine)


def by_column(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Records of the same names as lists by name."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def finetune(task: Task) -> dict[str, Any]:
    """One step that is compared, then steps to warm up, timed ones and broken-down ones.

    ``losses`` are those of all steps (the whole sample's), ``gradient_norms`` those after the
    first. ``processor_s`` is of all threads of this process; ``interface_bytes`` what the network
    interface sent without packet headers, DeepSpeed's own included (None where ranks share it);
    ``broken_down`` a `Breakdown` for each further step, and ``whole_s`` by the clock.
    """
    config = task.ds_config(ranks=int(os.environ["WORLD_SIZE"]))
    gathers = task.case.family if task.method == GATHERED else None
    with (
        nullcontext() if task.overlap else without_overlap(),
        training(task.build(), torch.optim.AdamW, config, gathers=gathers) as engine,
    ):
        return _finetuned(engine, task)


def _finetuned(engine: Any, task: Task) -> dict[str, Any]:
    """The steps of one engine; see `finetune`."""
    batch = make_batch(
        task.case,
        frames=ds_lvx.owned(task.frames, model=engine.module),
        total=task.frames,
        dtype=DTYPES[task.dtype],
    )
    losses: list[float] = []
    norms: dict[str, float] = {}

    def step(
        enter: Callable[[str], None] = lambda phase: None,
        around: AbstractContextManager[Any] | None = None,
    ) -> tuple[dict[str, Any], Any]:
        """One optimizer step, begun on all ranks together: what it took, and what ``around`` is.

        ``enter`` is told of each phase after the first.
        """
        engine.ds_lvx.groups.world_channel.barrier()
        with around or nullcontext() as found, ds_lvx.traffic() as traffic:
            start, worked, carried = now(), time.process_time(), counting()
            shard = ds_lvx.shard_batch(batch, model=engine.module, frames="local")
            loss = engine(**shard).loss
            enter("backward")
            engine.backward(loss)
            enter("optimizer")
            engine.step()
            sample = {"step_s": now() - start, "processor_s": time.process_time() - worked}
            interface = carried()
            sent = None if interface is None else interface["sent_payload_bytes"]
        losses.append(float(ds_lvx.mean_loss(loss)))
        return {**sample, "interface_bytes": sent, "attention_bytes": traffic.bytes_sent}, found

    def look(phase: str) -> None:
        if phase == "optimizer":
            norms.update(gradient_norms(engine))

    step(look)
    timed = [step()[0] for _ in range(task.warmup + task.repeats)][task.warmup :]
    parts = Parts(engine.module, task.case.contract().regions())
    pairs = [step(parts.enter, parts.recording()) for _ in range(task.repeats)]
    parts.remove()
    return {
        "losses": losses,
        "gradient_norms": norms,
        **by_column(timed),
        "broken_down": [{"whole_s": own["step_s"], **asdict(each)} for own, each in pairs],
    }


def gradient_norms(engine: Any) -> dict[str, float]:
    """The norm of each parameter's gradient of the whole sample, after backward.

    Collectives: those by which ZeRO puts a gradient together; on all ranks.
    """
    norms = {}
    for name, parameter in engine.ds_lvx.patch.model.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter)
            norms[name] = 0.0 if gradient is None else float(gradient.float().norm())
    return norms
