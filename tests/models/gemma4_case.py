"""A tiny Gemma 4, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from ds_lvx.models import FAMILIES
from tests.models.internvl_case import padded, with_lora

VOCABULARY = 64
PAD, BOI, EOI, IMAGE, VIDEO, SOUND = 0, 59, 60, 61, 62, 63
SPECIAL = (BOI, EOI, IMAGE, VIDEO, SOUND)
PATCH, SIDE = 2, 2  # pixels of a patch, patches of a token
MOST = 32  # patches of an image, with padding
WINDOW = 6
FULL, SLIDING = "full_attention", "sliding_attention"

Batch = dict[str, Any]
Grid = tuple[int, int]


def tiny_model(
    *, standardize: bool = True, audio: bool = False, **text: Any
) -> Gemma4ForConditionalGeneration:
    """Five layers of text as the smaller models have them: with embeddings of their own, and the
    last two with keys and values of those before; nothing at 0; always the same weights."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 6,
        "intermediate_size": 40,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 12,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 1_000_000.0,
            },
        },
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
        **text,
    }
    settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": PATCH,
        "pooling_kernel_size": SIDE,
        "position_embedding_size": 40,
        "standardize": standardize,
    }
    sounds = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "subsampling_conv_channels": [4, 4],
        "output_proj_dims": 16,
    }
    config = Gemma4Config(
        text_config=settings,
        vision_config=vision,
        audio_config=sounds if audio else None,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=SOUND,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Gemma4ForConditionalGeneration(config)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("std_bias", "std_scale", "layer_scalar")):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            elif isinstance(tensor, torch.nn.Parameter):
                torch.nn.init.normal_(tensor, std=0.1)
    return model


def larger_model(**text: Any) -> Gemma4ForConditionalGeneration:
    """As the larger models: images see themselves, values are keys where all is seen, which has
    fewer heads of keys; no embeddings of layers, nothing shared."""
    return tiny_model(
        **{
            "use_bidirectional_attention": "vision",
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, SLIDING, FULL],
            **text,
        }
    )


def moe_model() -> Gemma4ForConditionalGeneration:
    """The larger model with experts."""
    return larger_model(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16
    )


def with_audio_tower() -> Gemma4ForConditionalGeneration:
    return tiny_model(audio=True)


def lora_model() -> Any:
    return with_lora(tiny_model(), FAMILIES.named("gemma4").lora_targets)


def frozen_tower() -> Any:
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batch(
    samples: Sequence[Sequence[int | Grid | list[Grid]]], *, left: bool = False, seed: int = 0
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: of each what stands in it: so many tokens of text, the height and width of an image
            in tokens, or those of the frames of a video.
        left: shorter ones are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    grids: dict[int, list[Grid]] = {IMAGE: [], VIDEO: []}
    videos: list[int] = []
    for sample in samples:
        parts = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, BOI, (part,), generator=generator))
                continue
            token = VIDEO if isinstance(part, list) else IMAGE
            each = part if isinstance(part, list) else [part]
            for height, width in each:
                visual = torch.full((height * width,), token)
                parts += [torch.tensor([BOI]), visual, torch.tensor([EOI])]
            grids[token] += each
            if token == VIDEO:
                videos.append(len(each))
        rows.append(torch.cat(parts))
    batch = padded(rows, left=left)
    ids = batch["input_ids"]
    batch["labels"] = batch["labels"].masked_fill(ids >= BOI, -100)
    batch["mm_token_type_ids"] = (ids == IMAGE) + 2 * (ids == VIDEO)
    for token, name in ((IMAGE, "image"), (VIDEO, "video")):
        if grids[token]:
            pixels, places = patches(grids[token], generator)
            batch["pixel_values" if token == IMAGE else "pixel_values_videos"] = pixels
            batch[f"{name}_position_ids"] = places
    if videos:
        batch["num_frames_per_video"] = torch.tensor(videos)
    return batch


def patches(grids: Sequence[Grid], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels and places of images of so many tokens by side, padded."""
    pixels = torch.zeros(len(grids), MOST, 3 * PATCH**2)
    places = torch.full((len(grids), MOST, 2), -1)
    for n, (height, width) in enumerate(grids):
        lines = [(x, y) for y in range(SIDE * height) for x in range(SIDE * width)]
        places[n, : len(lines)] = torch.tensor(lines)
        pixels[n, : len(lines)] = torch.rand(len(lines), 3 * PATCH**2, generator=generator)
    return pixels, places


def hard_batch(seed: int = 0) -> Batch:
    """Images of several shapes and a video among text, a sample of text alone, unequal lengths;
    some padding is within an image, and windows end in the midst of some."""
    first = [3, (1, 3), 2, [(2, 2), (2, 2)], 4, (4, 2), (1, 1), 7]
    batch = make_batch([first, [9], [[(2, 1)], (2, 3), 11]], seed=seed)
    batch["attention_mask"][0, 5] = 0
    return batch


def left_padded(seed: int = 1) -> Batch:
    return make_batch([[2, (3, 2), 5], [4, [(2, 1)] * 4, 9], [6]], left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than images; no mask."""
    batch = make_batch([[2, (2, 3), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([[[(2, 2)] * 7, 8]], seed=seed)


def without_types(seed: int = 6) -> Batch:
    """Tokens of an image see those before them alone; some tokens are of sounds that are not
    there."""
    batch = hard_batch(seed)
    del batch["mm_token_type_ids"]
    batch["input_ids"][1, 2:4] = SOUND
    return batch


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, without_types, text_only)
