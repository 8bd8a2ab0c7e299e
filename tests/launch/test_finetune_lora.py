"""LoRA on linear layers or embeddings, and modules that train whole, as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.finetune_runs import arguments, finetune, metrics
from tests.launch.test_after_finetune import write_config
from tests.ranks import run_ranks


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "targets", "saved"),
    [
        ("qwen2_5_vl", "all-linear", "visual.merger"),
        ("idefics", "all-linear", "perceiver_resampler.layer_norm"),
        ("llava_onevision", "all-linear", "multi_modal_projector"),
        ("qwen2_5_vl", "q_proj,embed_tokens", "lm_head"),
    ],
)
def test_what_lora_is_asked_for_trains_as_in_one_process(
    name: str, targets: str, saved: str, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4")
    write_image(tmp_path / "a.png", (80, 60))
    asked = ("text", "What animal is it, and where?")
    first, second = chat(("video", "a.mp4"), asked), chat(("image", "a.png"), asked, answer="No.")
    data = write_jsonl(tmp_path / "train.jsonl", first, second)
    sharded = write_config(name, tmp_path / "ds.json")
    config = json.loads(sharded.read_text())
    whole = config | {"ds_lvx": {"sequence_parallel_size": 1}}
    sharded.write_text(json.dumps(config | {"ds_lvx": config["ds_lvx"] | {"loss_tiles": 2}}))
    (tmp_path / "one.json").write_text(json.dumps(whole))
    rows = []
    for ranks, config in ((2, sharded), (1, tmp_path / "one.json")):
        words = arguments(
            model=f"tiny:{name}",
            data=data,
            frames=3,
            deepspeed_config=config,
            output_dir=tmp_path / str(ranks),
            max_steps=4,
            learning_rate=3e-2,
            lora_r=4,
            lora_target_modules=targets,
            lora_modules_to_save=saved,
        )
        run_ranks(finetune, ranks, *words)
        rows.append(metrics(tmp_path / str(ranks))[0])
    for found, expected in zip(*rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), (key, found["step"])
