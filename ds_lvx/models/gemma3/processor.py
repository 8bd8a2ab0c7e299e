"""Text and pixels for Gemma 3, from the files of a checkpoint, a picture at a time.

A frame of a video is an image, and none is cut to further ones (pan and scan).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from ds_lvx.models.concatenated.files import Files
from ds_lvx.models.gemma3.batch import TYPES, image_tokens
from ds_lvx.models.media import Held, Medium, Shown
from ds_lvx.models.visual import PIXELS

START, END, IMAGE_TOKEN = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}{{ part.text | trim }}{% endfor %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_SETTINGS = (
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


class Processor(Files):
    """See `ds_lvx.models.concatenated.files.Files`.

    Args:
        tokenizer, files: likewise.
        config: of the model, by which an image has so many tokens, and a size.

    Raises:
        ValueError: the files say that it has others.
        NotImplementedError: they ask for pan and scan.
    """

    image_token = IMAGE_TOKEN
    without_template = TURNS

    def __init__(self, tokenizer: Any, files: Mapping[str, Mapping[str, Any]], config: Any) -> None:
        super().__init__(tokenizer, files)
        self._tokens, side = image_tokens(config), config.vision_config.image_size
        if self.of_images.get("do_pan_and_scan"):
            raise NotImplementedError(
                "got do_pan_and_scan in preprocessor_config.json; expected images that are not cut "
                "to further ones, as the published models have it: set it to false"
            )
        given = {
            key: self.of_images[key] for key in _SETTINGS if self.of_images.get(key) is not None
        }
        sides = given.setdefault("size", {"height": side, "width": side})
        said = self.of_both.get("image_seq_length", self._tokens)
        if said != self._tokens or sides != {"height": side, "width": side}:
            raise ValueError(
                f"got images of {sides} and {said} tokens in preprocessor_config.json and "
                f"processor_config.json, and a config.json by which they have {side} pixels by "
                f"side and {self._tokens} tokens; expected the same: copy the files from the "
                "repository of the model"
            )
        self.images = Gemma3ImageProcessorPil(**given)

    def shown(self, medium: Medium) -> Shown:
        """See `ds_lvx.models.contract.Family.shown`."""
        count = 1 if medium.times is None else len(medium.times)
        image = f"\n\n{START}{IMAGE_TOKEN}{END}\n\n"
        return Shown(image * count, (1,) * count, (self._tokens,) * count)

    def media(self, samples: Sequence[Held], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.media`."""
        images = [
            self.images(picture, return_tensors="pt")[PIXELS][0].to(dtype)
            for sample in samples
            for picture in sample.pictures
        ]
        return {PIXELS: torch.stack(images)} if images else {}


def inputs(
    processor: Processor, input_ids: Sequence[int], labels: Sequence[int]
) -> dict[str, Sequence[int]]:
    """See `ds_lvx.models.contract.Family.inputs`: with which tokens are images'."""
    types = [int(token == processor.image_token_id) for token in input_ids]
    return {"input_ids": input_ids, "labels": labels, TYPES: types}
