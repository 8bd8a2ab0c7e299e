"""A checkpoint of the Video-LLaMA repository as a folder that transformers reads.

    python -m ds_lvx.models.video_llama.convert --language FOLDER --vision eva_vit_g.pth \\
        --qformer blip2_pretrained_flant5xxl.pth --checkpoint VL_LLaMA_2_7B_Finetuned.pth \\
        --template llama_v2 --output FOLDER

A checkpoint of the repository holds what was trained: the video Q-Former, the frames' numbers and
the projection. Tower, Q-Former and language model lie elsewhere, in the files that its code loads.
The folder has all of them in fp32 with one config, and the tokenizer with the token of a video's
places.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_lvx.models.parts import load_parts, read_weights
from ds_lvx.models.video_llama.dimensions import VISION
from ds_lvx.models.video_llama.model import VideoLlamaConfig, VideoLlamaModel
from ds_lvx.models.video_llama.processor import IMAGE_TOKEN, TEMPLATES, Processor

_HEAD, _TOWER_HEAD = 64, 88
"""The size of a head, in the Q-Formers and in the tower."""
_AUDIO = "audio_"
_OF_TEXT = re.compile(
    r".*(\.layer\.\d+\.(intermediate|output)\..*|\.(word|position)_embeddings\..*|position_ids)"
)
"""Of a BERT's weights what queries do not need."""


@dataclass(frozen=True)
class Parts:
    """Where a model lies.

    Attributes:
        language: folder or hub name of the language model, with its tokenizer.
        vision: the file of EVA's ViT-g.
        qformer: the file of BLIP-2's first stages, with ``ln_vision``.
        checkpoint: the repository's file.
    """

    language: str
    vision: Path
    qformer: Path
    checkpoint: Path


def convert(parts: Parts, *, template: str) -> tuple[VideoLlamaModel, Processor]:
    """Model and processor of a checkpoint of the repository.

    Args:
        parts: its files.
        template: how a conversation is written, of `processor.TEMPLATES`.

    Raises:
        ValueError: they do not belong together; says what is missing, or of another shape.
    """
    kind = AutoConfig.from_pretrained(parts.language).model_type
    if kind != "llama":
        raise ValueError(
            f"--language: got {parts.language}, a {kind!r}; expected a 'llama', a Llama or a "
            "Vicuna, as transformers has them"
        )
    tokenizer = AutoTokenizer.from_pretrained(parts.language)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = TEMPLATES[template]
    text = AutoModelForCausalLM.from_pretrained(parts.language, dtype=torch.float32)
    found = {f"llama_model.{name}": value for name, value in text.state_dict().items()}
    found |= _tower(parts.vision) | _frames(parts.qformer) | _trained(parts.checkpoint)
    try:
        sizes: Any = _sizes(found)
    except KeyError as error:
        raise ValueError(f"got files without {error}; expected those of a Video-LLaMA") from error
    token = tokenizer.get_vocab()[IMAGE_TOKEN]
    model = VideoLlamaModel(VideoLlamaConfig(text.config, image_token_id=token, **sizes))
    complaint = (
        f"--checkpoint: got {parts.checkpoint}, which does not fit the other files: {{}}; expected "
        "those that it was trained on"
    )
    load_parts(model, found, complaint=complaint)
    return model, Processor.fitting(tokenizer, model.config)


def _tower(file: Path) -> dict[str, Tensor]:
    """The tower: as many of its layers as the repository takes, whatever lies behind them."""
    expected = "eva_vit_g.pth of BLIP-2"
    found = read_weights("--vision", file, inside="model", expected=expected)
    if "blocks.0.attn.qkv.weight" not in found or "pos_embed" not in found:
        raise ValueError(f"--vision: got {file}, which is no EVA ViT; expected {expected}")
    first = ("cls_token", "pos_embed", "patch_embed.")
    kept = {
        name: value
        for name, value in found.items()
        if name.startswith(first)
        or (name.startswith("blocks.") and int(name.split(".")[1]) < VISION["layers"])
    }
    return {f"visual_encoder.{name}": value.float() for name, value in kept.items()}


def _frames(file: Path) -> dict[str, Tensor]:
    """BLIP-2's Q-Former and the norm before it."""
    expected = "blip2_pretrained_flant5xxl.pth"
    found = read_weights("--qformer", file, inside="model", expected=expected)
    kept = {
        name: value.float()
        for name, value in found.items()
        if name == "query_tokens" or name.startswith(("ln_vision.", "Qformer.bert."))
    }
    if "query_tokens" not in kept or "ln_vision.weight" not in kept:
        raise ValueError(
            f"--qformer: got {file}, which lacks query_tokens or ln_vision; expected {expected}"
        )
    return _of_queries(kept)


def _trained(file: Path) -> dict[str, Tensor]:
    """What the repository trained, but for sound."""
    expected = "the file of a vision-language branch (VL_LLaMA_2_7B_Finetuned.pth)"
    found = read_weights("--checkpoint", file, inside="model", expected=expected)
    named = {name.removeprefix("module."): value.float() for name, value in found.items()}
    kept = {name: value for name, value in named.items() if not name.startswith(_AUDIO)}
    if "video_query_tokens" not in kept:
        heard = ", but an audio branch" if len(kept) < len(named) else ""
        raise ValueError(
            f"--checkpoint: got {file}, which has no video Q-Former{heard}; expected {expected}: "
            "sound is not served"
        )
    return _of_queries(kept)


def _of_queries(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if not _OF_TEXT.fullmatch(name)}


def _sizes(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of the config that the shapes of the weights tell."""
    patches = found["visual_encoder.patch_embed.proj.weight"]
    width, patch = len(patches), patches.shape[-1]
    side = int((found["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5) * patch
    vision = {
        "width": width,
        "layers": _layers(found, "visual_encoder.blocks."),
        "heads": max(width // _TOWER_HEAD, 1),
        "mlp": len(found["visual_encoder.blocks.0.mlp.fc1.weight"]),
        "image_size": side,
        "patch_size": patch,
    }
    queries, of_video = found["query_tokens"].shape, found["video_query_tokens"].shape
    layers = "Qformer.bert.encoder.layer."
    crossing = sum(
        name.startswith(layers) and name.endswith("crossattention.self.query.weight")
        for name in found
    )
    qformer = {
        "width": queries[2],
        "layers": _layers(found, layers),
        "heads": max(queries[2] // _HEAD, 1),
        "mlp": len(found[f"{layers}0.intermediate_query.dense.weight"]),
        "every": -(-_layers(found, layers) // max(crossing, 1)),
    }
    return {
        "vision": vision,
        "qformer": qformer,
        "queries": queries[1],
        "video_queries": of_video[1],
        "video_layers": _layers(found, f"video_{layers}"),
        "frames": len(found["video_frame_position_embedding.weight"]),
    }


def _layers(found: Mapping[str, Tensor], before: str) -> int:
    inside = (name.removeprefix(before) for name in found if name.startswith(before))
    return len({name.partition(".")[0] for name in inside})


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert by options."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_lvx.models.video_llama.convert",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--language", required=True, help="folder or hub name, with its tokenizer")
    parser.add_argument("--vision", required=True, type=Path, help="eva_vit_g.pth")
    parser.add_argument(
        "--qformer", required=True, type=Path, help="blip2_pretrained_flant5xxl.pth"
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="the repository's file")
    parser.add_argument(
        "--template", required=True, choices=list(TEMPLATES), help="of the conversations"
    )
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output: got {options.output}, which is there; expected a new folder")
    parts = Parts(options.language, options.vision, options.qformer, options.checkpoint)
    try:
        model, processor = convert(parts, template=options.template)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"saved {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
