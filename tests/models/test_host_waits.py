"""Between the forward and ``engine.step()`` the host never waits for the device.

One model has a cross-attention layer of every method; others have visual tokens among the text's.
On a CPU two ranks train them, and every number that the host reads is told by its place; on fake
CUDA tensors they run as one rank of groups of one and three, the others' part made up, and every
wait is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_lvx
from bench.fake_cuda import DEVICE, FakeCuda
from bench_launches import made_up_ranks
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.sharding import draft_batch
from tests.elsewhere import ElsewhereByDefault
from tests.models import (
    blip_case,
    gemma3_case,
    gemma4_case,
    glm4v_case,
    glm4v_moe_case,
    idefics_case,
    internvl_case,
    llava_onevision_case,
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
from tests.models.concatenated_case import rules
from tests.models.host_reads import HostReads
from tests.models.mllama_case import ds_config, end_engine, hard_batch, start_engine, tiny_model
from tests.models.test_shared_prefixes import answered
from tests.ranks import run_ranks

exhaustive = pytest.mark.exhaustive
METHODS: list[dict[str, Any]] = [
    {"method": "lvx", "schedule": "gather"},
    {"method": "lvx", "schedule": "ring"},
    {"method": "lvx", "schedule": "gather", "recompute_kv": True},
    {"method": "lvx", "schedule": "ring", "recompute_kv": True},
    {"method": "ring"},
    {"method": "ulysses"},
    {"method": "hybrid", "ulysses": 0},  # all ranks
    {"method": "hybrid", "ulysses": 1, "across": "lvx", "schedule": "ring"},
]
CROSS_AT = list(range(1, 1 + len(METHODS)))
LAYERS = len(METHODS) + 2

# (operation, place): why it is no wait for the device.
ALLOWED_ON_CPU = {
    # Both are states of generators, which PyTorch keeps on the host for every device.
    ("equal", "ds_lvx/attention/random_state.py:equals"),
    # Lengths of pictures and windows, which stay on the host: no wait on fake CUDA tensors.
    *(
        ("tolist", f"models/{name}/modeling_{name}.py:{function}")
        for name in (
            *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
            *("glm4v", "glm4v_moe"),
        )
        for function in ("<listcomp>", "forward")  # the latter from Python 3.12 on
    ),
    *(
        (read, f"models/video_llama_3/modeling_video_llama_3.py:{function}")
        for read in ("tolist", "_local_scalar_dense")
        for function in ("<listcomp>", "forward", "pixel_unshuffle")
    ),
    # one_hot looks for its least and most, but not on CUDA, where its kernel asserts.
    ("_local_scalar_dense", "models/gemma4/modeling_gemma4.py:_avg_pool_by_positions"),
}
CONCATENATED: dict[str, Any] = {
    "qwen2_5_vl": qwen2_5_vl_case,
    "qwen2_vl": qwen2_vl_case,
    "qwen3_vl": qwen3_vl_case,
    "qwen3_vl_moe": qwen3_vl_moe_case,
    "qwen3_5": qwen3_5_case,
    "qwen3_5_moe": qwen3_5_moe_case,
    "glm4v": glm4v_case,
    "glm4v_moe": glm4v_moe_case,
    "gemma3": gemma3_case,
    "video_llama_3": video_llama_3_case,
    "gemma4": gemma4_case,
    "internvl": internvl_case,
    "smolvlm": smolvlm_case,
    "llava_onevision": llava_onevision_case,
}
LVX: dict[str, Any] = {"cross": {"method": "lvx"}, "self_attn": "ring"}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "t5gemma2": (t5gemma2_case, LVX),
    "idefics": (idefics_case, LVX),
    "mplugowl3": (mplugowl3_case, LVX),
    "openflamingo": (openflamingo_case, LVX),
    "qwen": (qwen_vl_case, {"self_attn": "ring"}),
    "video_llama": (video_llama_case, {"self_attn": "ring"}),
    "blip-2": (blip_case, {"self_attn": "ring"}),
    "instructblip": (
        SimpleNamespace(
            tiny_model=partial(blip_case.tiny_model, "instructblip"),
            hard_batch=blip_case.instructed,
            ds_config=blip_case.ds_config,
        ),
        {"self_attn": "ring"},
    ),
}
"""By family: its case, and the words of its ``ds_config``."""
UNUSED = (
    *("vision_tower.post_layernorm", "vision_model.post_layernorm", "attn_pool.pos_embed"),
    *("vision_encoder.conv1", "vision_encoder.ln_post", "vision_model.encoder.layers.2."),
)
"""In names of parameters that no loss depends on."""


def config(*, sp_size: int, kernel: str = "auto") -> dict[str, Any]:
    """A rule a layer: the first text layer by Ulysses, the last by ring attention."""
    made = ds_config(stage=1, sp_size=sp_size, cross={"method": "lvx"}, self_attn="ring")
    vision, *_, last = made["ds_lvx"]["layers"]
    rules = [
        {"match": f"*.{at}.cross_attn", "kernel": kernel, **method}
        for at, method in zip(CROSS_AT, METHODS, strict=True)
    ]
    first = {"match": "*language_model*.0.self_attn", "method": "ulysses", "kernel": kernel}
    for rule in rules:
        if rule.get("ulysses") == 0:
            rule["ulysses"] = sp_size
    made["ds_lvx"]["layers"] = [vision, *rules, first, {**last, "kernel": kernel}]
    return made


def model_of_all_methods() -> Any:
    """Its head_dim is 16, the least that every kernel does."""
    return tiny_model(num_hidden_layers=LAYERS, cross_attention_layers=CROSS_AT, hidden_size=64)


def reads_of_second_step(
    made: dict[str, Any], model: Callable[[], Any], batch: Callable[[], Any]
) -> set[tuple[str, str]]:
    engine = start_engine(made, model())
    whole = batch()
    with ElsewhereByDefault():
        shard = ds_lvx.shard_batch(whole, model=engine.module)
    reads = HostReads()
    for mode in (ElsewhereByDefault(), reads):
        with mode:
            engine.backward(engine(**shard).loss)
        engine.step()
    end_engine(engine)
    return set(reads.found)


@pytest.mark.slow
def test_the_host_reads_no_number_between_forward_and_step() -> None:
    given = (config(sp_size=2), model_of_all_methods, hard_batch)
    for found in run_ranks(reads_of_second_step, 2, *given):
        assert found <= ALLOWED_ON_CPU


def reads_by_family() -> dict[str, set[tuple[str, str]]]:
    return {
        name: reads_of_second_step(rules(name, "lvx", 2), case.tiny_model, case.hard_batch)
        for name, case in CONCATENATED.items()
    }


@pytest.mark.slow
def test_towers_and_embeddings_read_no_number() -> None:
    for found in run_ranks(reads_by_family, 2):
        for name, reads in found.items():
            assert reads <= ALLOWED_ON_CPU, name


@pytest.mark.parametrize("name", OTHERS)
def test_the_host_reads_no_number_of_other_families(name: str) -> None:
    """Of the second pass over a batch, whose rules the first has looked into."""
    case, words = OTHERS[name]
    with made_up_ranks(1):
        model, groups = case.tiny_model(), SequenceParallelGroups(1)
        made = LVXConfig.from_ds_config(case.ds_config(stage=1, sp_size=1, **words))
        patch_model(model, made, groups)
        shard = ds_lvx.shard_batch(case.hard_batch(), model=model)
        for _ in range(2):
            with HostReads() as reads:
                model(**shard).loss.backward()
        groups.close()
    assert reads.found == []


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    with FakeCuda() as entered:
        yield entered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kernel"),
    [
        pytest.param(1, "native", marks=pytest.mark.exhaustive),
        pytest.param(3, "native", marks=pytest.mark.exhaustive),
        (3, "triton"),
    ],
)
def test_no_wait_on_cuda_from_the_cut_to_the_end_of_backward(
    ranks: int, kernel: str, fake: FakeCuda
) -> None:
    with made_up_ranks(ranks):
        model = model_of_all_methods()
        made = LVXConfig.from_ds_config(config(sp_size=ranks, kernel=kernel))
        groups = SequenceParallelGroups(ranks)
        patch_model(model, made, groups)
        model.to(DEVICE)
        fake.reset()
        draft = draft_batch(hard_batch(), model=model).pin_memory()
        shard = ds_lvx.shard_batch(draft, model=model)
        assert shard["ds_lvx"].cross.rule(queries=0, keys=0).visibility.q_start.is_cuda
        loss = model(**shard).loss
        loss.backward()
        assert fake.waits == []
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert sum(fake.launches.values()) > 1000
        groups.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5_vl",
        pytest.param("qwen2_vl", marks=pytest.mark.exhaustive),
        pytest.param("qwen3_vl", marks=pytest.mark.exhaustive),
        pytest.param("qwen3_vl_moe", marks=pytest.mark.exhaustive),
        "qwen3_5",
        pytest.param("qwen3_5_moe", marks=pytest.mark.exhaustive),
        pytest.param("glm4v", marks=pytest.mark.exhaustive),
        pytest.param("glm4v_moe", marks=pytest.mark.exhaustive),
        "gemma3",
        pytest.param("video_llama_3", marks=pytest.mark.exhaustive),
        "gemma4",
        pytest.param("internvl", marks=pytest.mark.exhaustive),
        pytest.param("smolvlm", marks=pytest.mark.exhaustive),
        pytest.param("llava_onevision", marks=pytest.mark.exhaustive),
    ],
)
def test_towers_and_embeddings_do_not_wait_on_cuda(
    name: str, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("qwen3_5"):
        monkeypatch.setattr(modeling_of(name), "causal_conv1d_fn", convolved(name))
    made = rules(name, "lvx", 3)
    made["ds_lvx"]["layers"][1]["kernel"] = "native"
    assert waits_of_a_step(in_bf16(CONCATENATED[name]), made, ranks=3, fake=fake) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("gemma3", marks=exhaustive)])
def test_rows_that_begin_alike_do_not_wait_on_cuda(
    name: str, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a state goes on in each of them."""
    if name == "qwen3_5":
        monkeypatch.setattr(modeling_of(name), "causal_conv1d_fn", convolved(name))
    made, case = rules(name, "lvx", 3), in_bf16(CONCATENATED[name])
    made["ds_lvx"]["layers"][1]["kernel"] = "native"
    made["ds_lvx"]["share_prefixes"] = True
    case.hard_batch = lambda: answered(case.batch(CONCATENATED[name].left_padded))
    assert waits_of_a_step(case, made, ranks=3, fake=fake) == []


def modeling_of(name: str) -> Any:
    return import_module(f"transformers.models.{name}.modeling_{name}")


def convolved(name: str) -> Callable[..., Any]:
    """The model's, of a dense input: for another PyTorch would ask CUDA itself for a copy."""
    own = modeling_of(name).causal_conv1d_fn

    def dense(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(x.contiguous(), *args, **kwargs)

    return dense


def in_bf16(case: Any) -> Any:
    """As GPUs train; PyTorch's grouped products, of experts, wait in any other dtype."""

    def batch(make: Callable[[], dict[str, Any]] = case.hard_batch) -> dict[str, Any]:
        return {k: v.bfloat16() if "pixel" in k else v for k, v in make().items()}

    return SimpleNamespace(
        tiny_model=lambda: case.tiny_model().bfloat16(), hard_batch=batch, batch=batch
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "idefics" else exhaustive) for name in OTHERS],
)
def test_other_families_do_not_wait_on_cuda(name: str, fake: FakeCuda) -> None:
    case, words = OTHERS[name]
    made = case.ds_config(stage=1, sp_size=1, **words)
    for rule in made["ds_lvx"]["layers"]:
        rule |= {} if rule["method"] == "none" else {"kernel": "native"}
    assert waits_of_a_step(case, made, ranks=1, fake=fake) == []


def waits_of_a_step(
    case: Any, made: dict[str, Any], *, ranks: int, fake: FakeCuda
) -> list[tuple[str, str]]:
    """From the cut to the end of backward, in which all that trains gets a gradient."""
    with made_up_ranks(ranks):
        model, groups = case.tiny_model(), SequenceParallelGroups(ranks)
        patch_model(model, LVXConfig.from_ds_config(made), groups)
        model.to(DEVICE)
        fake.reset()
        draft = draft_batch(case.hard_batch(), model=model).pin_memory()
        shard = ds_lvx.shard_batch(draft, model=model)
        model(**shard).loss.backward()
        missing = [name for name, each in model.named_parameters() if each.grad is None]
        assert [name for name in missing if not any(part in name for part in UNUSED)] == []
        groups.close()
    return fake.waits


def pass_on_a_gpu() -> bool:
    """A second pass, forward and backward, in which PyTorch refuses to wait."""
    model = model_of_all_methods()
    groups = SequenceParallelGroups(1)
    patch_model(model, LVXConfig.from_ds_config(config(sp_size=1)), groups)
    model.to("cuda", torch.bfloat16)
    for refuses in (False, True):
        batch = hard_batch()
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        draft = draft_batch(batch, model=model).pin_memory()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if refuses else "default")
        try:
            loss = model(**ds_lvx.shard_batch(draft, model=model)).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    groups.close()
    return bool(loss.isfinite())


@pytest.mark.gpu
def test_no_wait_on_a_gpu() -> None:
    assert run_ranks(pass_on_a_gpu, 1, device="cuda") == [True]


def test_waits_are_seen(fake: FakeCuda) -> None:
    x = torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
    assert fake.waits == []
    ways = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x[0] > 0),
        "nonzero": x.nonzero,
        "mask": lambda: x[x > 0],
        "tolist": x.tolist,
        "cpu": x.cpu,
        "to": lambda: torch.ones(3).to(DEVICE),
        "pageable": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
        "copy": lambda: x.copy_(torch.ones(3)),
        "factory": lambda: torch.tensor([1.0], device=DEVICE),
        "synchronize": torch.cuda.synchronize,
    }
    for name, way in ways.items():
        fake.reset()
        try:
            way()
            seen = bool(fake.waits)
        except RuntimeError:  # the step would not run to its end
            seen = True
        assert seen, name
