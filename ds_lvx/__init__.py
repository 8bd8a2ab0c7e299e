"""Distributed cross-attention for visual inputs that do not fit one GPU, inside DeepSpeed.

The main path is `initialize` -> `shard_batch` -> ``engine(**shard)`` -> `shutdown`. The operators
(`lv_xattn` and its peers) serve without it, on any process group.
"""

from ds_lvx.attention import (
    LVXAttention,
    gather_sequence,
    lv_xattn,
    lv_xattn_recompute,
    ring_attention,
    ulysses_attention,
)
from ds_lvx.checkpointing import checkpointing
from ds_lvx.config import LVXConfig
from ds_lvx.counting import traffic
from ds_lvx.groups import SequenceParallelGroups
from ds_lvx.initialize import initialize
from ds_lvx.sharding import mean_loss, owned, shard_batch
from ds_lvx.shutdown import shutdown
from ds_lvx.visibility import Visibility

__all__ = [
    "LVXAttention",
    "LVXConfig",
    "SequenceParallelGroups",
    "Visibility",
    "checkpointing",
    "gather_sequence",
    "initialize",
    "lv_xattn",
    "lv_xattn_recompute",
    "mean_loss",
    "owned",
    "ring_attention",
    "shard_batch",
    "shutdown",
    "traffic",
    "ulysses_attention",
]
