"""What a run shows of its ranks' shares is what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.shares import Share, counted, saved, share_table, shares
from ds_lvx.sharding import shard_batch
from tests.models import qwen2_5_vl_case as among_text
from tests.models.concatenated_case import rules
from tests.models.mllama_case import ds_config, make_batch, reference_inputs, tiny_model
from tests.ranks import run_ranks

# Three images of two tiles each, with five visual tokens a tile.
TOKENS = 3 * 2 * 5


def batch() -> dict[str, Any]:
    return make_batch([[2, 3, 4]], length=17, num_tiles=[[2, 2, 2]])


def held(recompute: bool) -> tuple[list[Share], int]:
    """On a rank: all shares, and what it really keeps of K and V, by the size of its layers'."""
    cross = {"method": "lvx", "schedule": "gather", "recompute_kv": recompute}
    model = tiny_model()
    groups = SequenceParallelGroups(2)
    config = LVXConfig.from_ds_config(
        ds_config(stage=0, sp_size=2, cross=cross, self_attn="ulysses")
    )
    patch = patch_model(model, config, groups)
    shard = shard_batch(batch(), model=model)
    sizes = []
    for name, module in model.named_modules():
        if name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            module.register_forward_hook(lambda module, args, out: sizes.append(out.nbytes))
    with saved() as count:
        model(**shard).loss.backward()
    found = shares(patch, shard[KEYWORD], samples=1, element_bytes=4)
    kept = [record["bytes"] for record in groups.channel.agree({"bytes": count.bytes})]
    patch.unpatch()
    groups.close()
    return counted(found, kept), sum(sizes[:4])


def test_shares_are_what_ranks_hold_and_one_process_would() -> None:
    results = run_ranks(held, 2, False)
    model = tiny_model()
    with saved() as count:
        model(**reference_inputs(batch()), use_cache=False)
    for rank, (found, kv_bytes) in enumerate(results):
        assert found == results[0][0]
        assert found[rank].kv_bytes == kv_bytes
    first, second, alone = results[0][0]
    assert [first.text_tokens, second.text_tokens, alone.text_tokens] == [9, 8, 17]
    assert [first.visual_tokens, second.visual_tokens, alone.visual_tokens] == [20, 10, TOKENS]
    assert alone.features_bytes == TOKENS * 32 * 4
    assert alone.activation_bytes == pytest.approx(count.bytes, rel=0.15)
    assert second.activation_bytes < first.activation_bytes < 0.7 * count.bytes


def test_layers_that_project_again_hold_one_layer_at_a_time() -> None:
    kept, again = (run_ranks(held, 2, recompute)[0][0][-1] for recompute in (False, True))
    assert kept.kv_bytes == 2 * again.kv_bytes  # two layers
    assert again.kv_bytes == 2 * TOKENS * 2 * 8 * 4


def held_among_text() -> list[Share]:
    model, groups = among_text.tiny_model(), SequenceParallelGroups(2)
    config = LVXConfig.from_ds_config(rules("qwen2_5_vl", "ring", 2))
    patch = patch_model(model, config, groups)
    shard = shard_batch(among_text.one_video(), model=model)
    found = shares(patch, shard[KEYWORD], samples=1, element_bytes=4)
    patch.unpatch()
    groups.close()
    return found


def test_visual_tokens_among_the_text_are_told_apart() -> None:
    batch = among_text.one_video()
    images = int((batch["input_ids"] == among_text.VIDEO).sum())
    *ranks, alone = run_ranks(held_among_text, 2)[0]
    assert alone.visual_tokens == images == sum(share.visual_tokens for share in ranks)
    assert all(share.visual_tokens > 0 for share in ranks)
    assert alone.text_tokens == batch["input_ids"].numel() - images
    assert (
        alone.features_bytes == 4 * images * among_text.tiny_model().config.text_config.hidden_size
    )


def test_the_table_has_a_line_a_rank_and_one_for_all() -> None:
    lines = share_table([Share(9, 20, 2560, 2**21), Share(18, 20, 2560, 2**21)]).splitlines()
    assert lines[0].split() == ["text", "tokens", "visual", "tokens", "K", "and", "V", "features"]
    assert lines[1].split()[2:] == ["9", "20", "2.5", "KiB", "2.0", "MiB"]
    assert lines[2].startswith("one rank would hold")


def test_weights_are_not_counted() -> None:
    layer = torch.nn.Linear(4, 8)
    with saved() as count:
        layer(torch.randn(2, 4, requires_grad=True))
    assert count.bytes == 2 * 4 * 4
