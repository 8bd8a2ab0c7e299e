"""DeepSpeed's `activation_checkpointing` section: checked, and put into force.

DeepSpeed reads the section only when a script calls ``deepspeed.checkpointing.configure`` itself,
and takes unknown keys in silence. Here the section's presence means that the model's layers are
checkpointed, as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_lvx.config.words import key_path, nearest, shown
from ds_lvx.distributed.groups import SequenceParallelGroups

SECTION = "activation_checkpointing"


class ActivationCheckpointing(BaseModel):
    """The section, with DeepSpeed's keys and defaults."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    partition_activations: bool = False
    """Split what a checkpoint keeps over the model-parallel ranks. ds_lvx's mpu has one of them,
    so nothing is split; `contiguous_memory_optimization` needs it."""

    contiguous_memory_optimization: bool = False
    """Keep the checkpoints in one buffer, against fragmentation; needs `number_checkpoints`."""

    cpu_checkpointing: bool = False
    """Keep the checkpoints in host memory; needs an accelerator that is not the CPU."""

    number_checkpoints: int | None = Field(default=None, ge=1)
    """Room of the contiguous buffer: at least the text layers of one forward."""

    synchronize_checkpoint_boundary: bool = False
    """Wait for the device at every checkpoint's beginning and end."""

    profile: bool = False
    """Log the time of every checkpoint's forward and backward."""

    @classmethod
    def from_ds_config(cls, ds_config: Mapping[str, Any]) -> ActivationCheckpointing | None:
        """Read the section of a ds_config; None when there is none.

        Raises:
            ValueError: an unknown key or a bad value, named by its path, or settings that exclude
                each other.
            NotImplementedError: what DeepSpeed cannot do on this machine's accelerator.
        """
        if SECTION not in ds_config:
            return None
        section = ds_config[SECTION]
        if not isinstance(section, Mapping):
            raise ValueError(
                f"{SECTION}: got {shown(section)}, expected an object such as {{}}, which "
                "checkpoints every layer"
            )
        try:
            found = cls.model_validate(dict(section))
        except ValidationError as error:
            raise ValueError("\n".join(_explained(error))) from None
        problems = list(found._problems())
        if problems:
            raise ValueError("\n".join(problems))
        if found.cpu_checkpointing and get_accelerator().device_name() == "cpu":
            raise NotImplementedError(
                f"{SECTION}.cpu_checkpointing: got true on DeepSpeed's CPU accelerator, where it "
                "does not work: checkpoints are in host memory already; remove the key, or set it "
                "to false"
            )
        return found

    def _problems(self) -> Iterator[str]:
        if not self.contiguous_memory_optimization:
            return
        if not self.partition_activations:
            yield (
                f"{SECTION}.contiguous_memory_optimization: got true without "
                'partition_activations, which DeepSpeed wants with it; add "partition_activations":'
                " true"
            )
        if self.number_checkpoints is None:
            yield (
                f"{SECTION}.contiguous_memory_optimization: got true without number_checkpoints, "
                "the room of its buffer; set number_checkpoints to the number of text layers"
            )

    @property
    def empties_arguments(self) -> bool:
        """Whether DeepSpeed empties a checkpoint's arguments once they are saved."""
        return self.partition_activations or self.cpu_checkpointing

    def check_layers(self, count: int) -> None:
        """Raise a ValueError where the contiguous buffer is too small for ``count`` text layers."""
        room = self.number_checkpoints
        if self.contiguous_memory_optimization and room is not None and room < count:
            raise ValueError(
                f"{SECTION}.number_checkpoints: got {room} for {count} text layers; expected at "
                f"least {count}, or twice as many when two forwards run before a backward"
            )

    def make_room(self, count: int) -> None:
        """Start a new contiguous buffer where the present one has no room for ``count`` layers.

        DeepSpeed starts one in backward only; a forward that failed, or whose loss was dropped,
        would leave the next one without. Checkpoints that still wait hold on to their own memory.
        """
        if not self.contiguous_memory_optimization or self.number_checkpoints is None:
            return
        used = max(deepspeed.checkpointing.data_offsets, default=0)
        if used + count > self.number_checkpoints:
            deepspeed.checkpointing.reset()

    def configure(self, groups: SequenceParallelGroups) -> None:
        """Put the section into force in this process, where DeepSpeed has one for all engines.

        Raises:
            ValueError: the engine of another section is still there.
        """
        others = [section for section in _in_force.values() if section != self]
        if others:
            raise ValueError(
                f"{SECTION}: got {self.model_dump_json()} while an engine with "
                f"{others[0].model_dump_json()} is there; DeepSpeed has one setting a process: "
                "call ds_lvx.shutdown on that engine first, or give both the same section"
            )
        _in_force[groups] = self
        deepspeed.checkpointing.configure(
            groups,
            partition_activations=self.partition_activations,
            contiguous_checkpointing=self.contiguous_memory_optimization,
            num_checkpoints=self.number_checkpoints,
            checkpoint_in_cpu=self.cpu_checkpointing,
            synchronize=self.synchronize_checkpoint_boundary,
            profile=self.profile,
        )


# The sections of the engines that are there: DeepSpeed's settings are the process's.
_in_force: dict[SequenceParallelGroups, ActivationCheckpointing] = {}


def forget(groups: SequenceParallelGroups) -> None:
    """Undo `ActivationCheckpointing.configure`; with the last engine go DeepSpeed's settings."""
    if _in_force.pop(groups, None) is None or _in_force:
        return
    module = deepspeed.checkpointing
    module.reset()
    module.configure(None)
    module.deepspeed_checkpointing_enabled = False
    module.mpu = module.mp_group = None
    module.mp_rank, module.mp_size = 0, 1


def _explained(error: ValidationError) -> Iterator[str]:
    known = list(ActivationCheckpointing.model_fields)
    for details in error.errors():
        path = f"{SECTION}.{key_path(details['loc'])}"
        if details["type"] == "extra_forbidden":
            found = nearest(str(details["loc"][-1]), known)
            hint = "" if found is None else f' (did you mean "{found}"?)'
            yield f"{path}: unknown key{hint}; the keys are {', '.join(known)}"
        else:
            yield f"{path}: got {shown(details['input'])}; {details['msg']}"
