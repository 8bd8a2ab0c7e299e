"""accelerate's ``Accelerator`` for models whose visual tokens are sharded."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import accelerate
import deepspeed
from accelerate.data_loader import prepare_data_loader
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import PartialState
from accelerate.utils import DynamoBackend, gather_object, recursively_apply
from torch import Tensor

from ds_lvx.config import LVXConfig
from ds_lvx.config.ds_config import SECTION
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.initialize import Session, initialize
from ds_lvx.training.moving import order_of
from ds_lvx.training.resumed import take_others
from ds_lvx.whole_batches import WholeBatches


class Accelerator(accelerate.Accelerator):
    """``accelerate.Accelerator`` whose model, in `prepare`, becomes an engine of ds_lvx.

    The script stays as it is: the prepared model takes the batches of the prepared data loader,
    which gives every rank of a sequence-parallel group the same samples, on the CPU. The loss is
    that of the whole batch, on every rank; logits are of the whole without gradients or labels,
    else of this rank's shard. `gather`, `gather_for_metrics` and `reduce` take every replica once.

    Args:
        args, kwargs: accelerate's; its DeepSpeed plugin must have a ds_config with a section
            ``ds_lvx``.

    Attributes:
        lvx: the section.
        session: what `ds_lvx.initialize` made besides the engine; None before `prepare`.
        gathers_training: gather the logits in training too (`WholeBatches`).
        derives_batch_size: whether ``train_batch_size`` is left to DeepSpeed, which multiplies.

    Raises:
        ValueError: no DeepSpeed, no section, a mistake in it, or ranks that accelerate overlooks.
        NotImplementedError: torch.compile.
    """

    lvx: LVXConfig | None = None
    session: Session | None = None
    gathers_training = False
    derives_batch_size = False
    deepspeed_engine_wrapped: Any
    _indexes_replicas = False
    _batches: WholeBatches | None = None
    _references: tuple[tuple[Session, WholeBatches], ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_section()

    @classmethod
    def of(cls, accelerator: accelerate.Accelerator) -> Accelerator:
        """Make one of accelerate's, which has prepared nothing yet, one of ours; the same object.

        Raises:
            ValueError, NotImplementedError: as of this class.
        """
        accelerator.__class__ = cls
        assert isinstance(accelerator, cls)
        accelerator._read_section()
        return accelerator

    def _read_section(self) -> None:
        plugin = getattr(self.state, "deepspeed_plugin", None)
        if plugin is None or SECTION not in plugin.deepspeed_config:
            got = "no DeepSpeed" if plugin is None else f"a ds_config without a section {SECTION}"
            raise ValueError(
                f"got {got}; expected a ds_config with a section {SECTION}: give one (deepspeed= "
                "of TrainingArguments, hf_ds_config= of DeepSpeedPlugin, deepspeed_config_file in "
                "the config of accelerate launch), or use the class of transformers or accelerate"
            )
        if self.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise NotImplementedError(
                "got torch_compile (or a dynamo_backend of accelerate); torch.compile does not go "
                "with layers that exchange tensors with other ranks; leave it out"
            )
        world, launched = self.state.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
        if world != launched:
            raise ValueError(
                f"accelerate counts {world} processes where the launcher started {launched}, and "
                "each would train alone; on CPUs pass TrainingArguments(use_cpu=True), or make "
                "accelerate.PartialState(cpu=True) before the Accelerator"
            )
        lvx = LVXConfig.from_ds_config(dict(plugin.deepspeed_config))
        lvx.check_world_size(world)
        self.lvx = lvx

    @property
    def sp_size(self) -> int:
        """Ranks that share a sample."""
        return 1 if self.lvx is None else self.lvx.sequence_parallel_size

    @property
    def num_processes(self) -> int:
        """Replicas: how many different batches there are at once, as accelerate uses it."""
        return int(self.state.num_processes) // self.sp_size

    @property
    def process_index(self) -> int:
        """This rank among all; inside of `indexing_replicas` its replica among all."""
        rank = int(self.state.process_index)
        return rank // self.sp_size if self._indexes_replicas else rank

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank is the first of those that share its samples."""
        return int(self.state.process_index) % self.sp_size == 0

    @contextmanager
    def indexing_replicas(self) -> Iterator[None]:
        """Let `process_index` count as `num_processes` does."""
        before, self._indexes_replicas = self._indexes_replicas, True
        try:
            yield
        finally:
            self._indexes_replicas = before

    def prepare_data_loader(
        self,
        data_loader: Any,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """accelerate's, with samples by replica. Batches stay on the CPU: only shards leave it.

        Raises:
            NotImplementedError: ``dispatch_batches``, by which one rank reads for all.
        """
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader)
        if self.dispatch_batches:
            raise NotImplementedError(
                "got dispatch_batches=True, by which ranks of a group get different samples; leave "
                "it out"
            )
        replica = int(self.state.process_index) // self.sp_size
        _seed_workers_by(replica, data_loader)
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.num_processes,
            process_index=replica,
            split_batches=self.split_batches,
            put_on_device=False,
            rng_types=self.rng_types.copy(),
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(prepared)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """accelerate's, which steps once for each replica."""
        prepared = super().prepare_scheduler(scheduler)
        self._step_by_replicas()
        return prepared

    def _step_by_replicas(self) -> None:
        for scheduler in self._schedulers:
            if type(scheduler) is AcceleratedScheduler:
                scheduler.__class__ = SchedulerByReplica
                scheduler.replicas = self.num_processes

    def _prepare_deepspeed(self, *args: Any) -> Any:
        with initializing_by(self._start):
            prepared = super()._prepare_deepspeed(*args)
        self._step_by_replicas()
        return prepared

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """accelerate's.

        DeepSpeed 0.19.8 divides the gradient of a loss that its engine has returned by the
        accumulation steps, where Trainer tells it not to (``scale_wrt_gas=False``): at stage 0, at
        which the tensor is still the engine's own. A view of it is not.
        """
        super().backward(loss.view_as(loss), **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """accelerate's: DeepSpeed clips, by the ds_config, as it steps; the norm is returned.

        Raises:
            ValueError: another norm than the ds_config's, which would not be acted on.
        """
        wrapped = self.deepspeed_engine_wrapped
        own = None if wrapped is None else wrapped.engine.gradient_clipping()
        if own is not None and math.isfinite(max_norm) and (max_norm, norm_type) != (own, 2):
            raise ValueError(
                f"got max_norm {max_norm} and norm_type {norm_type} in clip_grad_norm_, where "
                f"DeepSpeed clips by the ds_config's gradient_clipping, {own}, of norm 2; expected "
                "the same; write it into the ds_config"
            )
        return super().clip_grad_norm_(parameters, max_norm, norm_type)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """accelerate's, with a part for each replica, the same on the ranks of a group."""
        replica = SimpleNamespace(
            num_processes=self.num_processes,
            process_index=int(self.state.process_index) // self.sp_size,
            device=self.device,
        )
        split = PartialState.split_between_processes
        with split(replica, inputs, apply_padding=apply_padding) as part:
            yield part

    @property
    def is_last_process(self) -> bool:
        """Of all ranks, as `on_last_process` has it."""
        return bool(self.state.is_last_process)

    def _start(self, *, model: Any, config_params: Any, **arguments: Any) -> Any:
        """What accelerate calls ``deepspeed.initialize`` for: the model that trains."""
        optimizer = arguments.get("optimizer")
        if optimizer is None:
            groups = arguments["model_parameters"] = list(arguments.get("model_parameters") or ())
        else:
            groups = optimizer.param_groups
        order = order_of(model, groups)
        returned, self._batches = self._sharded(model, config_params, **arguments)
        take_others(returned[0], order)
        self.session = returned[0].ds_lvx
        self._batches.gathers_training = self.gathers_training
        return returned

    def start_reference(self, *, model: Any, config: Any) -> Any:
        """``deepspeed.initialize`` of a model beside the one that trains, which is only asked.

        It takes whole batches as the other does, and stays until `end_training`.

        Raises:
            NotImplementedError: as of `ds_lvx.initialize`.
        """
        returned, batches = self._sharded(model, _settled(config))
        self._references = (*self._references, (returned[0].ds_lvx, batches))
        return returned

    def _sharded(self, model: Any, config: Any, **arguments: Any) -> tuple[Any, WholeBatches]:
        own = dict(config)
        if self.derives_batch_size:
            own.pop("train_batch_size", None)
        returned = initialize(model=model, config=own, **arguments)
        engine = returned[0]
        averages = engine.zero_optimization_stage() == 3
        return returned, WholeBatches(model, engine.ds_lvx, averages=averages)

    @contextmanager
    def without_logits(self) -> Iterator[None]:
        """Let forwards without gradients, but with labels, keep their logits where they are."""
        batches = self._batches
        before = batches is not None and batches.gathers_evaluation
        if batches is not None:
            batches.gathers_evaluation = batches.gathers_training
        try:
            yield
        finally:
            if batches is not None:
                batches.gathers_evaluation = before

    def gather(self, tensor: Any) -> Any:
        """accelerate's, with every replica once: the first rank of its group."""
        gathered = super().gather(tensor)
        return gathered if self.sp_size == 1 else recursively_apply(self._replicas, gathered)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """accelerate's, with every replica once: the first rank of its group."""
        if not (use_gather_object or _has_other_than_tensors(input_data)):
            return super().gather_for_metrics(input_data)
        own = input_data if self.is_first_of_replica else input_data[:0]
        return super().gather_for_metrics(own, use_gather_object=True)

    def gather_object(self, items: list[Any]) -> list[Any]:
        """``accelerate.utils.gather_object``, with every replica once: its first rank's."""
        gathered: list[Any] = gather_object(items if self.is_first_of_replica else [])
        return gathered

    def agree_on_failure(self, error: Exception | None) -> None:
        """Raise on all ranks where one of them has failed."""
        self._groups.world_channel.agree({}, error)

    @property
    def _groups(self) -> SequenceParallelGroups:
        assert self.session is not None, "the model is not prepared"
        return self.session.groups

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """accelerate's, with every replica once: ranks of a group hold the same value."""
        reduced = super().reduce(tensor, reduction, scale)
        if reduction != "sum" or self.sp_size == 1:
            return reduced
        return recursively_apply(lambda x: x / self.sp_size, reduced)

    def _replicas(self, gathered: Tensor) -> Tensor:
        by_rank = gathered.unflatten(0, (self.state.num_processes, -1))
        return by_rank[:: self.sp_size].flatten(0, 1)

    def free_memory(self, *objects: Any) -> Any:
        """accelerate's; the model is given back as it was."""
        self._close()
        return super().free_memory(*objects)

    def end_training(self) -> None:
        """accelerate's, after `ds_lvx.shutdown`: call it last, on every rank."""
        wrapped, self.deepspeed_engine_wrapped = self.deepspeed_engine_wrapped, None
        self._close()
        for session, batches in self._references:
            batches.remove()
            session.close()
        self._references = ()
        shutdown(None if wrapped is None else wrapped.engine)
        super().end_training()

    def _close(self) -> None:
        if self._batches is not None:
            self._batches.remove()
        if self.session is not None:
            self.session.close()
        self._batches = self.session = None


class SchedulerByReplica(AcceleratedScheduler):
    """accelerate's steps once for each process, since each has samples of its own; ours for each
    replica.

    Attributes:
        replicas: how many.
    """

    replicas = 1
    split_batches: bool

    def step(self, *args: Any, **kwargs: Any) -> None:
        """accelerate's."""
        syncs = self.gradient_state.sync_gradients
        if self.split_batches or not self.step_with_optimizer or not syncs:
            super().step(*args, **kwargs)
            return
        self.split_batches = True  # one step a call
        try:
            for _ in range(self.replicas):
                last = getattr(self.scheduler, "total_steps", math.inf)
                if self.scheduler._step_count <= last:  # OneCycle refuses more
                    super().step(*args, **kwargs)
        finally:
            self.split_batches = False


@contextmanager
def initializing_by(start: Callable[..., Any]) -> Iterator[None]:
    """Let a library start its engines by another function; in there DeepSpeed's is its own."""
    theirs = deepspeed.initialize

    def ours(**arguments: Any) -> Any:
        deepspeed.initialize = theirs
        try:
            return start(**arguments)
        finally:
            deepspeed.initialize = ours

    deepspeed.initialize = ours
    try:
        yield
    finally:
        deepspeed.initialize = theirs


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is "auto" still: it is for a model that trains."""
    return {
        key: _settled(value) if isinstance(value, Mapping) and key != SECTION else value
        for key, value in config.items()
        if value != "auto"
    }


def _seed_workers_by(replica: int, data_loader: Any) -> None:
    """Let workers of the ranks of a group draw the same random numbers (``seed_worker``)."""
    init = getattr(data_loader, "worker_init_fn", None)
    if isinstance(init, functools.partial) and "rank" in init.keywords:
        again = functools.partial(init.func, *init.args, **{**init.keywords, "rank": replica})
        data_loader.worker_init_fn = again


def _has_other_than_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return True
    return False
