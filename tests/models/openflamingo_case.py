"""A tiny OpenFlamingo, and batches for it as the package's training makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from ds_lvx.models import FAMILIES
from tests.models import mllama_case
from tests.models.openflamingo_double import Flamingo, FlamingoLMMixin, VisionTransformer

VOCABULARY = 96
IMAGE = 95
SIZE = 28

Batch = dict[str, Any]


class LlamaFlamingo(FlamingoLMMixin, LlamaForCausalLM):
    decoder_layers_attr_name = "model.layers"


class NeoXFlamingo(FlamingoLMMixin, GPTNeoXForCausalLM):
    decoder_layers_attr_name = "gpt_neox.layers"


class MptFlamingo(FlamingoLMMixin, MptForCausalLM):
    decoder_layers_attr_name = "transformer.blocks"


class Model(Flamingo):
    """Takes the text by the name that it has everywhere else."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        kwargs.setdefault("vision_x", torch.zeros(len(input_ids), 1, 1, 3, SIZE, SIZE))
        return super().forward(lang_x=input_ids, **kwargs)


def tiny_model(language: str = "llama", *, latest: bool = True, **settings: Any) -> Model:
    """Four text layers, two gated ones before them; nothing at 0 or 1; always the same weights."""
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
        "max_position_embeddings": 64,
        **settings,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lang_encoder: Any
        if language == "llama":
            lang_encoder = LlamaFlamingo(LlamaConfig(**text, num_key_value_heads=2))
        elif language == "mpt":
            lang_encoder = MptFlamingo(_mpt_config(**text))
        else:
            lang_encoder = NeoXFlamingo(GPTNeoXConfig(**text))
        model = Model(
            VisionTransformer(SIZE, 14, 16),
            lang_encoder,
            IMAGE,
            width=16,
            latents=3,
            every=2,
            dim_head=8,
            heads=3,
            only_attend_immediate_media=latest,
        )
        for name, parameter in model.named_parameters():
            # Closed gates would make every gradient of K and V zero, and a test of them nothing.
            if name.endswith("_gate"):
                torch.nn.init.constant_(parameter, 0.5)
            elif "norm" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.vision_encoder.requires_grad_(False)
    return model


def _mpt_config(**text: Any) -> MptConfig:
    return MptConfig(
        vocab_size=text["vocab_size"],
        d_model=text["hidden_size"],
        n_layers=text["num_hidden_layers"],
        n_heads=text["num_attention_heads"],
        max_seq_len=text["max_position_embeddings"],
        initializer_range=text["initializer_range"],
        attn_config={"clip_qkv": text.get("clip_qkv"), "softmax_scale": text.get("softmax_scale")},
    )


def all_before(language: str = "llama") -> Model:
    return tiny_model(language, latest=False)


def lora_model(language: str = "llama") -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("openflamingo").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(language), config)


def make_batch(texts: Sequence[str], *, left: bool = False, seed: int = 0) -> Batch:
    """A batch as the package's training makes it.

    Args:
        texts: a letter a token: ``i`` for an image, ``.`` for others.
        left: shorter texts are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(map(len, texts))
    rows = [text.rjust(length) if left else text.ljust(length) for text in texts]
    ids = torch.randint(1, IMAGE, (len(rows), length), generator=generator)
    for letter, token in (("i", IMAGE), (" ", 0)):
        ids[torch.tensor([[each == letter for each in row] for row in rows])] = token
    valid = torch.tensor([[int(each != " ") for each in row] for row in rows])
    images = max(1, *(text.count("i") for text in texts))
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill((valid == 0) | (ids == IMAGE), -100),
        "vision_x": torch.randn(len(rows), images, 1, 3, SIZE, SIZE, generator=generator),
    }


def ds_config(*, stage: int, sp_size: int, cross: dict[str, Any], self_attn: Any) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross=cross, self_attn=self_attn)
    patterns = FAMILIES.named("openflamingo").patterns
    for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
        rule["match"] = patterns[kind]
    return config


def hard_batch(seed: int = 0) -> Batch:
    """Text before the first image, adjacent images of which one is seen by its own token alone, a
    sample of fewer images, one of text alone, texts of unequal length."""
    return make_batch(["...ii....i...", ".i.......", "......."], seed=seed)


def one_image(seed: int = 1) -> Batch:
    return make_batch(["..i......"], seed=seed)


def left_padded(seed: int = 2) -> Batch:
    return make_batch(["..i...i.i..", "i.....", "...i..i"], left=True, seed=seed)


def text_only(seed: int = 4) -> Batch:
    """One blank image that nobody sees."""
    batch = make_batch(["..........", "......."], seed=seed)
    return {**batch, "vision_x": torch.zeros_like(batch["vision_x"])}
