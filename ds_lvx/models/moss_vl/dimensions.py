"""MOSS-VL for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_lvx.models.dimensions import Model, decoder, encoder, text_config
from ds_lvx.models.moss_vl.resize import Budget

PICTURE = (1080, 1920)
"""Height and width of a film that is planned for."""
FRAMES = 256
"""Of a film, where nobody says how many."""


@dataclass(frozen=True)
class MossModel(Model):
    """A model whose frames are the smaller the more there are of them.

    Attributes:
        patch, merge: pixels of a patch, and patches of a visual token, by side.
    """

    patch: int = 16
    merge: int = 2

    def with_frames(self, frames: int) -> Model:
        """See `ds_lvx.models.dimensions.Model.with_frames`."""
        multiple = self.patch * self.merge
        height, width = Budget().sides(*PICTURE, frames=frames, multiple=multiple)
        tokens = height * width // multiple**2
        return replace(self, tower_tokens=tokens * self.merge**2, frame_tokens=tokens + 1)

    @property
    def projector_tokens(self) -> int:
        """The merger works on visual tokens, not on patches."""
        return self.frame_tokens - 1


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`."""
    text, vision = config["text_config"], config["vision_config"]
    cross = len(text["cross_attention_layers"])
    layers = decoder(text, count=text["num_hidden_layers"] - cross)
    width, merge = vision["hidden_size"], vision["spatial_merge_size"]
    levels = 1 + len(vision["deepstack_visual_indexes"])
    merged = levels * width * merge**2
    model = MossModel(
        name=name,
        text=layers,
        cross=replace(layers, count=cross, features_dim=vision["out_hidden_size"]),
        vocabulary=text["vocab_size"],
        tower=encoder(
            vision["depth"], width, heads=vision["num_heads"], mlp=vision["intermediate_size"]
        ),
        tower_tokens=0,
        frame_tokens=0,
        projector_parameters=merged * (merged + vision["out_hidden_size"]),
        tower_states=levels,
        source=source,
        patch=vision["patch_size"],
        merge=merge,
    )
    return model.with_frames(FRAMES)


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    own = {"num_key_value_heads": 8, "head_dim": 128, "cross_attention_layers": range(2, 48, 4)}
    text = text_config(48, 4096, 32, 12_288, vocabulary=151_936, **own)
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": (8, 16, 24),
    }
    name = "OpenMOSS-Team/MOSS-VL-Instruct-0708"
    height, width = PICTURE
    source = (
        f"config.json of {name}; frames of a film of {width} x {height} pixels, which share "
        f"{Budget().total:,} pixels"
    )
    return (dimensions({"text_config": text, "vision_config": vision}, name, source),)
