"""What the planner knows of models."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma4Config, MllamaConfig, Qwen3_5Config, Qwen3_5MoeConfig

from ds_lvx.models import FAMILIES
from ds_lvx.plan.models import known, model


def test_llama_vision_has_the_dimensions_of_transformers_config(tmp_path: Path) -> None:
    config = MllamaConfig()
    config.vision_config.image_size = 560
    config.text_config.cross_attention_layers = [3, 8, 13, 18, 23, 28, 33, 38]
    config.save_pretrained(tmp_path)
    written, built_in = model(str(tmp_path)), model("meta-llama/Llama-3.2-11B-Vision")
    assert {**vars(written), "name": "", "source": ""} == {
        **vars(built_in),
        "name": "",
        "source": "",
    }


@pytest.mark.parametrize(
    ("name", "billions", "frame_tokens", "cross"),
    [
        ("Llama-3.2-11B-Vision-Instruct", 10.6, 6404, (8, 32, 8, 128)),
        ("Llama-3.2-90B-Vision", 88.6, 6404, (20, 64, 8, 128)),
        ("mPLUG-Owl3-7B", 8.1, 729, (4, 28, 4, 128)),
        ("mPLUG-Owl3-1B", 1.0, 729, (4, 14, 2, 64)),
        ("mPLUG-Owl3-2B", 2.2, 729, (4, 12, 2, 128)),
        ("OpenFlamingo-9B", 8.4, 64, (8, 8, 8, 64)),
        ("OpenFlamingo-4B", 4.0, 64, (16, 8, 8, 64)),
        ("OpenFlamingo-3B", 2.6, 64, (24, 8, 8, 64)),
        ("idefics-9b", 9.0, 64, (8, 32, 32, 128)),
        ("t5gemma-2-270m", 0.79, 256, (18, 4, 1, 256)),
        ("t5gemma-2-1b", 2.1, 256, (26, 4, 1, 256)),
        ("t5gemma-2-4b", 7.5, 256, (34, 8, 4, 256)),
        ("MOSS-VL-Instruct-0708", 11.3, 721, (12, 32, 8, 128)),
        ("Qwen2.5-VL-3B", 3.75, 128, (36, 16, 2, 128)),
        ("Qwen2.5-VL-7B", 8.29, 128, (28, 28, 4, 128)),
        ("Qwen2.5-VL-32B", 33.5, 128, (64, 40, 8, 128)),
        ("Qwen2.5-VL-72B", 73.4, 128, (80, 64, 8, 128)),
        ("Qwen2-VL-2B", 2.21, 128, (28, 12, 2, 128)),
        ("Qwen2-VL-7B", 8.29, 128, (28, 28, 4, 128)),
        ("Qwen2-VL-72B", 73.4, 128, (80, 64, 8, 128)),
        ("Qwen3-VL-2B", 2.13, 98, (28, 16, 8, 128)),
        ("Qwen3-VL-4B", 4.44, 98, (36, 32, 8, 128)),
        ("Qwen3-VL-8B", 8.77, 98, (36, 32, 8, 128)),
        ("Qwen3-VL-32B", 33.4, 98, (64, 64, 8, 128)),
        ("Qwen3-VL-30B-A3B", 31.1, 98, (48, 32, 4, 128)),
        ("Qwen3-VL-235B-A22B", 236, 98, (94, 64, 4, 128)),
        ("Qwen3.5-0.8B", 0.85, 98, (6, 8, 2, 256)),
        ("Qwen3.5-2B", 2.21, 98, (6, 8, 2, 256)),
        ("Qwen3.5-4B", 4.53, 98, (8, 16, 4, 256)),
        ("Qwen3.5-9B", 9.4, 98, (8, 16, 4, 256)),
        ("Qwen3.5-27B", 27.4, 98, (16, 24, 4, 256)),
        ("Qwen3.5-35B-A3B", 35.1, 98, (10, 16, 2, 256)),
        ("Qwen3.5-122B-A10B", 122.6, 98, (12, 32, 2, 256)),
        ("Qwen3.5-397B-A17B", 396.8, 98, (15, 32, 2, 256)),
        ("GLM-4.1V-9B", 10.3, 128, (40, 32, 2, 128)),
        ("GLM-4.5V", 107.7, 128, (46, 96, 8, 128)),
        ("VideoLLaMA3-2B", 2.0, 256, (28, 12, 2, 128)),
        ("VideoLLaMA3-7B", 8.0, 256, (28, 28, 4, 128)),
        ("gemma-3-4b-it", 4.3, 256, (34, 8, 4, 256)),
        ("gemma-3-12b-it", 12.2, 256, (48, 16, 8, 256)),
        ("gemma-3-27b-it", 27.4, 256, (62, 32, 16, 128)),
        ("gemma-4-E2B-it", 5.1, 64, (35, 8, 1, 307)),
        ("gemma-4-E4B-it", 8.0, 64, (42, 8, 2, 298)),
        ("gemma-4-26B-A4B-it", 25.2, 64, (30, 16, 8, 298)),
        ("gemma-4-31B-it", 30.7, 64, (60, 32, 16, 298)),
        ("InternVL3-8B", 7.94, 256, (28, 28, 4, 128)),
        ("InternVL3-14B", 15.1, 256, (48, 40, 8, 128)),
        ("InternVL3-38B", 38.4, 256, (64, 40, 8, 128)),
        ("InternVL3-78B", 78.4, 256, (80, 64, 8, 128)),
        ("llava-onevision-qwen2-7b-ov-hf", 8.03, 196, (28, 28, 4, 128)),
        ("blip2-opt-2.7b", 3.74, 32, (32, 32, 32, 80)),
        ("blip2-opt-6.7b", 7.75, 32, (32, 32, 32, 128)),
        ("instructblip-vicuna-7b", 7.9, 32, (32, 32, 32, 128)),
        ("Video-LLaMA-2-7B-Finetuned", 7.9, 0, (32, 32, 32, 128)),
        ("Qwen-VL", 9.6, 256, (32, 32, 32, 128)),
        ("llava-onevision-qwen2-72b-ov-hf", 73.2, 196, (80, 64, 8, 128)),
    ],
)
def test_known_models(
    name: str, billions: float, frame_tokens: int, cross: tuple[int, int, int, int]
) -> None:
    found = model(name)
    assert found.parameters == pytest.approx(billions * 1e9, rel=0.06)
    assert found.frame_tokens == frame_tokens
    layers = found.cross
    assert (layers.count, layers.heads, layers.kv_heads, layers.head_dim) == cross


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_layers_with_a_state_have_the_weights_of_transformers(name: str) -> None:
    made = import_module(f"tests.models.{name}_case").tiny_model()
    found = FAMILIES.named(name).dimensions(made.config.to_dict(), name, "its config")
    norms = ("layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight")
    layers = made.model.language_model.layers.named_parameters()
    weights = sum(p.numel() for key, p in layers if not key.endswith(norms))
    assert weights == sum(each.parameters for each in found.crossing)
    assert [each.count for each in found.crossing] == [1, 2]


@pytest.mark.parametrize(("config", "name"), [(Qwen3_5Config, "9B"), (Qwen3_5MoeConfig, "35B-A3B")])
def test_sizes_that_transformers_has_by_default(config: Any, name: str, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    written, known_one = (vars(model(each)) for each in (str(tmp_path), f"Qwen3.5-{name}"))
    assert {k for k in written if written[k] != known_one[k]} == {"name", "source"}


def test_a_saved_gemma_4_has_the_sizes_of_the_published_one(tmp_path: Path) -> None:
    text = {"hidden_size_per_layer_input": 0, "num_hidden_layers": 12, "global_head_dim": 64}
    config = {"text_config": {**text, "head_dim": 32}, "vision_config": {}}
    made = Gemma4Config(**config)
    made.save_pretrained(tmp_path)
    found = model(str(tmp_path))
    assert found.cross.head_dim == (10 * 32 + 2 * 64) // 12
    assert (found.windowed, found.window) == (10, 512)


def test_a_short_text_reads_the_experts_that_it_chooses() -> None:
    layers, draw = model("Qwen3-VL-235B-A22B").cross, random.Random(0)
    expert = 3 * 4096 * 1536
    assert layers.woken(1) == pytest.approx(0, abs=1)
    assert layers.woken(10**6) == pytest.approx(layers.others)
    for tokens in (4, 32, 128):
        chosen = [{e for _ in range(tokens) for e in draw.sample(range(128), 8)} for _ in range(99)]
        distinct = sum(map(len, chosen)) / len(chosen)
        assert layers.woken(tokens) == pytest.approx((distinct - 8) * expert, rel=0.02)
    assert model("Qwen3-VL-8B").cross.woken(100) == 0


@pytest.mark.parametrize(
    ("frames", "tokens"), [(1, 2041), (256, 721), (1024, 181), (3600, 46), (10**6, 7)]
)
def test_frames_that_share_a_budget_of_pixels(frames: int, tokens: int) -> None:
    moss = model("MOSS-VL").with_frames(frames)
    assert moss.parameters == pytest.approx(11.336e9, rel=1e-3)
    assert moss.frame_tokens == tokens
    assert moss.tower_tokens == 4 * (tokens - 1)
    assert model("mPLUG-Owl3-7B").with_frames(frames).frame_tokens == 729


def test_an_unknown_model_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"did you mean meta-llama/Llama-3.2-11B-Vision\?"
    ) as error:
        model("Lama-3.2-11B-Vision")
    for each in known():
        assert each.name in str(error.value)


def test_a_config_that_does_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json, which cannot be read: .*No such file"):
        model(str(tmp_path))
    path = tmp_path / "config.json"
    for text, words in (
        ("{", "cannot be read"),
        ('{"model_type": "bert"}', "got .* of model_type 'bert'"),
        (json.dumps({"model_type": "mllama", "text_config": {}}), "lacks"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            model(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        model(str(tmp_path / "none.json"))
