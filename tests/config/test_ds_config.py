"""The ds_config as a whole: reading it, what it may not hold, and the files in ds_configs/."""

import base64
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from ds_lvx.config import (
    LVXConfig,
    check_ds_config,
    read_ds_config,
    zero_stage,
)

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
by_file = pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)


def message_of(ds_config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        LVXConfig.from_ds_config(ds_config)
    return str(caught.value)


@pytest.fixture(scope="module")
def mllama_layers() -> list[str]:
    """The attention layers of a tiny Llama-3.2-Vision, found in the model itself."""
    vision = MllamaVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        intermediate_layers_indices=[0, 1],
        vision_output_dim=48,
    )
    text = MllamaTextConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        cross_attention_layers=[1, 3],
        max_position_embeddings=64,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=128)
    model: nn.Module = MllamaForConditionalGeneration(config)
    return [n for n, m in model.named_modules() if type(m).__name__.endswith("Attention")]


# Mistakes in the file


def test_missing_file_names_the_nearest() -> None:
    near = DS_CONFIGS[0]
    message = message_of(near.with_name(near.name.replace("-", "_")))
    assert "no such file" in message
    assert f"did you mean {near}?" in message
    assert "there is no folder" in message_of("no_such_folder/config.json")
    assert "expected the path of a JSON file" in message_of("zzzz.qqq")


def test_folder_or_wrong_type_is_not_a_config(tmp_path: Path) -> None:
    assert message_of(tmp_path).startswith(f"{tmp_path}: cannot be read")
    assert "got 3" in message_of(3)
    assert "got {1}" in message_of({"ds_lvx": {1}})


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(b'{"ds_lvx": {}, "a": "\xff"}')
    assert message_of(file).startswith(f"{file}: cannot be read ('utf-8' codec")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "ds_lvx": {},\n}', ":3:1: not valid JSON"),
        ('{\n  "a": 1, // a comment\n  "ds_lvx": {}}', ":2:11: not valid JSON"),
        ('{"ds_lvx": {"layers": [{"match": "*", "method": lvx}]}}', ":1:49: not valid JSON"),
        ("", ":1:1: not valid JSON"),
        ("[1]", ": got [1], expected a JSON object"),
        ('{"a": ' + "[" * 99_999, ": not a config (maximum recursion depth"),
        ('{"a": ' + "9" * 5000 + "}", ": not a config (Exceeds the limit"),
        ('{"ds_lvx": {}, "ds_lvx": {}}', ": ds_lvx: the key occurs twice"),
        (
            '{"ds_lvx": {"layers": [{}, {"match": "a", "method": "lvx", "method": "ring"}]}}',
            ": ds_lvx.layers[1].method: the key occurs twice",
        ),
    ],
)
def test_bad_json_gives_the_place(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    assert message_of(file).startswith(f"{file}{expected}")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"ds_lvx": {}}', encoding="utf-8-sig")
    assert read_ds_config(file) == {"ds_lvx": {}}


def test_bad_base64_text_is_an_error_of_its_json() -> None:
    encoded = base64.urlsafe_b64encode(b'{"ds_lvx": }').decode()
    assert message_of(encoded).startswith("ds_config:1:12: not valid JSON")


# The rest of the ds_config


def test_zero_stage_is_what_deepspeed_reads() -> None:
    configs: list[dict[str, Any]] = [
        {},
        {"zero_optimization": {}},
        {"zero_optimization": True},
        {"zero_optimization": {"stage": "auto"}},
    ] + [{"zero_optimization": {"stage": stage}} for stage in range(4)]
    stages = [zero_stage(config) for config in configs]
    assert stages == [0, 0, 1, 0, 0, 1, 2, 3]
    for config, stage in zip(configs, stages, strict=True):
        theirs = DeepSpeedConfig({"train_batch_size": 1, **deepcopy(config)})
        assert theirs.zero_optimization_stage == stage


@pytest.mark.parametrize(
    ("zero", "path"),
    [
        ([], "zero_optimization: got []"),
        ({"stage": 7}, "zero_optimization.stage: got 7"),
        ({"stge": 3}, "zero_optimization.stge: got 3"),
    ],
)
def test_bad_zero_section_is_named(zero: Any, path: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(path)):
        zero_stage({"zero_optimization": zero})


DANGEROUS: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimization": {"stage": 3, "reduce_scatter": False}},
        "zero_optimization.reduce_scatter",
    ),
    ({"data_parallel_size": 2}, "data_parallel_size"),
    ({"mesh_param": [2, 2]}, "mesh_param"),
    (
        {
            "zero_optimization": {"stage": 2, "reduce_scatter": False},
            "gradient_predivide_factor": 4.0,
        },
        "gradient_predivide_factor",
    ),
    (
        {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2},
        "gradient_predivide_factor",
    ),
]


@pytest.mark.parametrize(("ds_config", "key"), DANGEROUS, ids=[key for _, key in DANGEROUS])
def test_dangerous_setting_is_refused(ds_config: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match="remove") as caught:
        check_ds_config(ds_config, 2)
    assert str(caught.value).startswith(f"{key}: got ")
    check_ds_config(ds_config, 1)


def test_contradicting_size_is_refused() -> None:
    check_ds_config({"sequence_parallel_size": 2}, 2)
    for ours in (1, 4):
        with pytest.raises(ValueError, match=rf"ds_lvx\.sequence_parallel_size is {ours}"):
            check_ds_config({"sequence_parallel_size": 2}, ours)


def test_tensor_parallelism_is_not_implemented() -> None:
    ds_config = {"tensor_parallel": {"autotp_size": 2}}
    with pytest.raises(NotImplementedError, match="autotp_size: got 2"):
        check_ds_config(ds_config, 2)
    check_ds_config(ds_config, 1)


@pytest.mark.parametrize(
    "ds_config",
    [
        {},
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
        {"zero_optimization": {"stage": 0, "reduce_scatter": False}},
        {"tensor_parallel": {"autotp_size": 1}},
        {"gradient_predivide_factor": 2.0},
        {"steps_per_print": float("inf"), "data_types": {"keep_in_fp32_modules": "auto"}},
        {"ds_lvx": {"layers": [{"match": "*", "method": "auto"}]}, "wandb": {"project": "auto"}},
    ],
    ids=str,
)
def test_harmless_setting_passes(ds_config: dict[str, Any]) -> None:
    check_ds_config(ds_config, 2)


WRONG_VALUES: list[tuple[dict[str, Any], list[str]]] = [
    ({"bf16": {"enabled": "auto"}}, ['bf16.enabled: got "auto", which nobody fills in']),
    (
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, "auto"]}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        },
        [
            'train_batch_size: got "auto"',
            'gradient_clipping: got "auto"',
            'optimizer.params.lr: got "auto"',
            'optimizer.params.betas[1]: got "auto"',
            'scheduler.params.warmup_num_steps: got "auto"',
            'zero_optimization.reduce_bucket_size: got "auto"',
        ],
    ),
    (
        {
            "train_micro_batch_size_per_gpu": "2",
            "gradient_accumulation_steps": 0,
            "gradient_clipping": True,
            "bf16": {"enabled": "false"},
            "fp16": False,
            "tensor_parallel": {"autotp_size": "2"},
            "optimizer": {"type": "AdamW", "params": {"lr": "1e-5", "eps": float("nan")}},
            "scheduler": {"params": {"warmup_num_steps": 2.5}},
        },
        [
            'train_micro_batch_size_per_gpu: got "2"; expected a whole number',
            "gradient_accumulation_steps: got 0; expected 1 or more",
            "gradient_clipping: got true; expected a number",
            'bf16.enabled: got "false"; expected true or false',
            "fp16: got false; expected an object",
            'tensor_parallel.autotp_size: got "2"; expected a whole number',
            'optimizer.params.lr: got "1e-5"; expected a number',
            "optimizer.params.eps: got NaN; expected a finite number",
            "scheduler.type: got",
            "scheduler.params.warmup_num_steps: got 2.5; expected a whole number",
        ],
    ),
    ({"bf16": {"enabled": True, "loss_scal": 1}}, ["DeepSpeedBF16Config: loss_scal: got 1"]),
    ({"amp": {"enabled": True}}, ["DeepSpeed refuses it (DeepSpeedConfigError: NVIDIA Apex"]),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        ["DeepSpeed refuses it (AssertionError: bfloat16 and fp16"],
    ),
]


@pytest.mark.parametrize(("ds_config", "problems"), WRONG_VALUES)
def test_every_value_that_cannot_serve_is_named(
    ds_config: dict[str, Any], problems: list[str]
) -> None:
    given = deepcopy(ds_config)
    with pytest.raises(ValueError, match=r"got|refuses") as caught:
        check_ds_config(given, 1)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(problems), caught.value
    assert all(any(problem in line for line in lines) for problem in problems), caught.value
    assert repr(given) == repr(ds_config)


# The files of ds_configs/


def test_the_files_that_are_promised_exist() -> None:
    stems = {path.stem for path in DS_CONFIGS}
    promised = {"mllama-zero3-lvx-ulysses", "mllama-zero3-ulysses", "mllama-zero3-ring"}
    assert promised | {"quickstart", "finetune-zero2"} <= stems
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert set(re.findall(r"^\| `(.*?)\.json`", table, flags=re.MULTILINE)) == stems


@by_file
def test_shipped_config_decides_for_every_layer(path: Path, mllama_layers: list[str]) -> None:
    config = LVXConfig.from_ds_config(path)
    size = config.sequence_parallel_size
    check_ds_config(read_ds_config(path), size)
    config.check_world_size(2 * size)
    resolved = config.resolve(mllama_layers)
    assert len(resolved) == 7
    if size == 1:
        assert set(resolved.values()) == {None}
        return
    cross, text = expected_methods(path.stem)
    for name, rule in resolved.items():
        assert rule is not None
        vision = "vision_model" in name
        assert rule.method == ("none" if vision else cross if "cross_attn" in name else text)
        assert rule.recompute_kv == (rule.method == "lvx")


def expected_methods(stem: str) -> tuple[str, str]:
    """Cross-attention's and text self-attention's method, which the file's name tells."""
    named = [word for word in stem.split("-") if word in ("lvx", "ring", "ulysses")]
    return (named[0], named[-1]) if named else ("lvx", "ulysses")


@by_file
def test_shipped_config_is_what_its_name_says(path: Path) -> None:
    ds_config = read_ds_config(path)
    named = re.search(r"zero(\d)", path.stem)
    assert named is None or zero_stage(ds_config) == int(named[1])
    on_gpus = named is not None
    assert ds_config.get("bf16", {}).get("enabled", False) is on_gpus


@by_file
def test_deepspeed_accepts_the_shipped_config(path: Path) -> None:
    theirs = DeepSpeedConfig(str(path))
    assert theirs._param_dict["ds_lvx"] == read_ds_config(path)["ds_lvx"]
    assert theirs.zero_optimization_stage == zero_stage(read_ds_config(path))


@by_file
def test_hugging_face_accepts_the_shipped_config(path: Path) -> None:
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=str(path))
    plugin.deepspeed_config_process()
    assert plugin.deepspeed_config["ds_lvx"] == read_ds_config(path)["ds_lvx"]
