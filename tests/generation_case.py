"""Configs and batches for tests of generation."""

from __future__ import annotations

from typing import Any

from tests.models.mllama_case import Batch, ds_config, make_batch

LVX = {"method": "lvx"}


def config(sp_size: int, **settings: Any) -> dict[str, Any]:
    return {**ds_config(stage=0, sp_size=sp_size, cross=LVX, self_attn="ulysses"), **settings}


def interleaved() -> Batch:
    """Two samples with three images and one, padded on the left, text before the first image."""
    batch = make_batch([[4, 5, 9], [8]], length=13, num_tiles=[[2, 1, 2], [1]])
    batch["attention_mask"][1, :5] = 0
    batch["input_ids"][1, :5] = 0
    return batch


def blind() -> Batch:
    """A sample without images beside one with two: its tokens see no image, new ones neither."""
    batch = make_batch([[2, 5], []], length=8, num_tiles=[[1, 2], []], seed=3)
    batch["attention_mask"][0, :2] = 0
    return batch


def one_image() -> Batch:
    return make_batch([[1]], length=5, num_tiles=[[2]], seed=4)


def text_alone() -> Batch:
    batch = interleaved()
    return {key: batch[key] for key in ("input_ids", "attention_mask")}
