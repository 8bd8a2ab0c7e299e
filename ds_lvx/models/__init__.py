"""Model families: how a model is patched and how its batch is sharded.

`contract` says what a family has to offer, and `media` what of it is about images and videos;
`registry` says which families there are, a folder each. All else serves every family:

- A batch: `text` and `visual` are what it holds, `draft` is a rank's part of it before the ranks
  agree, `shard` what goes to the device then, `batch` the keyword that goes along to the layers.
- A model: `prepare` patches it, by what `patch` has. `layers` says which method runs in which
  layer, `attend` runs it, and `dispatch` comes before it in text of transformers.
- ``generating/``: what `ds_lvx.generate` begins with, keeps and tells the other ranks.
- For tools: `dimensions` for the planner; `size`, `sized` and `random_weights` for measuring;
  `remote` and `parts` for loading; `shares` for telling what a rank holds.

Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_lvx.models.contract import Family
from ds_lvx.models.registry import FAMILIES, family_of, register_family

if TYPE_CHECKING:
    from torch import nn

    from ds_lvx.config import LVXConfig
    from ds_lvx.config.activation_checkpointing import ActivationCheckpointing
    from ds_lvx.distributed.groups import SequenceParallelGroups
    from ds_lvx.models.patch import Patch

__all__ = ["FAMILIES", "Family", "family_of", "patch_model", "register_family"]


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
    from ds_lvx.models.checkpointed_layers import CheckpointLayers
    from ds_lvx.models.prepare import patch

    family, inside = family_of(model)
    made = patch(family, inside, config, sp_size=groups.sp_size)
    try:
        hook = CheckpointLayers(made.model, checkpoints, family.encoders(inside))
    except BaseException:
        made.unpatch()
        raise
    made.model.register_forward_pre_hook(hook, with_kwargs=True)
    return made
