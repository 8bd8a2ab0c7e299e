"""What is wrong on one rank is said on all: models and batches of another family, grids, sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ds_lvx
from ds_lvx.models.patch import patched_attention
from ds_lvx.models.registry import BUILT_IN
from ds_lvx.sharding import shard_batch
from tests.models import (
    blip_case,
    concatenated_case,
    gemma3_case,
    gemma4_case,
    glm4v_case,
    glm4v_moe_case,
    idefics_case,
    internvl_case,
    llava_onevision_case,
    mllama_case,
    moss_vl_case,
    mplugowl3_case,
    openflamingo_case,
    qwen2_5_vl_case,
    qwen2_vl_case,
    qwen3_5_case,
    qwen3_5_moe_case,
    qwen3_vl_case,
    qwen3_vl_moe_case,
    qwen_vl_case,
    smolvlm_case,
    t5gemma2_case,
    video_llama_3_case,
    video_llama_case,
)
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


CONFIG = idefics_case.ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn="ring")


def mistakes(rank: int) -> dict[str, str]:
    """What a rank hears; rank 1 makes them, but for the model, which is every rank's."""
    found = {"model": said(lambda: ds_lvx.apply(Idefics2(), CONFIG))}
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
    return {**found, **without_keyword()}


def without_keyword() -> dict[str, str]:
    """What is heard where layers do not hand it on, of a forward of ours and of transformers'."""
    heard = {}
    for kind, case, made in (
        ("cross", idefics_case, CONFIG),
        ("self", internvl_case, concatenated_case.rules("internvl", "ring", 2)),
    ):
        model = case.tiny_model()
        session = ds_lvx.apply(model, made)
        patched = (m for m in model.modules() if patched_attention(m) is not None)
        attention = next(m for m in patched if patched_attention(m).plan.kind == kind)
        x = torch.zeros(1, 2, attention.q_proj.in_features)
        rotary = torch.ones(1, 2, 8), torch.zeros(1, 2, 8)
        heard[kind] = said(
            lambda a=attention, x=x, r=rotary: a(x, position_embeddings=r, attention_mask=None)
        )
        session.close()
    return heard


def rank_of() -> dict[str, str]:
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
        for kind in ("cross", "self"):
            assert "_attn without the keyword 'ds_lvx'" in heard[kind], heard[kind]


CASES: dict[str, Any] = {
    # the family, and the pixels of its batches
    "mllama": (mllama_case, "pixel_values"),
    "moss_vl": (moss_vl_case, "pixel_values"),
    "idefics": (idefics_case, "pixel_values"),
    "mplugowl3": (mplugowl3_case, "pixel_values"),
    "openflamingo": (openflamingo_case, "vision_x"),
    "blip-2": (blip_case, "pixel_values"),
    "qwen": (qwen_vl_case, "pixel_values"),
    "video_llama": (video_llama_case, "images"),
    "t5gemma2": (t5gemma2_case, "pixel_values"),
    "qwen2_5_vl": (qwen2_5_vl_case, "pixel_values"),
    "qwen2_vl": (qwen2_vl_case, "pixel_values"),
    "qwen3_vl": (qwen3_vl_case, "pixel_values"),
    "qwen3_vl_moe": (qwen3_vl_moe_case, "pixel_values"),
    "qwen3_5": (qwen3_5_case, "pixel_values"),
    "qwen3_5_moe": (qwen3_5_moe_case, "pixel_values"),
    "glm4v": (glm4v_case, "pixel_values"),
    "glm4v_moe": (glm4v_moe_case, "pixel_values"),
    "gemma3": (gemma3_case, "pixel_values"),
    "video_llama_3": (video_llama_3_case, "pixel_values"),
    "gemma4": (gemma4_case, "pixel_values"),
    "internvl": (internvl_case, "pixel_values"),
    "smolvlm": (smolvlm_case, "pixel_values"),
    "llava_onevision": (llava_onevision_case, "pixel_values"),
}


def misfits() -> dict[str, dict[str, str]]:
    """What a rank hears of each family: on rank 1 pixels are missing, or of another family."""
    wrong, heard = torch.distributed.get_rank() == 1, {}
    for name, (case, pixels) in CASES.items():
        model, batch = case.tiny_model(), case.hard_batch()
        short = {**batch, pixels: batch[pixels][..., :-1]}
        other = {**batch, "vision_x" if pixels == "images" else "images": batch[pixels]}
        heard[name] = {
            kind: said(lambda: shard_batch(given if wrong else batch, model=model))  # noqa: B023
            for kind, given in (("pixels", short), ("processor", other))
        }
    return heard


@pytest.mark.slow
def test_pixels_that_do_not_fit_are_told_on_all_ranks_by_every_family() -> None:
    for heard in run_ranks(misfits, 2):
        assert heard.keys() == CASES.keys()
        for name, (_, pixels) in CASES.items():
            found = heard[name]
            assert re.match(rf"ValueError: rank 1: got .*{pixels}", found["pixels"]), (name, found)
            assert re.match(
                r"ValueError: rank 1: got '(images|vision_x)' in the batch; expected only",
                found["processor"],
            ), (name, found)


def test_every_family_is_asked() -> None:
    alike = {"instructblip", "instructblipvideo", "idefics3", "glm46v"}
    assert BUILT_IN.keys() - alike == CASES.keys()
