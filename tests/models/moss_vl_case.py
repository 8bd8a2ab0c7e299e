"""A tiny MOSS-VL, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.models import mllama_case
from tests.models.moss_vl_double import MossVLForConditionalGeneration
from tests.models.moss_vl_double_vision import MossVLConfig

IMAGE = 195  # the id of the image token
VOCABULARY = 200
PATCH = 3 * 4 * 4  # numbers of a patch: a row of pixel_values

Batch = dict[str, Any]
Media = tuple[int, int, int]  # frames, height and width in patches
Sample = Sequence[int | Media]
"""What a sample is made of, in order: so many text tokens; a medium, with a token for each of its
frames. A medium of -n frames has none in the text: nobody sees it."""


def tiny_model(
    *, image: int = IMAGE, vocab_size: int = VOCABULARY
) -> MossVLForConditionalGeneration:
    """Four text layers, two of them cross-attention; nothing at 0 or 1; always the same weights."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "cross_attention_layers": [1, 3],
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision["deepstack_visual_indexes"] = [0]
    settings = MossVLConfig(text_config=text, vision_config=vision, image_token_id=image)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MossVLForConditionalGeneration(settings)
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last.endswith("gate"):
                torch.nn.init.constant_(parameter, 0.5)
            elif last == "separator_token":
                torch.nn.init.normal_(parameter, std=0.5)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=2,
        lora_alpha=1,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
        init_lora_weights=False,
    )
    return get_peft_model(tiny_model(), config)


def make_batch(samples: Sequence[Sample], *, left: bool = False, seed: int = 0) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: what each is made of.
        left: shorter texts are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [[number for part in sample for number in _tokens(part)] for sample in samples]
    media = [[part for part in sample if not isinstance(part, int)] for sample in samples]
    length = max(map(len, texts))
    ids = torch.randint(1, IMAGE, (len(samples), length), generator=generator)
    valid = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(length - len(text), length) if left else slice(0, len(text))
        ids[row, columns] = torch.where(torch.tensor(text) == 1, IMAGE, ids[row, columns])
        valid[row, columns] = 1
    ids[valid == 0] = 0
    frames = [sum(abs(medium[0]) for medium in each) for each in media]
    seen = ((ids == IMAGE).cumsum(1) * valid)[..., None]
    grid = torch.tensor([(abs(t), h, w) for each in media for t, h, w in each])
    pixels = torch.randn(int(grid.prod(1).sum()), PATCH, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill((valid == 0) | (ids == IMAGE), -100),
        "pixel_values": pixels,
        "grid_thw": grid,
        "media_nums_per_sample": [len(each) for each in media],
        "cross_attention_mask": (torch.arange(max(frames)) >= seen)[:, None],
    }


def _tokens(part: int | Media) -> list[int]:
    """1 for a frame's token, 0 for others; a frame of a video has one for its time before it."""
    if isinstance(part, int):
        return [0] * part
    frames = part[0]
    return [0, 1] * frames if frames > 1 else [1] * frames


def ds_config(*, stage: int, sp_size: int, cross: dict[str, Any], self_attn: Any) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross=cross, self_attn=self_attn)
    config["ds_lvx"]["layers"][0] = {"match": "*visual*", "method": "none"}
    return config


TEXT_ONLY: Sample = [9, (-1, 4, 4)]  # the processor adds a black image


def hard_batch(seed: int = 0) -> Batch:
    """Text before the first medium, media of unequal size, an image between videos, a medium that
    nobody sees, a sample without media, texts of unequal length."""
    first: Sample = [3, (3, 4, 6), 2, (1, 2, 2), 4]
    second: Sample = [(1, 4, 2), 2, (2, 2, 4), 3, (-2, 4, 4)]
    return make_batch([first, second, TEXT_ONLY], seed=seed)


def one_image(seed: int = 1) -> Batch:
    return make_batch([[2, (1, 2, 4), 7]], seed=seed)


def left_padded(seed: int = 2) -> Batch:
    return make_batch([[1, (4, 2, 2), 6], [2, (1, 6, 4), 3]], left=True, seed=seed)
