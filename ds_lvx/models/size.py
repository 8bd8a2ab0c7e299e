"""The size of a model with random weights. No torch: the planner asks for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Dimensions of a model with random weights, in words that every family understands.

    Attributes:
        vocabulary: of the output; the image token's id is this number.
        hidden, heads, kv_heads, mlp: of the text model.
        head_dim: of the text model; 0: hidden / heads.
        experts, chosen_experts: MLPs that a layer of the text has, and that a token goes through,
            where ``mlp`` is one's; 0: a layer has one.
        state_heads, state_values, state_dim: of layers of the text that carry a state along it:
            heads of keys, of values, and the size of both; 0: there are none.
        layers: of the text model, cross-attention layers among them.
        cross_at: which of them attend to images.
        positions: that the text may have.
        vision_hidden, vision_heads, vision_mlp, vision_layers, vision_global_layers: of the tower.
        image_size, patch_size, tiles: of a frame.
        rope_theta: base of the rotary embedding.
        initializer_range: standard deviation of the weights.
        bos, eos, pad: ids of those tokens.
    """

    vocabulary: int
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 128
    head_dim: int = 0
    experts: int = 0
    chosen_experts: int = 0
    state_heads: int = 0
    state_values: int = 0
    state_dim: int = 0
    layers: int = 4
    cross_at: tuple[int, ...] = (1, 3)
    positions: int = 256
    vision_hidden: int = 16
    vision_heads: int = 2
    vision_mlp: int = 32
    vision_layers: int = 2
    vision_global_layers: int = 1
    image_size: int = 28
    patch_size: int = 14
    tiles: int = 1
    rope_theta: float = 1e4
    initializer_range: float = 0.02
    bos: int = 0
    eos: int = 0
    pad: int | None = None
