"""Tokenizer and settings of a checkpoint whose visual tokens stand among the text's.

transformers' own processors want torchvision for videos, and all frames of one at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer

from ds_lvx.models.remote import CHATML, SETTINGS, read_settings

_TEMPLATE = "chat_template.json"


class Files:
    """The tokenizer of a checkpoint, and its way with pictures. A family says what these make.

    Args:
        tokenizer: that knows the tokens of images and videos.
        files: settings by the name of their file; empty where there is none.

    Attributes:
        image_token: in the text.
        of_images, of_videos, of_both: settings, in either of the forms that transformers writes.
        without_template: the chat template where the checkpoint has none.
    """

    image_token: str
    without_template: str = CHATML

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        template = (files.get(_TEMPLATE) or {}).get("chat_template")
        self.chat_template = tokenizer.chat_template or template or self.without_template
        self._files = files
        images, videos, both = (files.get(name) or {} for name in SETTINGS)
        self.of_both: Mapping[str, Any] = both
        self.of_images: Mapping[str, Any] = both.get("image_processor") or images
        self.of_videos: Mapping[str, Any] = both.get("video_processor") or videos

    @classmethod
    def of(cls, name: str, *more: Any) -> Self:
        """That of a checkpoint, from a folder or the hub.

        Args:
            name: of the folder, or on the hub.
            more: what a family's own takes besides.
        """
        files = read_settings(name, _TEMPLATE)
        return cls(AutoTokenizer.from_pretrained(name), files, *more)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads."""
        self.tokenizer.save_pretrained(folder)
        for name, settings in self._files.items():
            if settings:
                (Path(folder) / name).write_text(json.dumps(settings, indent=1))
