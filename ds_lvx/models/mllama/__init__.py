"""Llama-3.2-Vision (mllama). Importing this package imports no torch."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "visible_images":
        from ds_lvx.models.mllama.batch import visible_images

        return visible_images
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
