"""What a processor makes of equal samples is made once, and is what it makes of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BatchFeature

from ds_lvx.data.processed_once import processing_once


class Processor:
    """Pixels of each image and tokens of each text, padded on the left; counts its samples."""

    def __init__(self, **more: Any) -> None:
        self.samples: list[int] = []
        self.more = more

    def __call__(self, images: list[Any], text: list[str], return_tensors: str) -> BatchFeature:
        assert return_tensors in ("pt", "np")
        self.samples.append(len(text))
        longest = max(map(len, text))
        ids = [[0] * (longest - len(said)) + [*map(ord, said)] for said in text]
        pixels = [torch.full((height, 2), 1.0) for shown in images for height in shown]
        grids = [height for shown in images for height in shown]
        return BatchFeature(
            {
                "input_ids": torch.tensor(ids),
                **({"pixel_values": torch.cat(pixels)} if pixels else {}),
                "grids": torch.tensor(grids),
                **self.more,
            }
        )


IMAGES, TEXT = [[3], [3], [1, 2], [1, 2]], ["a", "a", "long", "long"]


def test_equal_samples_are_made_once() -> None:
    processor, alone = Processor(), Processor()
    once = processing_once(processor, 2)
    assert isinstance(once, Processor)
    made = once(images=IMAGES, text=TEXT, return_tensors="pt")
    assert processor.samples == [1, 1]
    wanted = alone(images=IMAGES, text=TEXT, return_tensors="pt")
    assert made.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(made[key], value)


@pytest.mark.parametrize(
    ("images", "text", "more", "asked"),
    [
        ([[3], [4]], ["a", "a"], {}, [2]),
        ([[3], [3]], ["a", "b"], {}, [2]),
        ([[3]] * 3, ["a"] * 3, {}, [3]),
        ([[3]] * 2, ["a"] * 2, {"names": ["x"]}, [1, 2]),
        ([[], [], [3], [3]], ["a"] * 4, {}, [1, 1, 4]),
    ],
)
def test_others_are_made_as_they_come(
    images: list[Any], text: list[str], more: dict[str, Any], asked: list[int]
) -> None:
    """Samples that differ, that are no whole number of copies, or with what cannot be joined, such
    as some without images."""
    processor = Processor(**more)
    made = processing_once(processor, 2)(images=images, text=text, return_tensors="pt")
    assert processor.samples == asked
    assert made["pixel_values"].shape[0] == sum(map(sum, images))
