"""Model families: how a model is patched and how its batch is sharded.

A family is a module of functions (see `Family`); it is imported when a model of it turns up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from torch import nn

from ds_lvx.config import LVXConfig
from ds_lvx.config.activation_checkpointing import ActivationCheckpointing
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models.checkpointed_layers import CheckpointLayers
from ds_lvx.models.layers import Layer
from ds_lvx.models.patch import Patch, unpatch

__all__ = ["FAMILIES", "Family", "Patch", "family_of", "patch_model", "unpatch"]

FAMILIES: Mapping[str, str] = {"mllama": "ds_lvx.models.mllama"}
"""``config.model_type`` of transformers -> the module that knows the family."""


class Family(Protocol):
    """What a family's module offers."""

    def find(self, model: nn.Module) -> Any:
        """The family's model inside ``model``, wrappers removed, or None."""

    def attention_layers(self, model: Any) -> list[Layer]:
        """Every attention module of the model."""

    def encoders(self, model: Any) -> Sequence[nn.Module]:
        """Encoders of images whose ``layers`` transformers does not checkpoint itself."""

    def patch(self, model: Any, config: LVXConfig, groups: SequenceParallelGroups) -> Patch:
        """Patch the model's instances."""

    def shard(
        self,
        batch: Mapping[str, Any],
        model: Any,
        *,
        channel: Channel,
        frames: str,
        always_vision: bool,
    ) -> dict[str, Any]:
        """This rank's shard of a batch."""


def family_of(model: nn.Module) -> tuple[Family, Any]:
    """The family of a model, and the model itself inside its wrappers (peft, an engine).

    Raises:
        NotImplementedError: no family that is supported.
    """
    types = {getattr(getattr(m, "config", None), "model_type", None) for m in model.modules()}
    for model_type, path in FAMILIES.items():
        if model_type in types:
            family = cast(Family, import_module(path))
            inside = family.find(model)
            if inside is not None:
                return family, inside
    raise NotImplementedError(
        f"got a model of class {type(model).__name__}; expected one of the supported families, or "
        f"a model that wraps one: {', '.join(sorted(FAMILIES))} (MllamaForConditionalGeneration)"
    )


def patch_model(
    model: nn.Module,
    config: LVXConfig,
    groups: SequenceParallelGroups,
    *,
    checkpoints: ActivationCheckpointing | None = None,
) -> Patch:
    """Make the attention of this instance run as the config says.

    Class, parameter names, state dict and ``save_pretrained`` stay as they were. A forward without
    the keyword that `ds_lvx.shard_batch` adds is the model's own (with one rank a sample) or an
    error (with more).

    Args:
        model: a supported model, or one inside wrappers.
        config: the rules; patterns match names inside the supported model, without wrappers.
        groups: the sequence-parallel groups that will share batches.
        checkpoints: how to checkpoint the layers; None leaves it to transformers'
            ``gradient_checkpointing_enable``. Attention runs once either way.

    Returns:
        The `Patch`; its ``unpatch()`` undoes everything.

    Raises:
        ValueError, NotImplementedError: what `ds_lvx.initialize` raises for a model.
    """
    family, inside = family_of(model)
    patch = family.patch(inside, config, groups)
    try:
        hook = CheckpointLayers(patch.model, checkpoints, family.encoders(inside))
    except BaseException:
        patch.unpatch()
        raise
    patch.model.register_forward_pre_hook(hook, with_kwargs=True)
    return patch
