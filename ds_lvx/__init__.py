"""Distributed cross-attention for visual inputs that do not fit one GPU, inside DeepSpeed.

The main path is `initialize` -> `shard_batch` -> ``engine(**shard)`` -> `shutdown`; `generate` asks
the trained model, or one that `apply` has patched. The operators (`lv_xattn` and its peers) serve
without it, on any process group.

`ds_lvx.trainer` and `ds_lvx.accelerate` have the classes of transformers and accelerate for models
of ours.

A public name is imported when it is first asked for: the command ``ds-lvx`` needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_lvx.attention.checkpointing import checkpointing
    from ds_lvx.attention.hybrid import hybrid_attention
    from ds_lvx.attention.lvx import lv_xattn
    from ds_lvx.attention.merge import merge_attention
    from ds_lvx.attention.module import LVXAttention
    from ds_lvx.attention.recompute import lv_xattn_recompute
    from ds_lvx.attention.ring import ring_attention
    from ds_lvx.attention.sequence import gather_sequence
    from ds_lvx.attention.ulysses import ulysses_attention
    from ds_lvx.attention.zigzag import zigzag
    from ds_lvx.config import LVXConfig
    from ds_lvx.distributed.groups import SequenceParallelGroups
    from ds_lvx.distributed.shutdown import shutdown
    from ds_lvx.distributed.traffic import traffic
    from ds_lvx.generation import generate
    from ds_lvx.initialize import apply, initialize
    from ds_lvx.kernels.visibility import Visibility
    from ds_lvx.models.registry import register_family
    from ds_lvx.sharding import mean_loss, owned, shard_batch

__all__ = [
    "LVXAttention",
    "LVXConfig",
    "SequenceParallelGroups",
    "Visibility",
    "apply",
    "checkpointing",
    "gather_sequence",
    "generate",
    "hybrid_attention",
    "initialize",
    "lv_xattn",
    "lv_xattn_recompute",
    "mean_loss",
    "merge_attention",
    "owned",
    "register_family",
    "ring_attention",
    "shard_batch",
    "shutdown",
    "traffic",
    "ulysses_attention",
    "zigzag",
]

_HOMES = {
    "LVXAttention": "attention.module",
    "LVXConfig": "config",
    "SequenceParallelGroups": "distributed.groups",
    "Visibility": "kernels.visibility",
    "apply": "initialize",
    "checkpointing": "attention.checkpointing",
    "gather_sequence": "attention.sequence",
    "generate": "generation",
    "hybrid_attention": "attention.hybrid",
    "initialize": "initialize",
    "lv_xattn": "attention.lvx",
    "lv_xattn_recompute": "attention.recompute",
    "mean_loss": "sharding",
    "merge_attention": "attention.merge",
    "owned": "sharding",
    "register_family": "models.registry",
    "ring_attention": "attention.ring",
    "shard_batch": "sharding",
    "shutdown": "distributed.shutdown",
    "traffic": "distributed.traffic",
    "ulysses_attention": "attention.ulysses",
    "zigzag": "attention.zigzag",
}

# Of packages that need not be installed: they are no names of ``import *``.
_MODULES = ("accelerate", "trainer")


class _Package(ModuleType):
    """This package, whose submodules take no public name.

    Python makes a submodule an attribute of its package once it is imported. Without this class
    ``ds_lvx.initialize`` would be the module of that name after ``from ds_lvx.initialize import
    Session``, and the function before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # asked for once
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
