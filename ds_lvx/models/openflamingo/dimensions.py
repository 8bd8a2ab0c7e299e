"""OpenFlamingo for the planner. Imports no torch."""

from __future__ import annotations

from ds_lvx.models.dimensions import Layers, Model, encoder


def _flamingo(
    name: str, *, hidden: int, layers: int, heads: int, vocabulary: int, every: int
) -> Model:
    text = Layers(layers, hidden, heads, heads, hidden // heads, 4 * hidden, mlp_matrices=2)
    return Model(
        name=f"openflamingo/{name}",
        text=text,
        cross=Layers(-(-layers // every), hidden, 8, 8, 64, 4 * hidden, 2, features_dim=1024),
        vocabulary=vocabulary,
        tower=encoder(24, 1024, heads=16, mlp=4096),
        tower_tokens=257,
        frame_tokens=64,
        projector_parameters=0,
        tower_states=1,
        source="open_flamingo/src/helpers.py and the model card (ViT-L/14 at 224 pixels, 64 "
        "latents a frame); the perceiver is left out",
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _flamingo(
            "OpenFlamingo-3B-vitl-mpt1b",
            hidden=2048,
            layers=24,
            heads=16,
            vocabulary=50_432,
            every=1,
        ),
        _flamingo(
            "OpenFlamingo-4B-vitl-rpj3b",
            hidden=2560,
            layers=32,
            heads=32,
            vocabulary=50_432,
            every=2,
        ),
        _flamingo(
            "OpenFlamingo-9B-vitl-mpt7b",
            hidden=4096,
            layers=32,
            heads=32,
            vocabulary=50_432,
            every=4,
        ),
    )
