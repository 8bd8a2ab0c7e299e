"""Text and pixels for Video-LLaMA, from the folder that `convert` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ds_lvx.models.adapters.pixels import whole_picture
from ds_lvx.models.video_llama.batch import PIXELS
from ds_lvx.models.visual import COUNTS

IMAGE_TOKEN = "<ImageHere>"
_CONTENT = "{% for part in message.content %}{{ part.text }}{% endfor %}"
_SYSTEM = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
TEMPLATES: Mapping[str, str] = {
    "llama_v2": (
        "{% set asked = namespace(so_far=false) %}"
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{{ bos_token }}[INST] "
        "{% if not asked.so_far %}{% set asked.so_far = true %}<<SYS>>{{ '\n' }}"
        "{% if messages[0].role == 'system' %}" + _SYSTEM + "{% else %} {% endif %}"
        "{{ '\n' }}<</SYS>>{{ '\n\n' }}{% endif %}" + _CONTENT + " [/INST]"
        "{% elif message.role == 'assistant' %} " + _CONTENT + " {{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "vicuna": (
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}" + _SYSTEM + "{% endif %}{{ '\n\n' }}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}###Human: " + _CONTENT + "{{ '\n' }}"
        "{% elif message.role == 'assistant' %}###Assistant: " + _CONTENT + "{{ '\n' }}{% endif %}"
        "{% endfor %}###{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
"""What the repository writes to train, by the name that it has for the language model."""


class Processor:
    """The tokenizer of a checkpoint, and its way with pictures.

    Args:
        tokenizer: that knows `IMAGE_TOKEN`, and has a chat template.
        side: pixels of a frame, by side.
        places: of a video in the text.
        most: frames that a video may have.
    """

    image_token = IMAGE_TOKEN
    chat_template = None

    def __init__(self, tokenizer: Any, *, side: int, places: int, most: int) -> None:
        self.tokenizer, self.places = tokenizer, places
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._side, self._most = side, most

    @classmethod
    def of(cls, name: str, config: Any) -> Processor:
        """That of a checkpoint, from a folder or the hub, whose model has a `VideoLlamaConfig`."""
        return cls.fitting(PreTrainedTokenizerFast.from_pretrained(name), config)

    @classmethod
    def fitting(cls, tokenizer: Any, config: Any) -> Processor:
        """With a tokenizer, what a `VideoLlamaConfig` says."""
        side = config.vision["image_size"]
        return cls(tokenizer, side=side, places=config.video_queries, most=config.frames)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads; the model writes its config."""
        self.tokenizer.save_pretrained(folder)

    def with_places(
        self, input_ids: Sequence[int], labels: Sequence[int]
    ) -> Mapping[str, Sequence[int]]:
        """See `ds_lvx.models.contract.Family.inputs`: the frames of a video become its places.

        Raises:
            ValueError: more than one video or image, or more frames than the model can number.
        """
        image = self.image_token_id
        first = [
            place
            for place, token in enumerate(input_ids)
            if token == image and (place == 0 or input_ids[place - 1] != image)
        ]
        frames = sum(token == image for token in input_ids)
        if len(first) > 1 or frames > self._most:
            raise ValueError(
                f"got {len(first)} videos or images of {frames} frames; expected one a sample, of "
                f"at most {self._most} frames, which the model can number: split the sample, or "
                "take fewer frames"
            )
        given: list[list[int]] = [[*input_ids], [*labels]]
        if first:
            start, end = first[0], first[0] + frames
            fill = [image] * self.places, [labels[start]] * self.places
            pairs = zip(given, fill, strict=True)
            given = [[*row[:start], *new, *row[end:]] for row, new in pairs]
        return dict(zip(("input_ids", "labels"), given, strict=True))

    def frames(self, pictures: Sequence[Iterable[Any]], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.frames`.

        Returns:
            ``images_per_sample`` int64 ``[B]``, and ``images [frames, 3, side, side]`` where this
            rank has some.
        """
        made = [[whole_picture(each, self._side).to(dtype) for each in row] for row in pictures]
        found = {COUNTS: torch.tensor([len(row) for row in made])}
        images = [image for row in made for image in row]
        return {**found, PIXELS: torch.stack(images)} if images else found


def media_text(times: Sequence[float] | None) -> str:
    """See `ds_lvx.models.contract.Family.media_text`: as the repository writes it."""
    if times is None:
        return f"<Image>{IMAGE_TOKEN}</Image> "
    seconds = ", ".join(str(round(time, 1)) for time in times)
    frames = IMAGE_TOKEN * len(times)
    told = f"The video contains {len(times)} frames sampled at {seconds} seconds. "
    return f"<Video>{frames}</Video> {told}"
