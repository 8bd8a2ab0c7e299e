"""An image or a video among the text that ends its sample, so that no token of the text sees it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models import (
    blip_case,
    concatenated_case,
    gemma3_case,
    gemma4_case,
    glm4v_case,
    internvl_case,
    llava_onevision_case,
    qwen2_5_vl_case,
    qwen2_vl_case,
    qwen3_5_case,
    qwen3_vl_case,
    qwen3_vl_moe_case,
    qwen_vl_case,
    video_llama_3_case,
)
from tests.models.mllama_case import assert_same_training, plain_step, reference_steps
from tests.ranks import run_ranks

FRAMES, TILES = [[5, (1, 2, 2)], [3, (2, 2, 2), 1]], [[5, (1,)], [3, (1, 1), 2]]
CASES: dict[str, tuple[Any, list[Any]]] = {
    # the family, and the samples of a batch
    "qwen2_5_vl": (qwen2_5_vl_case, FRAMES),
    "qwen2_vl": (qwen2_vl_case, FRAMES),
    "qwen3_vl": (qwen3_vl_case, FRAMES),
    "qwen3_vl_moe": (qwen3_vl_moe_case, FRAMES),
    "qwen3_5": (qwen3_5_case, FRAMES),
    "glm4v": (glm4v_case, [[5, (1, 2, 2)], [3, (1, 2, 2), 1]]),
    "gemma3": (gemma3_case, TILES),
    "video_llama_3": (video_llama_3_case, FRAMES),
    "gemma4": (gemma4_case, [[5, (2, 3)], [3, [(1, 2), (1, 2)], 2]]),
    "internvl": (internvl_case, TILES),
    "llava_onevision": (llava_onevision_case, [[5, (10, 30)], [3, "video", 2]]),
    "blip-2": (blip_case, [".....i", ".i...."]),
    "qwen": (qwen_vl_case, [".....i", ".i...."]),
}
NEVER = "pos_embed"  # of a resampler: it has no gradient in one process, and one of zeros here


def step_each() -> dict[str, dict[str, Any]]:
    found = {}
    for name, (case, samples) in CASES.items():
        if hasattr(case, "ds_config"):
            config = case.ds_config(stage=0, sp_size=2, self_attn="ring")
        else:
            config = concatenated_case.rules(name, "lvx", 2)
        found[name] = plain_step(config, case.make_batch(samples), model=case.tiny_model())
    return found


@pytest.mark.slow
def test_a_medium_that_no_text_sees_equals_one_process() -> None:
    results = run_ranks(step_each, 2)
    for name, (case, samples) in CASES.items():
        batch = case.make_batch(samples)
        mine = [each[name] for each in results]
        if name == "qwen":  # whose own forward opens files
            del batch["pixel_values"]
            for result in mine:
                result["grads"] = {k: v for k, v in result["grads"].items() if NEVER not in k}
        expected = reference_steps([[batch]], case.tiny_model())
        try:
            assert_same_training(mine, expected, sp_size=2)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
