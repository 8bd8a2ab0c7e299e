from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoModelForImageTextToText

from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import parse
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import (
    arguments,
    finetune,
    metrics,
    one_process_loss,
    one_process_samples,
    one_process_training,
    write_config,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
FRAMES = 5
SAVED = "multi_modal_projector"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, four samples to train on and three to evaluate on."""
    folder = tmp_path_factory.mktemp("finetune")
    write_checkpoint(folder / "checkpoint")
    write_video(folder / "a.mp4")
    write_video(folder / "b.mp4", frames=3)
    write_image(folder / "a.png", (100, 40))
    write_image(folder / "b.png", (40, 40), colour=255)
    samples = [
        chat(("video", "a.mp4"), ("text", "What animal?"), answer="A big rabbit."),
        chat(("image", "a.png"), ("text", "Where is it?"), answer="In a green meadow."),
        chat(("video", "b.mp4"), ("image", "a.png"), ("text", "And now?"), answer="A butterfly."),
        chat(("text", "Look"), ("video", "b.mp4"), ("text", "here"), answer="It is green."),
    ]
    # Two groups of images: the second question does not see those of the first.
    samples[1]["messages"] += chat(("image", "b.png"), ("text", "And?"), answer="Blue")["messages"]
    write_jsonl(folder / "train.jsonl", *samples)
    write_jsonl(folder / "eval.jsonl", *samples[1:])
    return folder


def _arguments(folder: Path, out: Path, config: str, **options: object) -> list[str]:
    given = {
        "model": folder / "checkpoint",
        "data": folder / "train.jsonl",
        "frames": FRAMES,
        "deepspeed_config": config,
        "output_dir": out,
        "learning_rate": 1e-2,
        **options,
    }
    return list(arguments(**given))


@pytest.fixture(scope="module")
def expected_losses(folder: Path) -> list[float]:
    """Three steps of two samples by transformers and torch in one process."""
    samples = one_process_samples(folder / "checkpoint", folder / "train.jsonl", frames=FRAMES)
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    return one_process_training(model, samples, steps=3, accumulation=2)


@pytest.mark.parametrize(
    "stage",
    [
        *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in range(3)),
        3,
    ],
)
def test_a_checkpoint_of_the_hub_trains_and_is_saved_at_every_stage(
    folder: Path, tmp_path: Path, stage: int, expected_losses: list[float]
) -> None:
    config = write_config(tmp_path / "ds.json", stage=stage, accumulation=2)
    out = tmp_path / "out"
    checkpointing = True if stage == 3 else None  # which changes nothing
    options = {"epochs": 1.5, "eval_data": folder / "eval.jsonl"}
    given = _arguments(folder, out, config, gradient_checkpointing=checkpointing, **options)
    run_ranks(finetune, 2, *given)

    training, evaluation = metrics(out)
    assert [row["step"] for row in training] == [1, 2, 3]
    assert training[-1]["epoch"] == 1.5
    assert training[-1]["tokens_per_second"] > 0
    assert training[-1]["memory_gib"] > 0
    learning_rates = [row["learning_rate"] for row in training]
    assert learning_rates == pytest.approx([1e-2, 0.75e-2, 0.25e-2])  # cosine
    assert [row["loss"] for row in training] == pytest.approx(expected_losses, abs=1e-4)

    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    for key in ("text_tokens", "visual_tokens", "features_bytes", "activation_bytes"):
        held = [rank[key] for rank in first["ranks"]]
        assert sum(held) == first["one_rank"][key]
        assert max(held) < 0.75 * first["one_rank"][key]

    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    loss = one_process_loss(
        model, one_process_samples(out / "model", folder / "eval.jsonl", frames=FRAMES)
    )
    assert evaluation == [{"step": 3, "eval_loss": pytest.approx(loss, abs=1e-5)}]
    before = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint").state_dict()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in after if "proj" in name)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "model"]


def with_text(folder: Path) -> Path:
    """Four samples, in whose batches of two one has no image."""
    lines = (folder / "train.jsonl").read_text().splitlines()[:2]
    data = folder / "with_text.jsonl"
    write_jsonl(data, *lines, chat(("text", "What animal?"), answer="None."), lines[0])
    return data


@pytest.mark.exhaustive
def test_two_replicas_with_an_odd_sample_and_text_alone(folder: Path, tmp_path: Path) -> None:
    """2 x 2 ranks, three samples to evaluate on, and a batch in which one has no image."""
    config = write_config(tmp_path / "ds.json", stage=3)
    out = tmp_path / "out"
    options = {"data": with_text(folder), "eval_data": folder / "eval.jsonl"}
    run_ranks(finetune, 4, *_arguments(folder, out, config, **options))

    training, evaluation = metrics(out)
    assert [row["epoch"] for row in training] == [0.5, 1.0]
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    samples = one_process_samples(out / "model", folder / "eval.jsonl", frames=FRAMES)
    assert evaluation[0]["eval_loss"] == pytest.approx(one_process_loss(model, samples), abs=1e-5)


def test_lora_on_two_replicas_saves_an_adapter_that_gives_the_same_loss(
    folder: Path, tmp_path: Path
) -> None:
    """2 x 2 ranks, three samples to evaluate on, and a batch in which one has no image."""
    peft = pytest.importorskip("peft")
    config = write_config(tmp_path / "ds.json", stage=3)
    out, data = tmp_path / "out", with_text(folder)
    options = {"lora_r": 4, "data": data, "eval_data": folder / "eval.jsonl"}
    options |= {"lora_target_modules": "q_proj,fc1", "lora_modules_to_save": SAVED}
    words = _arguments(folder, out, config, **options)
    run_ranks(finetune, 4, *words)

    training, evaluation = metrics(out)
    given = parse(words)
    whole = load_model(given, {}, Source.of(given.model))
    samples = one_process_samples(folder / "checkpoint", data, frames=FRAMES)
    expected = one_process_training(whole, samples, steps=2, accumulation=2)
    assert [row["loss"] for row in training] == pytest.approx(expected, abs=1e-4)
    assert [row["epoch"] for row in training] == [0.5, 1.0]

    base = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    samples = one_process_samples(out / "model", folder / "eval.jsonl", frames=FRAMES)
    untrained = one_process_loss(base, samples)
    model = peft.PeftModel.from_pretrained(base, out / "model")
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    ours = ("lora_", "modules_to_save")
    assert [n for n, _ in model.named_parameters() if any(o in n for o in ours)] == trained
    for part in ("language_model", "vision_model", SAVED):
        assert any(part in name for name in trained)
    before = whole.get_submodule(f"base_model.model.model.{SAVED}.original_module").weight
    after = model.get_submodule(f"base_model.model.model.{SAVED}.modules_to_save.default").weight
    assert not torch.equal(before, after)
    loss = one_process_loss(model, samples)
    assert evaluation[0]["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert loss < untrained - 0.01


def test_bf16_and_a_frozen_vision_tower(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "ds.json", stage=2, micro=2, bf16={"enabled": True})
    out = tmp_path / "out"
    options = {"eval_data": folder / "eval.jsonl", "eval_steps": 1, "epochs": 2}
    run_ranks(finetune, 2, *_arguments(folder, out, config, freeze_vision=True, **options))
    training, evaluation = metrics(out)
    assert [row["epoch"] for row in training] == [0.5, 1.0, 1.5, 2.0]
    assert [row["step"] for row in evaluation] == [1, 2, 3, 4]
    assert evaluation[3]["eval_loss"] < evaluation[0]["eval_loss"]

    before = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint").state_dict()
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16
    changed = [n for n, w in model.state_dict().items() if not torch.equal(w, before[n].bfloat16())]
    assert any("cross_attn.k_proj" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_model" in name for name in changed)


def test_optimizer_and_schedule_of_the_ds_config_are_taken(folder: Path, tmp_path: Path) -> None:
    sections = {
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
    }
    config = write_config(tmp_path / "ds.json", stage=1, **sections)
    out = tmp_path / "out"
    run_ranks(finetune, 2, *_arguments(folder, out, config, max_steps=5, log_steps=4))
    training, _ = metrics(out)
    assert [row["step"] for row in training] == [4, 5]
    assert training[1]["learning_rate"] == pytest.approx(3e-3)
    assert training[1]["loss"] < 6


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        pytest.param(0, {}, marks=pytest.mark.exhaustive),
        (2, {"lora_r": 2, "lora_dropout": 0.3, "lora_modules_to_save": SAVED}),
        pytest.param(3, {}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_resumed_run_has_the_same_losses(
    folder: Path, tmp_path: Path, stage: int, options: dict[str, Any]
) -> None:
    config = write_config(tmp_path / "ds.json", stage=stage, accumulation=3)
    out, again = tmp_path / "out", tmp_path / "again"
    options = {"max_steps": 4, "save_steps": 2, "lr_scheduler": "linear", **options}
    run_ranks(finetune, 2, *_arguments(folder, out, config, **options))
    whole, _ = metrics(out)
    checkpoint = out / "checkpoints" / "step-00000002"
    shutil.copytree(out, again)

    run_ranks(finetune, 2, *_arguments(folder, again, config, resume=checkpoint, **options))

    resumed, _ = metrics(again)
    keys = ("step", "loss", "learning_rate", "epoch")
    assert [[row[key] for key in keys] for row in resumed] == [
        [row[key] for key in keys] for row in whole
    ]
    assert len({row["loss"] for row in whole}) == 4
    weights = [next((folder / "model").glob("*.safetensors")) for folder in (out, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def partitioned_parameters(*words: str, config: dict[str, Any]) -> list[tuple[int, int]]:
    """On a rank: what it holds of each parameter after loading, and the whole."""
    deepspeed.init_distributed()
    options = parse(words)
    model = load_model(options, config, Source.of(options.model))
    return [(p.numel() + p.ds_tensor.numel(), p.ds_numel) for p in model.parameters()]


@pytest.mark.parametrize("name", ["tiny", "checkpoint"])
def test_under_zero3_no_rank_ever_holds_the_model(folder: Path, tmp_path: Path, name: str) -> None:
    config_path = write_config(tmp_path / "ds.json", stage=3)
    words = _arguments(folder, tmp_path / "out", config_path)
    words[words.index("--model") + 1] = name if name == "tiny" else str(folder / name)
    config = json.loads(Path(config_path).read_text())
    for held in run_ranks(partitioned_parameters, 2, *words, config=config):
        assert len(held) > 50
        assert all(here <= (whole + 1) // 2 for here, whole in held)
