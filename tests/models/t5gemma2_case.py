"""A tiny T5Gemma2, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from ds_lvx.models import FAMILIES
from tests.models import mllama_case

VOCABULARY = 64
PAD, BOS, EOI, IMAGE = 0, 2, 62, 63
SIZE = 16  # pixels of an image, by side
TOKENS = 4  # that it has

Batch = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


def tiny_model(
    *, eoi: int = EOI, image: int = IMAGE, **settings: Any
) -> T5Gemma2ForConditionalGeneration:
    """Three layers in encoder and decoder; nothing at 0; always the same weights."""
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "final_logit_softcapping": 20.0,
        "layer_types": [SLIDING, FULL, SLIDING],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = T5Gemma2Config(
        encoder={
            "text_config": {**text, "sliding_window": 5, **settings},
            "vision_config": vision,
            "mm_tokens_per_image": TOKENS,
            "eoi_token_index": eoi,
        },
        decoder={**text, "sliding_window": 4, **settings},
        image_token_index=image,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = T5Gemma2ForConditionalGeneration(config)
        for parameter in model.parameters():
            # Some start at 0, and with them every gradient of the images.
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of encoder's and decoder's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("t5gemma2").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def make_batch(
    texts: Sequence[str], answers: Sequence[int], *, left: bool = False, seed: int = 0
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        texts: the encoder's, a letter a token: ``i`` for an image, ``e`` for the token behind one.
        answers: labels of each sample; shorter ones are padded with -100.
        left: shorter texts are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [text.replace("i", "i" * TOKENS) for text in texts]
    length = max(map(len, texts))
    rows = [text.rjust(length) if left else text.ljust(length) for text in texts]
    ids = torch.randint(3, EOI, (len(rows), length), generator=generator)
    for letter, token in (("i", IMAGE), ("e", EOI), (" ", PAD)):
        ids[torch.tensor([[each == letter for each in row] for row in rows])] = token
    labels = torch.randint(3, EOI, (len(rows), max(answers)), generator=generator)
    beyond = torch.arange(max(answers)) >= torch.tensor(answers)[:, None]
    count = sum(text.count("i") for text in texts) // TOKENS
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[int(each != " ") for each in row] for row in rows]),
        "pixel_values": torch.randn(count, 3, SIZE, SIZE, generator=generator) if count else None,
        "labels": labels.masked_fill(beyond, -100),
    }


def hard_batch(seed: int = 0) -> Batch:
    """Images at the start, side by side and scattered, a sample of text alone, unequal texts and
    answers."""
    return make_batch(["ie.i...iie.....", "..ie.....", "......."], [9, 4, 6], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    """The decoder's text is padded on the left as well, with a mask of its own."""
    batch = make_batch(["..ie...ie..", "ie...", "..i"], [7, 7, 7], left=True, seed=seed)
    ids = torch.randint(3, EOI, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    batch["labels"][1, :2] = -100
    return {**batch, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def one_image(seed: int = 2) -> Batch:
    """Without a mask; positions do not begin at 0."""
    batch = make_batch(["..i.."], [8], seed=seed)
    del batch["attention_mask"]
    length = batch["input_ids"].shape[1]
    return {
        **batch,
        "position_ids": torch.arange(3, 3 + length)[None],
        "decoder_position_ids": torch.arange(5, 13)[None],
    }


def image_alone(seed: int = 3) -> Batch:
    """Some rank has nothing of the encoder's rows, and some nothing of the decoder's."""
    return make_batch(["i"], [1], seed=seed)


def text_only(seed: int = 4) -> Batch:
    return make_batch(["............", "........."], [5, 7], seed=seed)


def ds_config(*, stage: int, sp_size: int, cross: dict[str, Any], self_attn: Any) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names; the rules of the decoder's layers, and the
    method or the rule of the encoder's."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross=cross, self_attn=self_attn)
    rules = config["ds_lvx"]["layers"]
    patterns = FAMILIES.named("t5gemma2").patterns
    for rule, kind in zip(rules, ("local", "cross", "self"), strict=True):
        rule["match"] = patterns[kind]
    return config
