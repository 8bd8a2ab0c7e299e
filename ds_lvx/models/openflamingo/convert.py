"""A checkpoint of the package ``open_flamingo`` as a folder that transformers reads.

    python -m ds_lvx.models.openflamingo.convert --language FOLDER --vision FOLDER \\
        --checkpoint checkpoint.pt --output FOLDER

A checkpoint of the package holds what was trained: perceiver, gated layers and embeddings. Language
model and CLIP lie elsewhere. The folder has all three in fp32 with one config, the tokenizer with
its two tokens more, and the size of images.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ds_lvx.models.openflamingo.model import HEADS, LANGUAGES, Flamingo, FlamingoConfig
from ds_lvx.models.openflamingo.processor import END_TOKEN, IMAGE_TOKEN, Processor
from ds_lvx.models.parts import load_parts, read_weights

_EXPECTED = "the checkpoint.pt of an OpenFlamingo"
_GATED = re.compile(r"lang_encoder\.(?:.*\.)?(\d+)\.gated_cross_attn_layer\.")
_AGAIN = ("old_decoder_blocks.", "gated_cross_attn_layers.", "vision_encoder.")
"""Parts of names under which weights stand a second time, or as they were."""


def convert(language: str, vision: str, checkpoint: Path) -> tuple[Flamingo, Processor]:
    """Model and processor of a checkpoint of the package.

    Args:
        language: folder or hub name of the language model, with its tokenizer.
        vision: folder or hub name of CLIP, with its image processor.
        checkpoint: the file.

    Raises:
        ValueError: they do not belong together; says what is missing, or of another shape.
    """
    tokenizer = AutoTokenizer.from_pretrained(language)
    # In the package's order, which is that of the rows of embeddings.
    added = [
        AddedToken(token, normalized=False, special=True) for token in (END_TOKEN, IMAGE_TOKEN)
    ]
    tokenizer.add_tokens(added, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    text = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    if text.config.model_type not in LANGUAGES:
        raise ValueError(
            f"--language: got {language}, a {text.config.model_type!r}; expected one of "
            f"{', '.join(LANGUAGES)}, as transformers has them"
        )
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tower = CLIPVisionModel.from_pretrained(vision, dtype=torch.float32)
    trained = _trained(checkpoint)
    end, image = (tokenizer.get_vocab()[token] for token in (END_TOKEN, IMAGE_TOKEN))
    sizes: Any = _sizes(trained, checkpoint)
    config = FlamingoConfig(
        text.config, tower.config, media_token_id=image, eoc_token_id=end, **sizes
    )
    model = Flamingo(config)
    layers = re.compile(rf"^({re.escape(model.lang_encoder.layers_at)}\.\d+\.)")
    found = {
        "lang_encoder." + layers.sub(r"\1decoder_layer.", name): value
        for name, value in text.state_dict().items()
    }
    found |= {f"vision_encoder.{name}": value for name, value in tower.state_dict().items()}
    complaint = (
        f"--checkpoint: got {checkpoint}, which does not fit language model and CLIP: {{}}; "
        "expected the ones that it was trained on"
    )
    load_parts(model, {**found, **trained}, complaint=complaint)
    model.load_state_dict(trained, strict=False)  # of what is tied, too, this is what counts
    return model, Processor(tokenizer, CLIPImageProcessorPil.from_pretrained(vision))


def _trained(checkpoint: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, by the names of the model."""
    found = read_weights("--checkpoint", checkpoint, inside="model_state_dict", expected=_EXPECTED)
    named = {_named(name): value.float() for name, value in found.items()}
    return {
        name: value for name, value in named.items() if not any(each in name for each in _AGAIN)
    }


def _named(name: str) -> str:
    # The head of a GPT-NeoX had another name in transformers 4.
    return name.removeprefix("module.").replace("lang_encoder.embed_out.", "lang_encoder.lm_head.")


def _sizes(trained: Mapping[str, Tensor], checkpoint: Path) -> dict[str, int]:
    """Fields of the config that the shapes of a checkpoint tell."""
    gated = sorted({int(match[1]) for match in map(_GATED.match, trained) if match})
    latents = trained.get("perceiver.latents")
    if not gated or latents is None:
        raise ValueError(
            f"--checkpoint: got {checkpoint}, which has no perceiver or no gated layers; expected "
            f"{_EXPECTED}"
        )
    depth = {name.split(".")[2] for name in trained if name.startswith("perceiver.layers.")}
    return {
        "cross_attn_every_n_layers": gated[0] + 1,
        "latents": len(latents),
        "depth": len(depth),
        "dim_head": len(trained["perceiver.layers.0.0.to_q.weight"]) // HEADS,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert by options."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_lvx.models.openflamingo.convert",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--language", required=True, help="folder or hub name, with its tokenizer")
    parser.add_argument("--vision", required=True, help="folder or hub name of CLIP")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the package's file")
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output: got {options.output}, which is there; expected a new folder")
    try:
        model, processor = convert(options.language, options.vision, options.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"saved {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
