"""A base in 4 bits under LoRA: what is quantized, and that ranks train as one process does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

import ds_lvx
from ds_lvx import cli
from ds_lvx.data import extras
from ds_lvx.distributed.channel import Channel
from ds_lvx.models import FAMILIES
from ds_lvx.models.precision import dtype_of, is_packed, keep_layout, share_in_4bit
from ds_lvx.training import quantized
from ds_lvx.training.inputs import read_inputs
from ds_lvx.training.lora import ALL_LINEAR
from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import parse
from ds_lvx.training.run_state import Checkpoints, RunState
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.generation_case import interleaved
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import arguments, finetune, metrics
from tests.launch.test_after_finetune import OWN_CODE, write_base, write_config
from tests.launch.test_generate import run
from tests.models import mllama_case as case
from tests.ranks import RankError, run_ranks

TINY = [name for name in FAMILIES if FAMILIES.named(name).has("tiny")]
NONE = ("--data", "none", "--deepspeed_config", "none", "--output_dir", "none")
REPACKS = "support_avx512bf16_for_cpu"
"""Where bitsandbytes 0.50 notes that evaluation lays weights out anew."""
CROSS = {"method": "lvx", "recompute_kv": True, "kv_chunk_tokens": 4}


def loaded(name: str, *words: str) -> nn.Module:
    options = parse(["--model", f"tiny:{name}", *NONE, "--lora_r", "2", *words])
    return load_model(options, {}, Source.of(options.model))


def further(first: str) -> list[Any]:
    """One family, and all others where time is no matter."""
    others = [name for name in TINY if name != first]
    return [first, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in others)]


@pytest.mark.parametrize("name", further("qwen2_5_vl"))  # some of whose layers have biases
def test_linear_layers_of_the_text_are_quantized_and_lora_finds_all_that_it_found(
    name: str,
) -> None:
    words = ["--lora_target_modules", ALL_LINEAR, "--freeze_vision"]
    plain, packed = loaded(name, *words), loaded(name, *words, "--load_in_4bit")
    found = [n for n, p in packed.named_parameters() if p.requires_grad]
    assert found == [n for n, p in plain.named_parameters() if p.requires_grad] != []

    family = FAMILIES.named(name)
    tower = {id(p) for p in family.vision_tower(family.find(packed)).parameters()}
    weights = {n: p for n, p in packed.named_parameters() if is_packed(p)}
    assert not any(id(p) in tower for p in weights.values())
    assert not any("head" in n or "embed" in n for n in weights)
    text = [n for n, part in family.regions().items() if part != "vision"]
    assert len(weights) > 2 * len(text)
    whole = {n: p.numel() for n, p in plain.named_parameters()}
    assert share_in_4bit(packed) == sum(whole[n] for n in weights) / sum(whole.values())
    assert dtype_of(packed) == torch.float32
    module = packed.get_submodule(next(iter(weights)).removesuffix(".weight"))
    assert module.weight.quant_state.quant_type == "nf4"
    assert module.weight.quant_state.nested
    assert module.quant_state is module.weight.quant_state  # by which `settle` finds it
    assert module.weight.numel() * 2 == module.in_features * module.out_features


def test_of_a_checkpoint_with_experts_the_attention_is_quantized(tmp_path: Path) -> None:
    family = FAMILIES.named("qwen3_vl_moe")
    whole = Source.of("tiny:qwen3_vl_moe").load(torch.float32)
    whole.save_pretrained(tmp_path)
    found = family.load(str(tmp_path), torch.float32, **quantized.words(family, torch.float32))
    packed = [name for name, weight in found.named_parameters() if is_packed(weight)]
    layers = family.text_model(found).layers
    assert len(packed) == 4 * len(layers)
    assert all(".self_attn." in name for name in packed)
    for name, weight in found.named_parameters():
        if ".experts." in name:
            assert torch.equal(weight, whole.get_parameter(name)), name


def test_a_layer() -> None:
    """Bytes of a weight as docs/memory.md has them; its dtype is the run's."""
    config = quantized.words(FAMILIES.named("mllama"), torch.float32)["quantization_config"]
    layer: Any = Linear4bit(
        256,
        256,
        bias=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    ).to("cpu")
    state = layer.weight.quant_state
    held = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == 256**2 * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    layer.compute_dtype = torch.bfloat16
    quantized.settle(nn.Sequential(layer), torch.float32)
    assert layer.compute_dtype == torch.float32


def small_model() -> Any:
    return case.tiny_model(num_hidden_layers=2, cross_attention_layers=[1])


def packed_model(**storage: Any) -> Any:
    """A model of two layers in 4 bits, its tower too, with LoRA."""
    how = quantized.words(FAMILIES.named("mllama"), torch.float32)
    for key, value in {"llm_int8_skip_modules": ["lm_head"], **storage}.items():
        setattr(how["quantization_config"], key, value)
    packed = quantized.read_again(small_model(), torch.float32, how)
    return case.with_lora(packed).train()


def train_packed(jobs: list[dict[str, Any]], batches: list[list[case.Batch]]) -> list[Any]:
    found = []
    for config in jobs:
        model = packed_model()
        found.append(case.sharded_steps(config, batches, model=model))
        weight = next(p for p in model.parameters() if is_packed(p))
        if config["zero_optimization"]["stage"] == 3:
            assert weight.ds_tensor.dtype == torch.uint8, weight.ds_tensor.dtype
            assert weight.ds_tensor.numel() == weight.ds_numel // 2, "each rank has half"
    return found


def rules(stage: int, **sections: Any) -> dict[str, Any]:
    return case.ds_config(stage=stage, sp_size=2, cross=CROSS, self_attn="ulysses") | sections


@pytest.mark.slow
@case.FURTHER
def test_training_equals_one_process(which: slice) -> None:
    jobs = [
        rules(3, activation_checkpointing={}),  # DeepSpeed takes packed weights apart
        *(rules(stage) for stage in range(4)),
    ][which]
    batches = [[case.hard_batch()]]
    expected = case.reference_steps(batches, packed_model())
    assert all("lora_" in name for name in expected["grads"])
    plain = case.with_lora(small_model())(**case.reference_inputs(batches[0][0])).loss.item()
    assert abs(plain - expected["losses"][0][0]) > 1e-4, "nothing is quantized"
    for results in zip(*run_ranks(train_packed, 2, jobs, batches), strict=True):
        case.assert_same_training(list(results), expected, sp_size=2)


def ask_packed(batch: case.Batch) -> list[Any]:
    """What is generated, what cannot be stored so, and what was laid out for evaluation."""
    model = packed_model()
    layers: list[Any] = [m for m in model.modules() if hasattr(m, REPACKS)]
    for layer in layers:
        setattr(layer, REPACKS, True)  # as on a CPU that has these instructions
    session = ds_lvx.apply(model, rules(0))
    assert layers
    assert not any(getattr(layer, REPACKS) for layer in layers)
    tokens = ds_lvx.generate(model, batch, max_new_tokens=5)
    session.close()
    layers[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="before it is evaluated"):
        case.start_engine(rules(2), model)
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_storage") as error:
        case.start_engine(
            rules(2, bf16={"enabled": True}), packed_model(bnb_4bit_quant_storage=torch.float16)
        )
    return [tokens, str(error.value)]


@pytest.mark.slow
def test_generation_and_another_storage() -> None:
    batch = interleaved()
    asked = {key: value for key, value in batch.items() if key != "labels"}
    model = packed_model().eval()
    keep_layout(model)  # bitsandbytes refuses to lay out layers of less than 32 rows
    expected = model.generate(**asked, max_new_tokens=5)
    for tokens, error in run_ranks(ask_packed, 2, batch):
        assert torch.equal(tokens, expected)
        assert "stored as torch.float16, for a ds_config of torch.bfloat16" in error
        assert "expected torch.uint8 or torch.bfloat16" in error


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "tiny", *NONE, "--load_in_4bit"])
    assert "--load_in_4bit: got no LoRA; expected its rank" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a Linear4bit whose weights are quantized"):
        loaded("mllama", "--load_in_4bit", "--lora_modules_to_save", "mlp.down_proj")

    base = write_checkpoint(tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(settings))
    data = write_jsonl(tmp_path / "d.jsonl", chat(("text", "What?")))
    config = write_config("mllama", tmp_path / "ds.json")
    given = {"model": base, "data": data, "deepspeed_config": config, "output_dir": tmp_path / "o"}
    with pytest.raises(ValueError, match="whose weights are quantized and do not train"):
        read_inputs(parse(arguments(**given)), 2)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    out = ["--adapter", str(tmp_path), "--output", str(tmp_path / "merged")]
    assert cli.main(["merge", *out]) == 2
    assert "an adapter would be rounded" in capsys.readouterr().err

    monkeypatch.setattr(extras, "find_spec", lambda package: package != "bitsandbytes" or None)
    for more in ({"load_in_4bit": True}, {}):
        with pytest.raises(ValueError, match=r"bitsandbytes.*'ds_lvx\[quantization\]'"):
            read_inputs(parse(arguments(**given, lora_r=2, **more)), 2)


def test_a_run_resumes_with_the_base_that_it_had(tmp_path: Path) -> None:
    state = RunState(1, 1, 1, 1, 2, 1, 0, "data", "names", quantized=True)
    checkpoints = Checkpoints(tmp_path, Channel(None), keep=1, only_trained=True)
    for had, has in (
        (state, replace(state, quantized=False)),
        (replace(state, quantized=False), state),
    ):
        (tmp_path / "run.json").write_text(json.dumps(asdict(had)))
        with pytest.raises(
            ValueError, match=f"quantized: got {has.quantized} for a .* {had.quantized}"
        ):
            checkpoints.load(None, tmp_path, has)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "name", [*TINY, "t5gemma2", "blip-2", "instructblip", "instructblipvideo", *OWN_CODE]
)
def test_every_family_trains_as_in_one_process(name: str, stage: int, tmp_path: Path) -> None:
    if name in TINY:
        model: Any = f"tiny:{name}"
        write_video(tmp_path / "a.mp4")
        write_image(tmp_path / "a.png", (80, 60))
        asked = ("text", "What animal is it, and where?")
        first, second = chat(("video", "a.mp4"), asked), chat(("image", "a.png"), asked)
        data = write_jsonl(tmp_path / "train.jsonl", first, second)
    else:
        model = write_base(name, tmp_path / "base")
        data = model / "train.jsonl"
    sharded = write_config(name, tmp_path / "ds.json")
    config = json.loads(sharded.read_text())
    config["zero_optimization"]["stage"] = stage
    sharded.write_text(json.dumps(config))
    alone = tmp_path / "one.json"
    alone.write_text(json.dumps(config | {"ds_lvx": {"sequence_parallel_size": 1}}))
    rows = []
    for ranks, path in ((2, sharded), (1, alone)):
        words = arguments(
            model=model,
            data=data,
            frames=3,
            deepspeed_config=path,
            output_dir=tmp_path / str(ranks),
            max_steps=3,
            learning_rate=1e-2,
            load_in_4bit=True,
            lora_r=4,
            lora_target_modules=ALL_LINEAR,
            trust_remote_code=True if name in OWN_CODE else None,
        )
        run_ranks(finetune, ranks, *words)
        rows.append(metrics(tmp_path / str(ranks))[0])
    for found, expected in zip(*rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), (key, found["step"])


@pytest.mark.exhaustive
def test_a_run_resumes_at_another_stage_and_its_adapter_serves(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    asked = [chat(("video", "a.mp4"), ("text", f"What {n}?"), answer=f"No {n}.") for n in range(4)]
    data = write_jsonl(tmp_path / "train.jsonl", *asked)
    base = write_checkpoint(tmp_path / "base")
    runs = import_module("tests.launch.finetune_runs")
    configs = [runs.write_config(tmp_path / f"{stage}.json", stage=stage) for stage in (2, 3)]
    given: dict[str, Any] = {
        "model": base,
        "data": data,
        "eval_data": data,
        "frames": 3,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_modules_to_save": "multi_modal_projector",
        "load_in_4bit": True,
        "gradient_checkpointing": True,
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 4,
        "load_best_model_at_end": True,
    }
    whole, later = tmp_path / "whole", tmp_path / "later"
    run_ranks(finetune, 2, *arguments(**given, deepspeed_config=configs[0], output_dir=whole))
    resume = {"resume": whole / "checkpoints" / "step-00000002"}
    run_ranks(
        finetune, 2, *arguments(**given, **resume, deepspeed_config=configs[1], output_dir=later)
    )
    expected = [row["loss"] for row in metrics(whole)[0]][2:]
    assert [row["loss"] for row in metrics(later)[0]] == pytest.approx(expected, rel=1e-5)
    plain = {**given, **resume, "load_in_4bit": None, "output_dir": tmp_path / "plain"}
    with pytest.raises(RankError) as caught:
        run_ranks(finetune, 2, *arguments(**plain, deepspeed_config=configs[0]))
    for text in caught.value.errors.values():
        assert "quantized: got False for a checkpoint with True; give --load_in_4bit" in text
    assert len(caught.value.errors) == 2
    for more in ([], ["--load_in_4bit"]):
        words = ["--model", whole / "model", *more, "--deepspeed_config", configs[0], "--frames", 3]
        words += ["--video", tmp_path / "a.mp4", "--prompt", "What 1?", "--max_new_tokens", 4]
        words += ["--output", tmp_path / "answers.jsonl", "--traceback"]
        assert run_ranks(run, 2, *map(str, words)) == [0, 0]
        assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"]
    words = ["merge", "--adapter", str(whole / "model"), "--output", str(tmp_path / "merged")]
    assert cli.main(words) == 0
