"""A patched step: nothing of its rules travels, and what a batch settles is settled once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import ds_lvx
from bench.fake_cuda import DEVICE, FakeCuda
from ds_lvx.attention import auto, layout
from ds_lvx.attention.oracle import attention_oracle
from ds_lvx.attention.shape import AttentionShape
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels import choice, rule
from ds_lvx.kernels.flash_kernel import FlashKernel
from ds_lvx.kernels.interface import Problem
from ds_lvx.models import attend, patch_model
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.decoding_keys import DecodingKeys
from ds_lvx.models.layers import LayerPlan
from ds_lvx.plan.walks import label
from tests.models.mllama_case import ds_config, end_engine, hard_batch, start_engine, tiny_model
from tests.ranks import run_ranks
from tests.sent import bytes_sent

METHODS: dict[str, dict[str, Any]] = {
    "lvx gather": {"method": "lvx", "schedule": "gather"},
    "lvx ring": {"method": "lvx", "schedule": "ring"},
    "lvx recompute": {"method": "lvx", "schedule": "gather", "recompute_kv": True},
    "ring": {"method": "ring"},
    "ulysses": {"method": "ulysses"},
    "hybrid of all": {"method": "hybrid", "ulysses": 3},
    "hybrid of one": {"method": "hybrid", "ulysses": 1, "schedule": "ring"},
}


def run_step(cross: dict[str, Any], self_attn: str) -> tuple[float, float]:
    """The bytes that a step of this rank sent, and those that its layers have to send."""
    config = ds_config(stage=0, sp_size=3, cross=cross, self_attn=self_attn)
    model, groups = tiny_model(), ds_lvx.SequenceParallelGroups(3)
    patch = patch_model(model, LVXConfig.from_ds_config(config), groups)
    shard = ds_lvx.shard_batch(hard_batch(), model=model)
    with ds_lvx.traffic() as counted:
        model(**shard).loss.backward()
    batch, rank = shard["ds_lvx"], groups.sp_rank
    expected = 0.0
    for plan in patch.plans:
        if plan.kind == "local":
            continue
        lengths = batch.layout(plan.kind)
        shape = AttentionShape(2, lengths.q_lengths, lengths.kv_lengths, 4, 2, 8, 4)
        schedule = "gather" if plan.schedule == "auto" else plan.schedule
        method = plan.method if plan.hybrid is None else plan.hybrid.name
        sent = bytes_sent(shape, label(method, schedule), rank=rank)
        expected += sent.forward + sent.backward
    patch.unpatch()
    groups.close()
    return counted.bytes_sent, expected


@pytest.mark.parametrize("name", METHODS)
def test_no_byte_of_visibility_travels(name: str) -> None:
    """A batch with a rule in every layer, uneven shards: q, k, v and their gradients, no more."""
    self_attn = name if name in ("ring", "ulysses") else "ulysses"
    for sent, expected in run_ranks(run_step, 3, METHODS[name], self_attn):
        assert sent == expected > 0


def count_what_is_settled(
    cross: dict[str, Any], *, layers: int, checkpoint: bool, steps: int = 1
) -> dict[str, float]:
    """How often rules are cut, listed and decided, a batch."""
    counts: Counter[str] = Counter()

    def counting(patch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        function = getattr(where, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        patch.setattr(where, name, counted)

    config = ds_config(stage=0, sp_size=2, cross=cross, self_attn="auto")
    config["gradient_accumulation_steps"] = 2
    if checkpoint:
        config["activation_checkpointing"] = {}
    at = list(range(1, layers, 2))
    model = tiny_model(num_hidden_layers=layers, cross_attention_layers=at)
    with pytest.MonkeyPatch.context() as patch:
        counting(patch, rule, "_narrowed")  # blocks are listed
        counting(patch, layout, "_pad_parts")  # rules are cut anew
        counting(patch, auto, "cheapest")  # the planner decides
        counting(patch, layout, "kernel_for")
        made = layout.Layout.of_batch
        patch.setattr(
            layout.Layout,
            "of_batch",
            lambda *args, **kwargs: (counts.update(["of_batch"]), made(*args, **kwargs))[1],
        )
        engine = start_engine(config, model)
        counts.clear()
        for step in range(2 * steps):
            shard = ds_lvx.shard_batch(hard_batch(step), model=engine.module)
            engine.backward(engine(**shard).loss)
            engine.step()
        end_engine(engine)
    return {name: count / (2 * steps) for name, count in sorted(counts.items())}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lvx ring",
        "ulysses",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("auto", "ring")),
    ],
)
def test_rules_are_cut_listed_and_decided_once_a_batch(name: str) -> None:
    """The same counts with 4 layers and with 8 checkpointed ones, by micro-batch."""
    cross = {"method": "auto"} if name == "auto" else METHODS[name]
    runs = [
        run_ranks(count_what_is_settled, 2, cross, layers=layers, checkpoint=checkpoint)[0]
        for layers, checkpoint in ((4, False), (8, True))
    ]
    assert runs[0] == runs[1]
    assert runs[0]["of_batch"] == 2  # the text over itself, and over the frames
    assert runs[0]["kernel_for"] == 2
    assert 0 < runs[0]["cheapest"] <= 2
    assert runs[0]["_narrowed"] >= 1


def count_covers(kernel: str, *, layers: int, self_attn: str) -> tuple[int, list[bool], float]:
    """Covers that a step finds, whether flash served each forward, and the norm of the gradient."""
    config = ds_config(stage=0, sp_size=2, cross={"method": "lvx"}, self_attn=self_attn)
    for place in (1, 2):
        config["ds_lvx"]["layers"][place]["kernel"] = kernel
    at = list(range(1, layers, 2))
    model = tiny_model(num_hidden_layers=layers, cross_attention_layers=at)
    found: list[Any] = []
    served: list[bool] = []
    forward, cover_of = FlashKernel.forward, rule.cover_of

    def asked(kernel: FlashKernel, problem: Problem) -> Any:
        served.append(kernel.serves(problem))
        return forward(kernel, problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "cover_of", lambda host: (found.append(host), cover_of(host))[1])
        patch.setattr(FlashKernel, "forward", asked)
        engine = start_engine(config, model)
        shard = ds_lvx.shard_batch(hard_batch(), model=engine.module)
        loss = engine(**shard).loss
        engine.backward(loss)
        norm = sum(float(p.grad.double().square().sum()) for p in engine.module.parameters())
        end_engine(engine)
    return len(found), served, norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "self_attn", ["ulysses", pytest.param("ring", marks=pytest.mark.exhaustive)]
)
def test_flash_serves_a_whole_model_by_covers_found_once(self_attn: str) -> None:
    """Text over itself and over images, padded and blind rows; as many covers for 4 layers as 8."""
    few, many, native = (
        run_ranks(count_covers, 2, kernel, layers=layers, self_attn=self_attn)
        for kernel, layers in (("flash", 4), ("flash", 8), ("native", 4))
    )
    for rank in range(2):
        assert few[rank][0] == many[rank][0] > 0
        assert len(few[rank][1]) >= 4
        assert all(few[rank][1] + many[rank][1])
        assert native[rank][0] == 0, "on a CPU nobody else asks for a cover"
        assert few[rank][2] > 0
        assert few[rank][2] == pytest.approx(native[rank][2], rel=1e-4)


PLAN = LayerPlan("text", "self", "ring", "auto", "auto", recompute_kv=False)


def test_tokens_behind_a_prompt_find_their_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer one softmax over the prompt and all tokens behind it."""
    asked: list[torch.Tensor] = []
    candidates = choice.candidates
    monkeypatch.setattr(choice, "candidates", lambda q: (asked.append(q), candidates(q))[1])
    cpu = torch.device("cpu")
    keys, place = DecodingKeys(1, 5, cpu), layout.Layout(Channel(None), (1,), (5,), device=cpu)
    k, v = torch.randn(2, 1, 9, 2, 8)
    keys.by_layer["self", "text"] = k[:, :5], v[:, :5]
    for end in range(6, 10):
        q = torch.randn(1, 1, 4, 8)
        with torch.no_grad():
            behind = k[:, 5:end], v[:, 5:end]
            found = keys.attend_behind(PLAN, place, q, behind, scale=0.3)
        expected = attention_oracle(q, k[:, :end], v[:, :end], softmax_scale=0.3)
        for mine, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), exact, atol=1e-6, rtol=1e-6)
    assert len(asked) == 1


def test_keys_that_are_made_already_are_not_copied() -> None:
    """Of transformers' layout, heads first: the kernel is all that is launched."""
    with FakeCuda() as fake, torch.no_grad():
        q, k, v = (
            torch.empty(1, 4, 6, 8, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
            for _ in range(3)
        )
        text = layout.Layout(Channel(None), (6,), (6,), device=DEVICE)
        plan = LayerPlan("text", "self", "lvx", "auto", "native", recompute_kv=False)
        fake.reset()
        attend.attend_to(plan, ShardedBatch(text, None, None), q, (k, v), scale=0.3)
    assert fake.launches == {"_scaled_dot_product_flash_attention": 1}
