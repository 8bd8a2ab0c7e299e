"""A mask that a collator left as long as the prompt becomes that of the whole text."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ds_lvx.models.mllama.tiny import tiny_processor
from ds_lvx.models.mllama.whole_masks import WholeMasks


def test_a_mask_is_that_of_the_processor() -> None:
    processor = tiny_processor()
    images = [[Image.new("RGB", (28, 28))] * count for count in (1, 3)]
    texts = ["<|image|>One?", "<|image|>Two.<|image|><|image|>And which?"]
    whole = processor(images=images, text=texts, padding=True, return_tensors="pt")
    wanted, prompt = whole["cross_attention_mask"], 6

    def collator(length: int) -> Any:
        return lambda _: {**whole, "cross_attention_mask": wanted[:, :length]}

    for length in (prompt, wanted.shape[1]):
        found = WholeMasks(collator(length), processor)([])["cross_attention_mask"]
        torch.testing.assert_close(found, wanted)
    assert len(wanted.flatten(2).unique(dim=1)[0]) > 1, "every token sees the same"
