"""Text, pixels and instructions for BLIP-2 and its like, from the files of a checkpoint.

Their own processors write the places of one image, or of four frames, before a text. This one takes
their tokenizers and their way with pixels, for any number of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, Blip2Processor, InstructBlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from ds_lvx.models.remote import read_json, read_settings
from ds_lvx.models.visual import COUNTS, PIXELS

INSTRUCTION, INSTRUCTION_MASK = "qformer_input_ids", "qformer_attention_mask"
_READER = "qformer_tokenizer"
"""Where the tokenizer of instructions lies in a checkpoint."""
_IMAGE, _FRAME = "<image>", "<video>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% endif %}"
    "{% endfor %}{% endfor %}"
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}Question: {% elif message.role == 'assistant' %}Answer: "
    "{% endif %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token or '' }}{{ '\n' }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
"""For checkpoints without one: images stand before the text, as the models learnt it."""


class Processor:
    """The tokenizers of a checkpoint, and its way with pictures.

    Args:
        tokenizer: of the text; it knows the image token.
        images: a picture to its pixels.
        image_token, image_token_id: the token, as the text has it and as the model has it.
        places: of an image in the text.
        reader: the Q-Former's tokenizer, and how many tokens it may read; None: it reads nothing.

    Raises:
        ValueError: tokenizer and model know the image token by different ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: Any,
        *,
        image_token: str,
        image_token_id: int,
        places: int,
        reader: tuple[Any, int] | None = None,
    ) -> None:
        if image_token not in tokenizer.get_vocab():
            added = AddedToken(image_token, normalized=False, special=True)
            tokenizer.add_tokens([added], special_tokens=True)
        found = tokenizer.convert_tokens_to_ids(image_token)
        if found != image_token_id:
            raise ValueError(
                f"got a tokenizer in which {image_token} is {found}, and a model for which it is "
                f"{image_token_id}; expected the same: take the tokenizer of the checkpoint"
            )
        self.tokenizer, self.places = tokenizer, places
        self.image_token, self.image_token_id = image_token, image_token_id
        template = None if tokenizer.chat_template else _CHAT_TEMPLATE
        self.chat_template = template and template.replace("IMAGE", image_token)
        self._images, self._reader = images, reader

    @classmethod
    def of(cls, name: str, config: Any) -> Processor:
        """That of a checkpoint, from a folder or the hub.

        Args:
            name: of the folder, or on the hub.
            config: of the model.

        Raises:
            ValueError: the model has no image token, or its language model an encoder.
        """
        if config.text_config.is_encoder_decoder:
            raise ValueError(
                f"got {name}, whose language model ({config.text_config.model_type}) has an "
                "encoder; expected one that continues a text, as chats are written here: train it "
                "by ds_lvx.initialize and batches of your own"
            )
        video = hasattr(config, "video_token_index")
        token = config.video_token_index if video else config.image_token_index
        if token is None:
            raise ValueError(
                f"got {name}, whose config has no image token; expected a checkpoint in a form "
                "that transformers 5 writes"
            )
        reader = None
        if video or read_json(name, f"{_READER}/tokenizer_config.json"):
            own = AutoTokenizer.from_pretrained(name, subfolder=_READER)
            reader = own, int(config.qformer_config.max_position_embeddings)
        return cls(
            AutoTokenizer.from_pretrained(name),
            _images(name),
            image_token=_FRAME if video else _IMAGE,
            image_token_id=int(token),
            places=int(config.num_query_tokens),
            reader=reader,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `of` reads, and of images transformers' processors; the model writes its
        config."""
        parts, count = (self._images, self.tokenizer), {"num_query_tokens": self.places}
        if self._reader is None:
            Blip2Processor(*parts, **count).save_pretrained(folder)
        elif self.image_token == _IMAGE:
            InstructBlipProcessor(*parts, self._reader[0], **count).save_pretrained(folder)
        else:
            self.tokenizer.save_pretrained(folder)
            self._images.save_pretrained(folder)
            self._reader[0].save_pretrained(Path(folder) / _READER)

    def frames(self, pictures: Sequence[Iterable[Any]], *, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ds_lvx.models.contract.Family.frames`.

        Returns:
            ``images_per_sample`` int64 ``[B]``, and ``pixel_values`` ``[images, 3, height, width]``
            where this rank has some.
        """
        made = [[self._pixels(picture).to(dtype) for picture in sample] for sample in pictures]
        found = {COUNTS: torch.tensor([len(sample) for sample in made])}
        images = [image for sample in made for image in sample]
        return {**found, PIXELS: torch.stack(images)} if images else found

    def instructions(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the Q-Former reads: each sample's text before the answer, int64 ``[B, tokens]``."""
        assert self._reader is not None, "only models whose Q-Former reads have instructions"
        tokenizer, most = self._reader
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        read = tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        return {INSTRUCTION: read["input_ids"], INSTRUCTION_MASK: read["attention_mask"]}

    def _pixels(self, picture: Any) -> Tensor:
        made: Tensor = self._images(picture, return_tensors="pt")[PIXELS][0]
        return made


def _images(name: str) -> BlipImageProcessorPil:
    """A checkpoint's way with a picture; that with a video's frames is the same."""
    images, videos, whole = read_settings(name).values()
    parts = (whole.get("image_processor"), whole.get("video_processor"), images, videos)
    given: dict[str, Any] = next(each for each in parts if each)
    names = ("size", "image_mean", "image_std", "resample", "rescale_factor")
    return BlipImageProcessorPil(**{key: given[key] for key in names if key in given})
