"""Video-LLaMA for the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_lvx.models.adapters.dimensions import Adapted
from ds_lvx.models.dimensions import Model, among_text, decoder, encoder, text_config

MODEL_TYPE = "video_llama"
VISION: Mapping[str, int] = {
    "width": 1408,
    "layers": 39,
    "heads": 16,
    "mlp": 6144,
    "image_size": 224,
    "patch_size": 14,
}
QFORMER: Mapping[str, int] = {"width": 768, "layers": 12, "heads": 12, "mlp": 3072, "every": 2}
"""Of the published models."""


def dimensions(config: Mapping[str, Any], name: str, source: str) -> Model:
    """See `ds_lvx.models.contract.Family.dimensions`.

    A frame has no tokens in the text: the places of the one video are counted with the text. The
    queries of the video Q-Former, which every rank runs, are left out.
    """
    text = decoder(config["text_config"], count=config["text_config"]["num_hidden_layers"])
    vision, sizes = {**VISION, **config.get("vision", {})}, {**QFORMER, **config.get("qformer", {})}
    width, rows, layers = sizes["width"], config.get("queries", 32), config.get("video_layers", 2)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    crossing = -(-sizes["layers"] // sizes["every"])
    layer = 4 * width**2 + 2 * width * sizes["mlp"]
    of_rows = sizes["layers"] * layer + crossing * 2 * width**2 + layers * 2 * width**2
    of_patches = crossing * 2 * vision["width"] * width
    of_video = layers * (layer + 2 * width**2) + width * text.hidden
    weights = of_rows + of_patches + of_video
    return Adapted(
        name=name,
        **among_text(text),
        vocabulary=config["text_config"]["vocab_size"],
        tower=encoder(vision["layers"], vision["width"], heads=vision["heads"], mlp=vision["mlp"]),
        tower_tokens=patches,
        frame_tokens=0,
        projector_parameters=weights,
        tower_states=1,
        source=source,
        gathered=True,
        adapter_tokens=(of_rows * rows + of_patches * patches) // weights,
    )


def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return (
        _known("Video-LLaMA-2-7B-Finetuned", layers=32, hidden=4096, heads=32, mlp=11_008),
        _known("Video-LLaMA-2-13B-Finetuned", layers=40, hidden=5120, heads=40, mlp=13_824),
    )


def _known(name: str, *, layers: int, hidden: int, heads: int, mlp: int) -> Model:
    text = text_config(layers, hidden, heads, mlp, vocabulary=32_000)
    source = "video_llama/models/ of its repository (eva_vit.py, video_llama.py) and Llama 2's"
    return dimensions({"text_config": text}, f"DAMO-NLP-SG/{name}", f"{source} config.json")
