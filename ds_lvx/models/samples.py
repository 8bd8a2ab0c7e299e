"""Samples that share a batch or a row of text: where they begin, and which images are theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.text import Text
from ds_lvx.models.visual import COUNTS, PIXELS


def sample_begins(text: Text) -> Tensor | None:
    """`Text.begins`, of a model that takes no other positions than these say.

    Raises:
        ValueError: other positions.
    """
    if text.position_ids is None:
        return None
    positions = text.position_ids.cpu()
    goes_on = torch.nn.functional.pad(positions[:, :-1] + 1, (1, 0))
    is_place = (positions == 0) | (positions == goes_on)
    if text.attention_mask is not None or not bool(is_place.all()):
        raise ValueError(
            "got position_ids; expected none: they follow from the text and its images. Only "
            "samples that share a row have them, 0, 1, 2, ... anew for each, without "
            "attention_mask, with which a token sees all before it"
        )
    return text.begins


def images_before(seen: Tensor, begins: Tensor) -> Tensor:
    """Images of a row's samples before a token's own.

    Args:
        seen: int ``[B, T]``, images of the row up to a token and with it.
        begins: bool ``[B or 1, T]``, where a further sample of the row begins.
    """
    before = torch.nn.functional.pad(seen[:, :-1], (1, 0))
    return torch.where(begins, before, 0).cummax(dim=1).values


def images_at_hand(given: Any, rows: int, counts: Tensor) -> Tensor:
    """Images by sample of ``rows`` images at hand, int64 ``[B]``.

    Args:
        given: `COUNTS` as the caller has it, or None: all images, or the only sample's.
        rows: images at hand.
        counts: int64 ``[B]``, of all ranks.

    Raises:
        ValueError: it cannot be told of which samples they are.
    """
    if given is None:
        total = int(counts.sum())
        if len(counts) > 1 and rows not in (0, total):
            raise ValueError(
                f"got {PIXELS} of {rows} images, of {total} in {len(counts)} samples; expected all "
                f"of them, or {COUNTS} [batch] beside them: how many of each sample these are"
            )
        return counts if rows == total else torch.tensor([rows] + [0] * (len(counts) - 1))
    here = torch.as_tensor(given, dtype=torch.int64).cpu().flatten()
    if len(here) != len(counts) or bool((here < 0).any()) or int(here.sum()) != rows:
        raise ValueError(
            f"got {COUNTS} {here.tolist()} for {rows} images; expected one number for each of "
            f"{len(counts)} samples, which add up to the images at hand"
        )
    return here
