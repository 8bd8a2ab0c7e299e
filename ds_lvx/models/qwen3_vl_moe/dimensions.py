"""Qwen3-VL-MoE for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ds_lvx.models.dimensions import Model
from ds_lvx.models.qwen2_5_vl.dimensions import SIDE
from ds_lvx.models.qwen3_vl import dimensions as qwen


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`; a token's MLP are the experts that it is
    sent to. Where some layers have none, each counts as the mean of all."""
    found, text = qwen.dimensions(config, name, source), config.get("text_config", config)
    return mixture(
        found,
        text["moe_intermediate_size"],
        experts=_experts(text),
        chosen=text["num_experts_per_tok"],
        sparse=_layers_of_experts(text),
    )


def mixture(
    found: Model,
    width: int,
    *,
    experts: int,
    chosen: int,
    sparse: int,
    shared: int = 0,
    gated: bool = False,
) -> Model:
    """A model whose text has experts in some layers.

    Args:
        found: the same without them.
        width: of an expert.
        experts: that a layer has.
        chosen: of these, that a token is sent to.
        sparse: layers that have them.
        shared: width of further ones together, that every token goes through.
        gated: what these give is gated.
    """
    count, hidden = sum(each.count for each in found.crossing), found.cross.hidden
    plain = (sparse * shared + (count - sparse) * found.cross.mlp) // count
    mlp = sparse * chosen * width // count + plain
    others = sparse * hidden * (3 * (experts - chosen) * width + experts) // count
    kinds = {name: getattr(found, name) for name in ("cross", "text", "recurrent")}
    own = {"mlp": mlp, "others": others, "plain_mlp": plain, "gated_mlp": gated}
    changed = {n: replace(layers, **own) for n, layers in kinds.items() if layers is not None}
    return replace(found, **changed)


def _experts(text: Mapping[str, Any]) -> int:
    """Experts of a layer, in either of the words that transformers writes."""
    return int(text["num_experts"] if "num_experts" in text else text["num_local_experts"])


def _layers_of_experts(text: Mapping[str, Any]) -> int:
    """Layers whose MLP is a mixture."""
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
    layers = range(text["num_hidden_layers"])
    return sum((n + 1) % step == 0 and n not in dense for n in layers)


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    sizes = {
        # layers, width, heads, heads of keys, width of an expert
        "30B-A3B": (48, 2048, 32, 4, 768),
        "235B-A22B": (94, 4096, 64, 4, 1536),
    }
    return tuple(_known(size, *numbers) for size, numbers in sizes.items())


def _known(size: str, layers: int, hidden: int, *others: int) -> Model:
    heads, kv_heads, expert = others
    config = {
        **qwen.published(layers, hidden, heads, 0, small=False),
        "num_key_value_heads": kv_heads,
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    name = f"Qwen/Qwen3-VL-{size}"
    return dimensions(config, name, f"config.json of {name}-Instruct; frames of {SIDE} x {SIDE}")
