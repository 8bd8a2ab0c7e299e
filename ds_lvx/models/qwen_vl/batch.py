"""Batches of Qwen-VL: images between the tokens ``<img>`` and ``</img>`` of the text.

Its tokenizer writes the path of an image there, byte by byte, and fills up the places with padding;
the model's own forward reads the path and opens the file. A sharded batch has the pixels beside the
text, and what stands in the places is of no matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_lvx.models.adapters.batch import Images, check_pixels, images_of
from ds_lvx.models.samples import images_at_hand
from ds_lvx.models.text import Here, Text
from ds_lvx.models.visual import COUNTS, PIXELS

KEYS = (PIXELS, COUNTS)
PLACES = "image_places"
"""bool ``[B, s]``: which tokens of this rank's text are images'."""
QUERIES = 256
"""Rows that the resampler makes of an image, where the config says nothing."""


class Spans(Images):
    """Images whose places in the text no token of their own tells."""

    def beside(self, rank: int, text: Text, here: Here) -> dict[str, Any]:
        """See `Images.beside`; and the places."""
        return {**super().beside(rank, text, here), PLACES: self.places[:, here].contiguous()}


def visual(batch: Mapping[str, Any], text: Text, config: Any) -> Spans:
    """The images of a batch.

    Args:
        batch: what the caller gave; entries that are None are left out.
        text: its text, checked.
        config: of the model.

    Raises:
        ValueError: entries that contradict each other or the model.
        NotImplementedError: samples packed into a row.
    """
    text.refuse_packed()
    each = queries_of(config)
    places = places_of(text, int(config.visual["image_start_id"]), unit_tokens=each)
    here = counts = images_of(places, each)
    pixels = batch.get(PIXELS)
    if pixels is None:
        here = torch.zeros_like(counts)
    else:
        check_pixels(pixels, (side_of(config),) * 2, images="images")
        here = images_at_hand(batch.get(COUNTS), len(pixels), counts)
    return Spans(
        count=int(here.sum()),
        unit_tokens=each,
        arguments={} if pixels is None else {PIXELS: pixels},
        places=places,
        here=here,
    )


def places_of(text: Text, start: int, *, unit_tokens: int) -> Tensor:
    """bool ``[B, T]``: the tokens between ``<img>`` and ``</img>``.

    Args:
        text: the whole text.
        start: the id of ``<img>``; that of ``</img>`` follows.
        unit_tokens: places of an image.

    Raises:
        ValueError: a sample has one without the other, or not as many places between them.
    """
    ids = text.input_ids.cpu()
    first, last = (ids == start).nonzero(), (ids == start + 1).nonzero()
    wide = len(first) == len(last) and bool((last[:, 1] - first[:, 1] == unit_tokens + 1).all())
    if not wide or not torch.equal(first[:, 0], last[:, 0]):
        raise ValueError(
            f"got {len(first)} tokens <img> ({start}) and {len(last)} tokens </img> ({start + 1}); "
            f"expected for each <img> a </img> behind {unit_tokens} places, as the tokenizer "
            "writes them: cut no text in the midst of an image"
        )
    places = torch.zeros(ids.shape, dtype=torch.bool)
    columns = first[:, 1:] + 1 + torch.arange(unit_tokens)
    places[first[:, :1].expand_as(columns), columns] = True
    return places


def queries_of(config: Any) -> int:
    """Places of an image in the text: rows that the resampler makes of it."""
    return int(config.visual.get("n_queries", QUERIES))


def side_of(config: Any) -> int:
    """Height and width of an image, in pixels."""
    return int(config.visual["image_size"])
