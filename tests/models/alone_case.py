"""A patched model in one process: it is its own self there, and can be given back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_lvx.config import LVXConfig
from ds_lvx.models import patch_model
from ds_lvx.sharding import shard_batch

Batch = dict[str, Any]


class OneRank:
    """Stands for the groups of a single process without ``torch.distributed``."""

    sp_size = 1


def patched_by(config: Mapping[str, Any], model: Any, *, sp_size: int = 1) -> Any:
    """The patch of a model by a ds_config."""
    groups: Any = OneRank()
    groups.sp_size = sp_size
    return patch_model(model, LVXConfig.from_ds_config(config), groups)


def insides(model: Any) -> dict[str, Any]:
    """Everything a patch could leave behind, by module."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            dict(module._forward_pre_hooks),
            dict(module._forward_pre_hooks_with_kwargs),
            dict(module._forward_hooks),
            dict(module._forward_hooks_with_kwargs),
        )
        for name, module in model.named_modules()
    }


def assert_given_back(
    make: Callable[[], Any],
    batch: Batch,
    patched: Callable[[Any], Any],
    *,
    own: Callable[[Batch], Batch] = dict,
    behind: Callable[[Any], None] = lambda model: None,
) -> None:
    """A patched model takes whole batches as before; unpatched, nothing is left in it; a copy made
    meanwhile is patched, and has weights of its own.

    Args:
        make: the same model every time.
        batch: with labels.
        patched: patches a model.
        own: the batch as the model's own code takes it.
        behind: looks at the patched model behind the forward of a sharded batch.
    """
    model, changed = make().eval(), make().eval()
    expected = model(**own(batch))  # after which code of some models has notes in its modules
    before = insides(model)
    patch = patched(model)
    copied = copy.deepcopy(model)
    out = model(**own(batch))
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    model(**shard_batch(batch, model=model))
    behind(model)
    patch.unpatch()
    assert insides(model) == before
    for parameter in (*copied.parameters(), *changed.parameters()):
        parameter.data.mul_(1.1)
    with torch.no_grad():
        theirs = copied(**shard_batch(batch, model=copied))
        torch.testing.assert_close(theirs.loss, changed(**own(batch)).loss)
