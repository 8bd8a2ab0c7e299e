"""What the planner has to know of a model: by its name, or from a Hugging Face ``config.json``.

Every entry names its source. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Layers:
    """Transformer layers of one kind.

    Attributes:
        count: how many.
        hidden: width.
        heads, kv_heads, head_dim: of attention.
        mlp: inner width; 0 where there is none.
        mlp_matrices: 3 with a gate, 2 without.
        features_dim: width of what K and V are made of; 0 is ``hidden``.
    """

    count: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int = 0
    mlp_matrices: int = 3
    features_dim: int = 0

    @property
    def query_parameters(self) -> int:
        """Weights of a layer that every token of its own goes through."""
        attention = 2 * self.hidden * self.heads * self.head_dim
        return attention + self.mlp_matrices * self.hidden * self.mlp

    @property
    def key_parameters(self) -> int:
        """Weights of a layer's projection of K and V."""
        return 2 * (self.features_dim or self.hidden) * self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Weights of all layers."""
        return self.count * (self.query_parameters + self.key_parameters)


@dataclass(frozen=True)
class Model:
    """A multimodal model with cross-attention.

    Attributes:
        name: as on the Hugging Face hub.
        text: its self-attention layers.
        cross: its cross-attention layers; without an MLP where they sit inside text layers.
        vocabulary: of the text.
        tower: the vision tower's layers.
        tower_tokens: that the tower works on, a frame.
        frame_tokens: visual tokens that cross-attention sees, a frame.
        projector_parameters: between tower and cross-attention.
        tower_states: states of the tower's width that it keeps for each of its tokens, frozen too.
        source: of all these numbers.
    """

    name: str
    text: Layers
    cross: Layers
    vocabulary: int
    tower: Layers
    tower_tokens: int
    frame_tokens: int
    projector_parameters: int
    tower_states: int
    source: str

    @property
    def parameters(self) -> int:
        """Weights of the model, embeddings in and out included; norms and biases left out."""
        embeddings = 2 * self.vocabulary * self.text.hidden
        layers = self.text.parameters + self.cross.parameters + self.tower.parameters
        return layers + embeddings + self.projector_parameters

    @property
    def cross_parameters(self) -> int:
        """Weights of the cross-attention layers and the projector."""
        return self.cross.parameters + self.projector_parameters


def model(name: str) -> Model:
    """A model by its name on the hub, by the last part of it, or by the path of a config.json.

    Raises:
        ValueError: unknown; lists the known.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        return _from_file(path)
    names = {each.name.lower(): each for each in known()}
    names |= {each.name.lower().rpartition("/")[2]: each for each in known()}
    wanted = name.lower().removesuffix("-instruct")
    found = {each.name: each for key, each in names.items() if f"{key}-".startswith(f"{wanted}-")}
    if len(found) == 1:  # mPLUG-Owl3-7B is mPLUG/mPLUG-Owl3-7B-240728
        return next(iter(found.values()))
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"; did you mean {names[near[0]].name}?" if near else ""
    listed = ", ".join(each.name for each in known())
    raise ValueError(
        f"model: got {name!r}; expected one of {listed}, or the path of a config.json{hint}"
    )


# --------------------------------------------------------------------------------------------
# Families, from the fields of their configs


def _mllama(config: Mapping[str, Any], name: str, source: str) -> Model:
    text, vision = config["text_config"], config["vision_config"]
    cross = len(text["cross_attention_layers"])
    layers = _decoder(text, count=text["num_hidden_layers"] - cross)
    tiles = vision["max_num_tiles"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    depth = vision["num_hidden_layers"] + vision["num_global_layers"]
    width = vision["hidden_size"]
    return Model(
        name=name,
        text=layers,
        # Whole layers of their own, over features as wide as the text.
        cross=replace(layers, count=cross, features_dim=layers.hidden),
        vocabulary=text["vocab_size"],
        tower=_encoder(
            depth, width, heads=vision["attention_heads"], mlp=vision["intermediate_size"]
        ),
        tower_tokens=tiles * tokens,
        frame_tokens=tiles * tokens,
        projector_parameters=vision["vision_output_dim"] * layers.hidden,
        tower_states=vision["num_hidden_layers"],
        source=source,
    )


def _mplugowl3(config: Mapping[str, Any], name: str, source: str) -> Model:
    vision = config["vision_config"]
    text = _decoder(config, count=config["num_hidden_layers"])
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    # Inside text layers: queries and the output projection are the text's own.
    cross = replace(text, count=len(config["hyper_layers"]), mlp=0, features_dim=text.hidden)
    return Model(
        name=name,
        text=text,
        cross=cross,
        vocabulary=config["vocab_size"],
        tower=_encoder(
            vision["num_hidden_layers"],
            vision["hidden_size"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
        ),
        tower_tokens=tokens,
        frame_tokens=tokens,
        projector_parameters=vision["hidden_size"] * text.hidden + text.hidden**2,
        tower_states=1,
        source=source,
    )


def _idefics(config: Mapping[str, Any], name: str, source: str) -> Model:
    vision = config["vision_config"]
    text = _decoder(config, count=config["num_hidden_layers"])
    count = -(-text.count // config["cross_layer_interval"])
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    latents = config.get("perceiver_config", {}).get("resampler_n_latents", 64)
    return Model(
        name=name,
        text=text,
        cross=replace(text, count=count, features_dim=vision["embed_dim"]),
        vocabulary=config["vocab_size"],
        tower=_encoder(
            vision["num_hidden_layers"],
            vision["embed_dim"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
        ),
        tower_tokens=patches,
        frame_tokens=latents if config.get("use_resampler") else patches,
        projector_parameters=0,
        tower_states=1,
        source=source,
    )


def _decoder(config: Mapping[str, Any], *, count: int) -> Layers:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Layers(
        count=count,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or hidden // heads,
        mlp=config["intermediate_size"],
    )


def _encoder(depth: int, width: int, *, heads: int, mlp: int) -> Layers:
    return Layers(depth, width, heads, heads, width // heads, mlp, mlp_matrices=2)


_FAMILIES: dict[str, Callable[[Mapping[str, Any], str, str], Model]] = {
    "mllama": _mllama,
    "mplugowl3": _mplugowl3,
    "idefics": _idefics,
}


def _from_file(path: Path) -> Model:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {path}, which cannot be read: {error}") from error
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"model: got {path} of model_type {family!r}; expected one of {list(_FAMILIES)}"
        )
    try:
        return _FAMILIES[family](config, str(path), str(path))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"model: got {path}, which lacks {error}; expected the whole config of the model, as "
            "save_pretrained writes it"
        ) from error


# --------------------------------------------------------------------------------------------
# Known models

_MLLAMA_VISION = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "intermediate_size": 5120,
    "vision_output_dim": 7680,
    "image_size": 560,
    "patch_size": 14,
    "max_num_tiles": 4,
}
_SIGLIP = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}
_IDEFICS_VISION = {
    "embed_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "image_size": 224,
    "patch_size": 14,
}


def _llama_vision(size: str, *, hidden: int, layers: int, heads: int, mlp: int) -> Model:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp,
        "vocab_size": 128_256,
        "cross_attention_layers": list(range(3, layers, 5)),
    }
    name = f"meta-llama/Llama-3.2-{size}-Vision"
    source = f"config.json of {name}; a frame is 4 tiles of 1,601 tokens"
    return _mllama({"text_config": text, "vision_config": _MLLAMA_VISION}, name, source)


def _mplug(name: str, *, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Model:
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": 151_851,
        "hyper_layers": range(4),
        "vision_config": _SIGLIP,
    }
    return _mplugowl3(config, f"mPLUG/{name}", f"config.json of mPLUG/{name}")


def _flamingo(
    name: str, *, hidden: int, layers: int, heads: int, vocabulary: int, every: int
) -> Model:
    text = Layers(layers, hidden, heads, heads, hidden // heads, 4 * hidden, mlp_matrices=2)
    return Model(
        name=f"openflamingo/{name}",
        text=text,
        cross=Layers(-(-layers // every), hidden, 8, 8, 64, 4 * hidden, 2, features_dim=1024),
        vocabulary=vocabulary,
        tower=_encoder(24, 1024, heads=16, mlp=4096),
        tower_tokens=257,
        frame_tokens=64,
        projector_parameters=0,
        tower_states=1,
        source="open_flamingo/src/helpers.py and the model card (ViT-L/14 at 224 pixels, 64 "
        "latents a frame); the perceiver is left out",
    )


@cache
def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _llama_vision("11B", hidden=4096, layers=40, heads=32, mlp=14_336),
        _llama_vision("90B", hidden=8192, layers=100, heads=64, mlp=28_672),
        _mplug("mPLUG-Owl3-1B-241014", hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864),
        _mplug("mPLUG-Owl3-2B-241014", hidden=1536, layers=28, heads=12, kv_heads=2, mlp=8960),
        _mplug("mPLUG-Owl3-7B-240728", hidden=3584, layers=28, heads=28, kv_heads=4, mlp=18_944),
        _flamingo(
            "OpenFlamingo-3B-vitl-mpt1b",
            hidden=2048,
            layers=24,
            heads=16,
            vocabulary=50_432,
            every=1,
        ),
        _flamingo(
            "OpenFlamingo-9B-vitl-mpt7b",
            hidden=4096,
            layers=32,
            heads=32,
            vocabulary=50_432,
            every=4,
        ),
        _idefics(
            {
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "intermediate_size": 11_008,
                "vocab_size": 32_000,
                "cross_layer_interval": 4,
                "use_resampler": True,
                "vision_config": _IDEFICS_VISION,
            },
            "HuggingFaceM4/idefics-9b",
            "config.json of HuggingFaceM4/idefics-9b; the perceiver is left out",
        ),
    )
