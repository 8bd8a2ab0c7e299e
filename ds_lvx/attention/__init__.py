"""Distributed attention: one file a method."""

from ds_lvx.attention.lvx import lv_xattn
from ds_lvx.attention.module import LVXAttention
from ds_lvx.attention.recompute import lv_xattn_recompute
from ds_lvx.attention.ring import ring_attention
from ds_lvx.attention.sequence import gather_sequence
from ds_lvx.attention.ulysses import ulysses_attention

__all__ = [
    "LVXAttention",
    "gather_sequence",
    "lv_xattn",
    "lv_xattn_recompute",
    "ring_attention",
    "ulysses_attention",
]
