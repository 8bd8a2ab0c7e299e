"""A tiny Qwen-VL, and batches for it as its tokenizer makes them, with pixels beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ds_lvx.models import FAMILIES
from tests.models import mllama_case
from tests.models.qwen_vl_double import QWenConfig, QWenLMHeadModel, opened

START, PLACES, SIDE = 120, 4, 28

Batch = dict[str, Any]


def tiny_model(**settings: Any) -> QWenLMHeadModel:
    """Two layers of each sort; nothing at 0 or 1; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = QWenLMHeadModel(QWenConfig(**settings))
        for name, parameter in model.named_parameters():
            scales = "ln_" in name and name.endswith("weight")
            torch.nn.init.normal_(parameter, float(scales), 0.2)
    return model.train()


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    torch.manual_seed(3)
    targets = FAMILIES.named("qwen").lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def make_batch(texts: Sequence[str], *, seed: int = 0) -> Batch:
    """A batch as the tokenizer makes it, with labels and pixels.

    Args:
        texts: a letter a token: ``i`` for an image, of `PLACES` places between two tokens, ``.``
            for others, a blank for padding, which is added where a text is shorter than another.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [text.replace("i", "<" + "i" * PLACES + ">") for text in texts]
    length = max(map(len, rows))
    letters = [row.ljust(length) for row in rows]
    ids = torch.randint(1, START, (len(rows), length), generator=generator)
    paths = []
    for row, text in enumerate(letters):
        for place, letter in enumerate(text):
            if letter == "<":
                paths.append(f"{len(paths)}{chr(ord('a') + seed)}")
                name = list(paths[-1].encode()) + [START + 2] * (PLACES - 2)
                ids[row, place : place + PLACES + 2] = torch.tensor([START, *name, START + 1])
            elif letter == " ":
                ids[row, place] = 0
    valid = torch.tensor([[int(each != " ") for each in text] for text in letters])
    plain = torch.tensor([[each == "." for each in text] for text in letters])
    first = valid.cumsum(dim=1) == 1  # before it is only padding, or nothing
    pixels = [opened(path, SIDE) for path in paths]
    return {
        "input_ids": ids,
        "attention_mask": valid,
        "labels": ids.masked_fill(~plain | first, -100),
        **({"pixel_values": torch.stack(pixels)} if pixels else {}),
    }


def for_one_process(batch: Batch) -> Batch:
    """The model's own forward opens the files."""
    return {key: value for key, value in batch.items() if key != "pixel_values"}


def ds_config(*, stage: int, sp_size: int, self_attn: str) -> dict[str, Any]:
    """`mllama_case.ds_config` for this model's names."""
    config = mllama_case.ds_config(stage=stage, sp_size=sp_size, cross={}, self_attn=self_attn)
    patterns = FAMILIES.named("qwen").patterns
    config["ds_lvx"]["layers"] = [
        {"match": patterns["local"], "method": "none"},
        {"match": patterns["self"], "method": self_attn},
    ]
    return config


def hard_batch(seed: int = 0) -> Batch:
    """Text before the first image, adjacent images, one that begins a text, a sample of text alone,
    padding on the right."""
    return make_batch(["..ii....i...", "i.........", "......."], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    return make_batch(["..i......", "    i....", "         ....."], seed=seed)


def one_image(seed: int = 2) -> Batch:
    """No mask, and an image that a rank's part of the text ends within."""
    batch = make_batch(["....i.."], seed=seed)
    del batch["attention_mask"]
    return batch


def text_only(seed: int = 3) -> Batch:
    return make_batch([".........", "....."], seed=seed)
