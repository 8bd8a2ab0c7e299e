"""A tiny Video-LLaMA, and batches for it as its repository's collater makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from ds_lvx.models import FAMILIES
from tests.models import mllama_case
from tests.models.video_llama_double import VideoLLAMA

VOCABULARY = 96
VIDEO = VOCABULARY
"""The token of a video's places, which the language model's embedding has no row for."""
PLACES, SIDE = 3, 28

Batch = dict[str, Any]


class Model(VideoLLAMA):
    """Takes a batch as a shard comes, and in one process videos of unequal length one by one."""

    def forward(self, input_ids: Any = None, images: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        counts = kwargs.pop("images_per_sample", None)
        kwargs.pop("use_cache", None)
        if counts is None:
            counts = [images.shape[2]] * len(images)
            images = images.transpose(1, 2).flatten(0, 1)
        videos = images.split([int(count) for count in counts])
        rows = [self.encode(video.transpose(0, 1)[None]) for video in videos if len(video) > 0]
        none = torch.zeros(0, self.llama_proj.out_features)
        return self.language(input_ids, torch.cat(rows) if rows else none, **kwargs)


def tiny_model(*, kv_heads: int = 2) -> Model:
    """Two layers of each sort; nothing at 0 or 1; always the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Model(config, image_token=VIDEO)
        for name, parameter in model.named_parameters():
            scales = parameter.ndim == 1 and "norm" in name.lower() and "weight" in name
            torch.nn.init.normal_(parameter, float(scales), 0.2 if scales else 0.15)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("video_llama").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def make_batch(texts: Sequence[str], frames: Sequence[int], *, seed: int = 0) -> Batch:
    """A batch with videos of unequal length.

    Args:
        texts: a letter a token: ``v`` for a video, of `PLACES` tokens, ``.`` for others, a blank
            for padding, which is added where a text is shorter than another.
        frames: of each sample, 0 without a video.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [text.replace("v", "v" * PLACES) for text in texts]
    length = max(map(len, rows))
    rows = [row.ljust(length) for row in rows]
    ids = torch.randint(3, VOCABULARY, (len(rows), length), generator=generator)
    for letter, token in (("v", VIDEO), (" ", 1)):
        ids[torch.tensor([[each == letter for each in row] for row in rows])] = token
    valid = torch.tensor([[int(each != " ") for each in row] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill((valid == 0) | (ids == VIDEO), -100),
        "images": torch.randn(sum(frames), 3, SIDE, SIDE, generator=generator),
        "images_per_sample": torch.tensor(frames),
    }


def ds_config(*, stage: int, sp_size: int, self_attn: str) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross={}, self_attn=self_attn)
    patterns = FAMILIES.named("video_llama").patterns
    config["ds_lvx"]["layers"] = [
        {"match": patterns["local"], "method": "none"},
        {"match": patterns["self"], "method": self_attn},
    ]
    return config


def hard_batch(seed: int = 0) -> Batch:
    """Videos of 5, 1 and 2 frames, one before its text, and a text without one."""
    return make_batch(["v.....", "...v.......", ".......", "..v...."], [5, 1, 0, 2], seed=seed)


def collated(seed: int = 1) -> Batch:
    """As the repository's collater makes it: videos of equal length, ``[B, 3, frames, ...]``."""
    batch = make_batch(["..v.....", "...v...."], [3, 3], seed=seed)
    del batch["images_per_sample"]
    return {**batch, "images": batch["images"].unflatten(0, (2, 3)).transpose(1, 2)}


def left_padded(seed: int = 4) -> Batch:
    """A video that ends its text, so that no other token sees it, padded on the left."""
    return make_batch(["     .....v", "..v........", "    ......."], [3, 2, 0], seed=seed)


def one_frame(seed: int = 2) -> Batch:
    return make_batch([".v......"], [1], seed=seed)


def text_only(seed: int = 3) -> Batch:
    return make_batch([".........", "....."], [0, 0], seed=seed)
