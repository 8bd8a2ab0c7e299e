"""mPLUG-Owl3 in one process: what patching changes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.fake_cuda import DEVICE, FakeCuda
from bench_launches import made_up_ranks
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.sharding import draft_batch, shard_batch
from tests.models.alone_case import assert_given_back, patched_by
from tests.models.mplugowl3_case import ds_config, hard_batch, tiny_model

LVX: dict[str, Any] = {"method": "lvx"}


def patched(model: Any, hyper: dict[str, Any] = LVX) -> Any:
    config = ds_config(stage=0, sp_size=1, cross=hyper, self_attn="ring")
    return patched_by(config, model)


def test_a_patched_model_is_its_own_self_and_can_be_given_back() -> None:
    assert_given_back(tiny_model, hard_batch(), patched)


@pytest.mark.parametrize("method", ["ulysses", "auto"])
def test_methods_without_lse_are_refused(method: str) -> None:
    words = r"layers\.0\.self_attn\.v_kv_proj, a hyper layer .* use 'lvx' or 'ring'"
    with pytest.raises(NotImplementedError, match=words):
        patched(tiny_model(), {"method": method})


def test_offload_is_refused() -> None:
    rule = {**LVX, "recompute_kv": True, "features": "offload"}
    with pytest.raises(NotImplementedError, match=r'"offload" for .*v_kv_proj'):
        patched(tiny_model(), rule)


def test_gated_layers_run_every_method() -> None:
    for method in ("lvx", "ring", "ulysses", "auto"):
        patched(tiny_model(gated=True), {"method": method}).unpatch()


def counted(batch: dict[str, Any]) -> torch.Tensor:
    """``media_offset [B, T, 2]`` as the processor of release 240728 has it."""
    length, before, rows = batch["input_ids"].shape[1], 0, []
    for places in batch["media_offset"]:
        seen = (torch.arange(length)[:, None] > places).sum(dim=1)
        if len(places) == 0:
            seen = torch.full((length,), -1_000_000)
        rows.append(torch.stack((torch.full((length,), before), before + seen), dim=1))
        before += len(places)
    return torch.stack(rows)


def test_offsets_may_be_those_of_either_release() -> None:
    model, batch = tiny_model(gated=True).eval(), hard_batch()
    expected = model(**batch)
    patched(model)
    for offsets in (batch["media_offset"], counted(batch)):
        draft = draft_batch({**batch, "media_offset": offsets}, model=model)
        out = model(**shard_batch(draft, model=model))
        torch.testing.assert_close(out.logits, expected.logits)
    with pytest.raises(ValueError, match=r"\(3, 5, 2\); expected \(3, 15, 2\)"):
        shard_batch({**batch, "media_offset": counted(batch)[:, :5]}, model=model)


def test_states_of_layers_are_refused() -> None:
    model = tiny_model()
    patched(model)
    with pytest.raises(NotImplementedError, match="output_hidden_states=True with a sharded"):
        model(**shard_batch(hard_batch(), model=model), output_hidden_states=True)


BAD: dict[str, Any] = {
    r"media_offset \[2, 15\] for sample 0; .* from 0 to 14": lambda b: {
        **b,
        "media_offset": [torch.tensor([2, 15]), *b["media_offset"][1:]],
    },
    r"media_offset \[4, 2\] for sample 0; .* that never go down": lambda b: {
        **b,
        "media_offset": [torch.tensor([4, 2]), *b["media_offset"][1:]],
    },
    r"expected a list with a tensor for each of 3 samples": lambda b: {**b, "media_offset": []},
    r"pixel_values \(5, 3, 4, 4\); expected \(images, 3, 8, 8\)": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][..., :4, :4],
    },
    r"of 4 images, of 5 in 3 samples; expected all of them, or images_per_sample": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][:4],
    },
    r"of \[3, 1, 0\] images by sample, and media_offset of \[4, 1, 0\]": lambda b: {
        **b,
        "pixel_values": b["pixel_values"][:4],
        "images_per_sample": [3, 1, 0],
    },
    r"images_per_sample \[5, 1, 0\] for 5 images": lambda b: {**b, "images_per_sample": [5, 1, 0]},
    r"position_ids that are not 0, 1, 2": lambda b: {
        **b,
        "position_ids": torch.arange(15)[None] % 5,
    },
    r"'pixel_value' in the batch; .*'pixel_values'": lambda b: {**b, "pixel_value": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_batch_is_told_what_is_wrong(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_batch(BAD[words](hard_batch()), model=tiny_model())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_close_to_thirty_two(*, gated: bool, autocast: bool) -> None:
    model, batch = tiny_model(gated=gated), hard_batch()
    expected = model(**batch).loss
    model = model if autocast else model.bfloat16()
    patched(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**shard_batch(batch, model=model)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_no_wait_on_cuda_from_the_cut_to_the_end_of_backward(*, gated: bool) -> None:
    hyper = {**LVX, "recompute_kv": True, "kernel": "native"}
    config = ds_config(stage=1, sp_size=3, cross=hyper, self_attn="ring")
    config["ds_lvx"]["layers"][2]["kernel"] = "native"
    with FakeCuda() as fake, made_up_ranks(3):
        model, groups = tiny_model(gated=gated, hidden_size=64), SequenceParallelGroups(3)
        patch_model(model, LVXConfig.from_ds_config(config), groups)
        model.to(DEVICE)
        fake.reset()
        draft = draft_batch(hard_batch(), model=model).pin_memory()
        model(**shard_batch(draft, model=model)).loss.backward()
        assert fake.waits == []
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        groups.close()
