"""A tiny Qwen2.5-VL, and batches for it as its processor makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ds_lvx.models import FAMILIES

VOCABULARY = 64
PAD, START, IMAGE, VIDEO = 0, 61, 62, 63
PATCH, MERGE = 4, 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": START,
    "tie_word_embeddings": False,
}
WIDTH = 3 * 2 * PATCH**2  # numbers of a patch

Batch = dict[str, Any]
Medium = tuple[int, int, int]


def tiny_model(**text: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Three layers of text, two of vision (one by windows); always the same weights."""
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 2 * MERGE * PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    }
    return weighted(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(text_config={**TEXT, **text}, vision_config=vision, **IDS),
    )


def weighted(kind: Any, config: Any) -> Any:
    """A model of a class, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def lora_model() -> Any:
    """`tiny_model` inside peft's wrapper: adapters of the text's attention train."""
    return with_adapters(tiny_model())


def with_adapters(model: Any) -> Any:
    torch.manual_seed(3)
    targets = FAMILIES.named(model.config.model_type).lora_targets
    config = LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def frozen_tower() -> Any:
    return without_tower(tiny_model())


def without_tower(model: Any) -> Any:
    model.model.visual.requires_grad_(False)
    return model


def make_batch(
    samples: Sequence[Sequence[int | Medium]], *, left: bool = False, seed: int = 0
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        samples: of each what stands in it: so many tokens of text, or frames, height and width of
            a medium in merged patches; one of one frame is an image.
        left: shorter ones are padded on the left, not on the right.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for sample in samples:
        parts = []
        for part in sample:
            if isinstance(part, int):
                parts.append(torch.randint(3, START, (part,), generator=generator))
                continue
            t, h, w = part
            token = IMAGE if t == 1 else VIDEO
            parts += [torch.tensor([START]), torch.full((t * h * w,), token)]
            grids[token].append([t, h * MERGE, w * MERGE])
        rows.append(torch.cat(parts))
    batch = collate(rows, [grids[IMAGE], grids[VIDEO]], generator, left=left)
    if grids[VIDEO]:
        batch["second_per_grid_ts"] = [0.5 + n for n in range(len(grids[VIDEO]))]
    return batch


def types_by(ids: Tensor, config: Any) -> Tensor:
    """As transformers' processor numbers them: 1 for an image's tokens, 2 for a video's."""
    return (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()


def token_types(ids: Tensor) -> Tensor:
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


def collate(
    rows: Sequence[Tensor],
    grids: Sequence[list[list[int]]],
    generator: torch.Generator,
    *,
    left: bool,
    special: int = START,
    types: Callable[[Tensor], Tensor] = token_types,
) -> Batch:
    """Samples as a batch.

    Args:
        rows: tokens of each.
        grids: those of images, and of videos, whose pixels are random.
        generator: of the pixels.
        left: shorter ones are padded on the left, not on the right.
        special: the lowest token that is not said.
        types: of tokens, as the processor numbers them.
    """
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest).long()
    for n, row in enumerate(rows):
        here = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, here], mask[n, here] = row, 1
    labels = ids.masked_fill((mask == 0) | (ids >= special), -100)
    if left:  # nobody says the first token
        labels[torch.arange(len(rows)), mask.argmax(dim=1)] = -100
    batch: Batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "mm_token_type_ids": types(ids),
    }
    for found, pixels, key in zip(
        grids,
        ("pixel_values", "pixel_values_videos"),
        ("image_grid_thw", "video_grid_thw"),
        strict=True,
    ):
        if found:
            batch[key] = torch.tensor(found)
            count = int(batch[key].prod(dim=1).sum())
            batch[pixels] = torch.randn(count, WIDTH, generator=generator)
    return batch


def hard_batch(seed: int = 0) -> Batch:
    """Images of several sizes and videos among text, a sample of text alone, unequal lengths."""
    first = [3, (1, 2, 3), 2, (3, 2, 2), 4, (1, 1, 1), (1, 3, 2), 7]
    return make_batch([first, [9], [(2, 3, 2), 11]], seed=seed)


def left_padded(seed: int = 1) -> Batch:
    return make_batch([[2, (1, 2, 2), 5], [4, (4, 1, 2), 9], [6]], left=True, seed=seed)


def one_image(seed: int = 2) -> Batch:
    """More ranks than images; no mask."""
    batch = make_batch([[2, (1, 2, 2), 5]], seed=seed)
    del batch["attention_mask"]
    return batch


def one_video(seed: int = 5) -> Batch:
    """Frames in front, text behind."""
    return make_batch([[(7, 2, 2), 8]], seed=seed)


def text_only(seed: int = 4) -> Batch:
    return make_batch([[12], [9]], seed=seed)


BATCHES = (hard_batch, left_padded, one_image, one_video, text_only)
