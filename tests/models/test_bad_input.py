"""What is wrong on one rank is said on all: models and batches of another family, grids, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import ds_lvx
from ds_lvx.sharding import shard_batch
from tests.models import idefics_case, moss_vl_case, qwen2_5_vl_case
from tests.ranks import run_ranks


class Idefics2(nn.Module):
    """A model that there is no family of."""

    model_type = "idefics2"


def said(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mistakes(rank: int) -> dict[str, str]:
    """What a rank hears; rank 1 makes them, but for the model, which is every rank's."""
    config = idefics_case.ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ring")
    found = {"model": said(lambda: ds_lvx.apply(Idefics2(), config))}
    other = idefics_case.hard_batch() if rank == 0 else qwen2_5_vl_case.hard_batch()
    found["batch"] = said(lambda: shard_batch(other, model=idefics_case.tiny_model()))
    for name, case, of_grid in (
        ("moss_vl", moss_vl_case, "grid_thw"),
        ("qwen2_5_vl", qwen2_5_vl_case, "image_grid_thw"),
    ):
        batch: dict[str, Any] = case.hard_batch()
        if rank == 1:
            grids = batch[of_grid].clone()
            grids[0, 2] *= 2
            batch[of_grid] = grids
        found[name] = said(
            lambda batch=batch, case=case: shard_batch(batch, model=case.tiny_model())
        )
    return found


def rank_of() -> dict[str, str]:
    import torch

    return mistakes(torch.distributed.get_rank())


def test_what_one_rank_gets_wrong_is_said_on_all() -> None:
    for heard in run_ranks(rank_of, 2):
        assert "class Idefics2; expected one of the model types mllama, " in heard["model"]
        assert "did you mean 'idefics'? for another see ds_lvx.register_family" in heard["model"]
        assert heard["batch"].startswith("ValueError: rank 1: got '"), heard["batch"]
        assert "in the batch; expected" in heard["batch"]
        assert "rank 1: got" in heard["moss_vl"], heard["moss_vl"]
        assert "grid_thw" in heard["moss_vl"]
        assert "rank 1: got" in heard["qwen2_5_vl"], heard["qwen2_5_vl"]
        assert "image_grid_thw" in heard["qwen2_5_vl"]
