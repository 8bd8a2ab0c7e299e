"""A prompt whose keys stay on the ranks that have its tokens: among visual ones, or an encoder's.

docs/generation.md has the formulas. All of it runs split over the ranks, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_lvx.attention.shape import evenly
from ds_lvx.plan.choose import cheapest
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import cost
from ds_lvx.plan.memory import LAYER_BYTES
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import products_s
from ds_lvx.plan.transfers import Pass, Ranks


def rows_of_ranks(scenario: Scenario, ranks: int) -> Sequence[int]:
    """Tokens of the prompt by rank, visual ones and text, the rank that has most first.

    Text is dealt around the visual tokens, and these stay on the rank that encodes their frame.
    """
    tokens = scenario.text_tokens + scenario.visual_tokens
    frames = scenario.frames_of_a_rank(ranks) * scenario.model.frame_tokens
    most = max(-(-tokens // ranks), frames)
    return [most, *(evenly(tokens - most, ranks - 1) if ranks > 1 else [])]


def among_parts(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    """Seconds of the layers in which visual tokens stand among the text's, by part."""
    model, device = scenario.model, cluster.device
    lengths = tuple(rows_of_ranks(scenario, ranks))
    shape = replace(
        scenario.cross_shape(ranks, "ring"),
        q_lengths=lengths,
        kv_lengths=lengths,
        backward=False,
        recompute=False,
        features_dim=0,
    )
    way = "none" if ranks == 1 else cheapest(shape, cluster).name
    layer: Pass = cost(shape, cluster, way).forward
    seen = scenario.pairs_seen
    products = products_s(device, model.cross.parameters, max(lengths))
    # The prompt's last logits go to every rank.
    logits = Ranks(cluster, ranks).gather(scenario.element_bytes * model.vocabulary)
    return {
        "text": products + products_s(device, model.vocabulary * model.text.hidden, 1),
        "attention": model.cross.count * (seen * layer.kernel_s + layer.other_s),
        "network": model.cross.count * layer.exposed_s + logits.seconds,
    }


def encoder_parts(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    """Seconds of an encoder's layers over its rows, and of K and V of these for the decoder."""
    model, device, rows = scenario.model, cluster.device, scenario.model.rows
    assert rows is not None, "an encoder"
    lengths = rows_of_ranks(scenario, ranks)
    shape = replace(
        scenario.rows_shape(ranks, rows),
        q_lengths=tuple(lengths),
        kv_lengths=tuple(lengths),
        backward=False,
    )
    way = "none" if ranks == 1 else "ulysses" if rows.heads >= ranks else "ring"
    layer: Pass = cost(shape, cluster, way).forward
    kernels = rows.share_seen(sum(lengths)) * layer.kernel_s
    projection = products_s(device, model.cross.key_parameters, max(lengths))
    return {
        "encoder": products_s(device, rows.parameters, max(lengths))
        + rows.count * (kernels + layer.other_s),
        "projection of K and V": model.cross.count * projection,
        "network": rows.count * layer.exposed_s,
    }


def prompt_bytes(scenario: Scenario, *, ranks: int, keys: int) -> int:
    """The most that the layers of such a prompt have at once, K and V of all tokens among it."""
    width = (scenario.model.rows or scenario.model.cross).hidden
    tokens = max(rows_of_ranks(scenario, ranks))
    layer = LAYER_BYTES * tokens * width
    if scenario.model.rows is not None:  # which is over when the decoder makes its keys
        return max(layer, scenario.element_bytes * tokens * width + keys)
    return layer + keys
