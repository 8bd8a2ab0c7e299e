"""Distributed cross-attention for visual inputs that do not fit one GPU, inside DeepSpeed.

The main path is `initialize` -> `shard_batch` -> ``engine(**shard)`` -> `shutdown`. The operators
(`lv_xattn` and its peers) serve without it, on any process group.
"""

from ds_lvx.attention.checkpointing import checkpointing
from ds_lvx.attention.lvx import lv_xattn
from ds_lvx.attention.module import LVXAttention
from ds_lvx.attention.recompute import lv_xattn_recompute
from ds_lvx.attention.ring import ring_attention
from ds_lvx.attention.sequence import gather_sequence
from ds_lvx.attention.ulysses import ulysses_attention
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.distributed.shutdown import shutdown
from ds_lvx.distributed.traffic import traffic
from ds_lvx.initialize import initialize
from ds_lvx.kernels.visibility import Visibility
from ds_lvx.sharding import mean_loss, owned, shard_batch

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
