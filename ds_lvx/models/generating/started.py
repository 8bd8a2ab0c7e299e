"""What a model with an encoder begins to generate with: its decoder's first tokens.

transformers runs the encoder first, by itself. With sharded rows it runs in the forward of the
prompt, as in training, and what stands in the place of its output is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ds_lvx.models.batch import move
from ds_lvx.models.text import Text

_IDS, _MASK = "decoder_input_ids", "decoder_attention_mask"
ENCODED = "encoder_outputs"


def has_encoder(runner: Any) -> bool:
    """Whether the text that a model generates is a decoder's, beside that of an encoder."""
    return bool(getattr(getattr(runner, "config", None), "is_encoder_decoder", False))


def started(batch: Mapping[str, Any], setting: Callable[[str], Any]) -> dict[str, Any]:
    """A batch with the decoder's tokens that transformers would begin with, and no labels.

    Without any of the caller's that is the start token, which goes before those that have it in no
    row.

    Args:
        batch: what the caller gave.
        setting: the value of a setting of generation.

    Raises:
        ValueError: no ``input_ids``, or no start token.

    Source: transformers, ``GenerationMixin._prepare_decoder_input_ids_for_generation``.
    """
    given = {k: v for k, v in batch.items() if k != "labels" and v is not None}
    rows = Text.of({"input_ids": given.get("input_ids")}).input_ids
    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start
    if start is None:
        raise ValueError(
            "got neither decoder_start_token_id nor bos_token_id in the model's generation config; "
            "expected the token that the decoder begins with: pass decoder_start_token_id"
        )
    first = torch.as_tensor(start, dtype=rows.dtype, device=rows.device)
    first = first.reshape(-1, 1).expand(len(rows), 1)
    ids, mask = given.get(_IDS), given.get(_MASK)
    if ids is None:
        return {**given, _IDS: first}
    # What is no tensor of ids is refused with the text.
    if isinstance(ids, Tensor) and ids.ndim == 2 and bool((ids[:, :1] != first).all()):
        given[_IDS] = torch.cat((first.to(ids), ids), dim=1)
        if isinstance(mask, Tensor):
            given[_MASK] = torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)
    return given


def begins_with(batch: Mapping[str, Any]) -> int:
    """How many tokens a row of the sequences has that are generated from a batch, before new ones.

    Args:
        batch: as the family has it of a text whose answer is to be generated.
    """
    ids: Tensor = batch.get(_IDS, batch["input_ids"])
    return ids.shape[1]


def beside_decoder(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What transformers' ``generate`` gets beside the decoder's text: the encoder's, which some
    processors of logits read, and an output of no rows.

    Args:
        batch: what the caller gave.
        device: where the model computes.
    """
    rows: Tensor = batch["input_ids"]
    states = torch.empty(len(rows), 0, 1, device=device)
    return {
        "input_ids": move(rows, device),
        ENCODED: BaseModelOutput(last_hidden_state=states),
    }
