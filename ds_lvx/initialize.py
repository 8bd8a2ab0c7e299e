"""The main path: a ds_config becomes groups, a patched model and a DeepSpeed engine.

`apply` goes half of it: a patched model, for inference or a trainer of one's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT as DEFAULT_PORT
from torch import nn

from ds_lvx.attention.auto import CLUSTERS
from ds_lvx.config import LVXConfig, by_path, check_ds_config, read_ds_config
from ds_lvx.config.activation_checkpointing import ActivationCheckpointing
from ds_lvx.config.activation_checkpointing import forget as forget_checkpoints
from ds_lvx.config.words import in_ranks
from ds_lvx.distributed.channel import Channel, is_initialized
from ds_lvx.distributed.failures import Guard
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.shutdown import remember
from ds_lvx.distributed.slurm import read_slurm
from ds_lvx.distributed.start import init_distributed, remove_shared_memory
from ds_lvx.kernels import flash_version
from ds_lvx.models import patch_model
from ds_lvx.models.layers import explain_auto, table
from ds_lvx.models.patch import Patch, ScaleLoss
from ds_lvx.models.precision import check_packed, keep_layout

_WHAT = "ds_lvx.initialize"


class Session:
    """What `initialize` made besides the engine, at ``engine.ds_lvx``, or what `apply` made.

    Attributes:
        config: the ``ds_lvx`` section.
        groups: the process groups, also DeepSpeed's ``mpu``.
        patch: what was done to the model.
        checkpoints: the ``activation_checkpointing`` section, or None.
        guard: names the rank that runs out of memory.
    """

    def __init__(
        self,
        config: LVXConfig,
        groups: SequenceParallelGroups,
        patch: Patch,
        checkpoints: ActivationCheckpointing | None,
        *,
        owns_groups: bool = True,
    ) -> None:
        self.config = config
        self.checkpoints = checkpoints
        self.groups = groups
        self.patch = patch
        self._owns_groups = owns_groups
        self.guard = Guard(groups)
        self._activated = flash_version.activate(config.flash_attention)

    def close(self) -> None:
        """Give the model back as it was and end the groups, but not those that `apply` was given.

        Calling it twice is allowed.
        """
        self.guard.close()
        if self._activated:
            flash_version.restore()
        self.patch.unpatch()
        forget_checkpoints(self.groups)
        if self._owns_groups:
            self.groups.close()


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` for a model whose visual tokens are sharded.

    Reads the ``ds_lvx`` section of the ds_config, makes the sequence-parallel groups, patches the
    instance ``model`` and hands everything on to DeepSpeed. Rank 0 prints how each layer runs.
    ``engine.backward(out.loss)`` then gives the gradients of one process at any ZeRO stage, and
    a section ``activation_checkpointing`` checkpoints the layers (`ds_lvx.checkpointing`).

    Args:
        args, model, optimizer, model_parameters, training_data, lr_scheduler, distributed_port,
            dist_init_required, collate_fn, config, config_params: as in ``deepspeed.initialize``.
        mpu, mesh_param: must stay None; the groups are the mpu.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``; ``engine.ds_lvx`` is the `Session`.

    Raises:
        ValueError: a mistake in the config, on all ranks; ranks that were given different ones.
        NotImplementedError: a model of no supported family, or a combination that does not exist.
        RankOutOfMemoryError: names its rank and the size, here as in the engine's own calls.

    Collectives: making the groups, and agreements on the control plane; then DeepSpeed's.
    """

    def source() -> Any:
        if not isinstance(model, nn.Module) or mpu is not None or mesh_param is not None:
            raise ValueError(
                f"got model of type {type(model).__name__}, mpu {mpu!r}, mesh_param "
                f"{mesh_param!r}; expected a torch.nn.Module and neither mpu nor mesh_param: the "
                "groups come from ds_lvx.sequence_parallel_size in the ds_config"
            )
        given = _config_source(args, config, config_params)
        check_packed(model, read_ds_config(given))
        return given

    lvx, checkpoints = _read_config(source, port=distributed_port, what=_WHAT)
    assert model is not None
    return _start(
        lvx,
        checkpoints,
        model,
        args=args,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        config_params=config_params,
    )


def apply(
    model: nn.Module, config: Any, *, groups: SequenceParallelGroups | None = None
) -> Session:
    """Patch a model as `initialize` does, without an engine: for `ds_lvx.generate`, evaluation, or
    another trainer, which then calls ``model(**ds_lvx.shard_batch(batch, model=model))``.

    Starts ``torch.distributed`` where it does not run, makes the sequence-parallel groups, and
    patches the instance ``model``. The first rank prints how each layer runs.

    Args:
        model: a supported model, or one inside wrappers, on the device where it is to compute.
        config: a ds_config, its path or a dict; of it the sections ``ds_lvx`` and
            ``activation_checkpointing`` are used.
        groups: groups to use, of the config's ``sequence_parallel_size``; None makes new ones.

    Returns:
        The `Session`; ``close()`` gives the model back as it was, and ends groups made here.

    Raises:
        ValueError, NotImplementedError: as `initialize`, on all ranks.

    Collectives: making the groups, and agreements on the control plane.
    """

    def source() -> Any:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"got model of type {type(model).__name__}; expected a torch.nn.Module"
            )
        return config

    lvx, checkpoints = _read_config(source, port=DEFAULT_PORT, what="ds_lvx.apply", groups=groups)
    used = SequenceParallelGroups(lvx.sequence_parallel_size) if groups is None else groups
    try:
        patch = _patch_on_all_ranks(model, lvx, used, checkpoints, what="ds_lvx.apply")
        session = Session(lvx, used, patch, checkpoints, owns_groups=groups is None)
        if checkpoints is not None:
            checkpoints.configure(used)
    except BaseException:
        if groups is None:
            used.close()
        raise
    return session


def _start(
    lvx: LVXConfig,
    checkpoints: ActivationCheckpointing | None,
    model: nn.Module,
    **arguments: Any,
) -> tuple[Any, Any, Any, Any]:
    """Make the groups, patch the model, and let DeepSpeed make the engine."""
    groups = SequenceParallelGroups(lvx.sequence_parallel_size)
    session = None
    try:
        patch = _patch_on_all_ranks(model, lvx, groups, checkpoints, what=_WHAT)
        session = Session(lvx, groups, patch, checkpoints)
        if checkpoints is not None:
            checkpoints.configure(groups)
        remember(model)  # what DeepSpeed hangs on it, should it come no further
        with session.guard.named("deepspeed.initialize"):
            returned = deepspeed.initialize(model=model, mpu=groups, **arguments)
    except BaseException:
        # Whoever catches the error gets the model back as it was.
        (groups if session is None else session).close()
        raise
    engine = returned[0]
    _scale_loss(session, stage=engine.zero_optimization_stage())
    session.guard.watch(engine)
    engine.ds_lvx = session
    return returned


def _config_source(args: Any, config: Any, config_params: Any) -> Any:
    """The ds_config, from where DeepSpeed would take it."""
    source = config_params if config is None else config
    from_args = getattr(args, "deepspeed_config", None)
    if source is None and from_args is None:
        raise ValueError(
            "got no ds_config; expected config= (a path or a dict), or args.deepspeed_config"
        )
    if source is not None and from_args is not None:
        raise ValueError("got config= and args.deepspeed_config; expected one of them")
    return from_args if source is None else source


def _read_config(
    source: Callable[[], Any],
    *,
    port: int,
    what: str,
    groups: SequenceParallelGroups | None = None,
) -> tuple[LVXConfig, ActivationCheckpointing | None]:
    """Read the config on every rank, start ``torch.distributed``, and compare what was read.

    What the caller got wrong otherwise, ``source`` or groups of another size, is told with it.
    """
    lvx, checkpoints = None, None
    error: Exception | None = None
    try:
        given = source()
        ds_config = read_ds_config(given)
        lvx = LVXConfig.from_ds_config(given if isinstance(given, str) else ds_config)
        if groups is not None and groups.sp_size != lvx.sequence_parallel_size:
            raise ValueError(
                f"got groups of {in_ranks(groups.sp_size)} for ds_lvx.sequence_parallel_size "
                f"{lvx.sequence_parallel_size}; expected the same: leave groups out, or change one"
            )
        checkpoints = ActivationCheckpointing.from_ds_config(ds_config)
        check_ds_config(ds_config, sequence_parallel_size=lvx.sequence_parallel_size)
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as caught:  # noqa: BLE001
        error = caught
    if error is not None and not is_initialized() and "RANK" not in os.environ and not read_slurm():
        raise error  # no launcher started this process: there is nobody to tell
    init_distributed(distributed_port=port)
    world = Channel.world()
    world.agree({}, error)
    remove_shared_memory()
    assert lvx is not None
    ours = {"ds_lvx": lvx.model_dump()}  # keys that one rank leaves out and another spells out
    if checkpoints is not None:
        ours["activation_checkpointing"] = checkpoints.model_dump()
    world.agree_on(by_path({**ds_config, **ours}), what=what)
    lvx.check_world_size(world.size)
    return lvx, checkpoints


def _patch_on_all_ranks(
    model: nn.Module,
    config: LVXConfig,
    groups: SequenceParallelGroups,
    checkpoints: ActivationCheckpointing | None,
    *,
    what: str,
) -> Patch:
    patch, error = None, None
    try:
        patch = patch_model(model, config, groups, checkpoints=checkpoints)
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as caught:  # noqa: BLE001
        error = caught
    # Only the lines of the table travel; a model may have hundreds of layers.
    lines = "" if patch is None else table(patch.plans)
    try:
        groups.world_channel.agree({}, error)
        groups.world_channel.agree_on({"layers": lines}, what=what)
    except BaseException:
        if patch is not None:
            patch.unpatch()
        raise
    assert patch is not None
    keep_layout(model)
    for size in sorted({plan.ulysses for plan in patch.plans if plan.ulysses is not None}):
        groups.divide(size)
    explanation = _explain_auto(patch, groups)
    if groups.world_channel.rank == 0:
        print(f"ds_lvx: {groups.dp_size} x {in_ranks(groups.sp_size)} (data x sequence parallel)")
        print("\n".join([lines, *explanation]), flush=True)
    return patch


def _explain_auto(patch: Patch, groups: SequenceParallelGroups) -> list[str]:
    """Agree on what the planner goes by, where it has to choose; lines for the start table."""
    is_open = any(p.wanted.is_open and p.kind != "local" for p in patch.plans)
    if groups.sp_size == 1 or not is_open:
        return []
    device = torch.device(get_accelerator().device_name())
    # One answer for all replicas, though their hosts may know different ones.
    cluster = CLUSTERS.of(groups.channel, device, over=groups.world_channel)
    return explain_auto(patch.layers, patch.plans, cluster, sp_size=groups.sp_size)


def _scale_loss(session: Session, *, stage: int) -> None:
    """Make up for ZeRO-3, which averages gradients over the group where stages 0 to 2 sum."""
    if stage == 3 and session.groups.sp_size > 1:
        hook = ScaleLoss(float(session.groups.sp_size))
        session.patch.model.register_forward_hook(hook, with_kwargs=True)
