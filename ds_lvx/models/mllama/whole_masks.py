"""Masks as long as the text, which TRL's collators of prompts and completions do not make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

_MASK = "cross_attention_mask"


class WholeMasks:
    """A ``data_collator`` around one of TRL's, for Llama-3.2-Vision in ``trl.DPOTrainer``.

    TRL 1.16 puts the completions behind what the processor made of the prompts, and leaves the
    ``cross_attention_mask`` as long as these: transformers' model refuses such a batch. Here it is
    made again of the whole text, by the processor's rule. One that is as long as the text stays.

    Args:
        collator: TRL's, such as ``DataCollatorForVisionPreference(processor)``.
        processor: the checkpoint's.
    """

    def __init__(self, collator: Callable[[Any], Any], processor: Any) -> None:
        self._collator, self._image = collator, int(processor.image_token_id)

    def __call__(self, examples: Sequence[Any]) -> Any:
        """TRL's batch, with ``cross_attention_mask`` int64 ``[B, T, images, tiles]``."""
        batch = self._collator(examples)
        ids = batch["input_ids"]
        if _MASK not in batch or batch[_MASK].shape[1] == ids.shape[1]:
            return batch
        places = [get_cross_attention_token_mask(row, self._image) for row in ids.tolist()]
        tiles = batch["aspect_ratio_mask"].sum(dim=-1).tolist()
        dense = convert_sparse_cross_attention_mask_to_dense(
            places,
            num_tiles=[each[: len(of)] for each, of in zip(tiles, places, strict=True)],
            max_num_tiles=batch["aspect_ratio_mask"].shape[-1],
            length=ids.shape[1],
        )
        # Images that fill up the batch are seen by nobody.
        whole = torch.zeros(
            *dense.shape[:2], *batch["aspect_ratio_mask"].shape[1:], dtype=ids.dtype
        )
        whole[:, :, : dense.shape[2]] = torch.from_numpy(dense)
        batch[_MASK] = whole
        return batch
