"""BLIP-2, InstructBLIP and InstructBLIP-Video of transformers.

A Q-Former makes 32 tokens of an image or a frame. InstructBLIP's reads the instruction as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
)
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2Attention,
    Blip2QFormerMultiHeadAttention,
)
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipAttention,
    InstructBlipQFormerMultiHeadAttention,
)
from transformers.models.instructblipvideo.modeling_instructblipvideo import (
    InstructBlipVideoAttention,
    InstructBlipVideoQFormerMultiHeadAttention,
)

from ds_lvx.models.adapters import dimensions, sized
from ds_lvx.models.adapters.batch import LENGTHS, ROWS, check_pixels
from ds_lvx.models.adapters.family import Adapter
from ds_lvx.models.adapters.forward import Encode, EncodePrompt
from ds_lvx.models.adapters.processor import INSTRUCTION, INSTRUCTION_MASK, Processor
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.samples import images_at_hand
from ds_lvx.models.size import Size
from ds_lvx.models.visual import COUNTS, PIXELS


class Blip2(Adapter):
    """See `ds_lvx.models.contract.Family` for what each part does."""

    keys: tuple[str, ...] = (PIXELS, COUNTS)
    within: tuple[type[nn.Module], ...] = (Blip2Attention, Blip2QFormerMultiHeadAttention)
    of_class: Any = Blip2ForConditionalGeneration
    encoder = "get_image_features"
    takes: tuple[str, ...] = ()
    of_video = False
    on_opt = True  # models of random weights

    # ---- patching

    def find(self, model: nn.Module) -> Any:
        return next((m for m in model.modules() if isinstance(m, self.of_class)), None)

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        token = self.image_token(model.config)
        hook = Encode(model, self.encoder, token=token, takes=self.takes, as_videos=self.of_video)
        model.register_forward_pre_hook(hook, with_kwargs=True)
        takes = (ROWS, LENGTHS, PIXELS, *self.takes)
        prompt = EncodePrompt(model, takes, hook.embed)
        self.text_model(model).register_forward_pre_hook(prompt, with_kwargs=True)

    # ---- batches

    def image_token(self, config: Any) -> int | None:
        found = config.video_token_index if self.of_video else config.image_token_index
        return None if found is None else int(found)

    def image_places(self, config: Any) -> int:
        return int(config.num_query_tokens)

    def at_hand(
        self, batch: Mapping[str, Any], counts: Tensor, config: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        pixels, of_samples = batch.get(PIXELS), COUNTS in batch
        if pixels is None:
            return {}, torch.zeros_like(counts)
        given = batch.get(COUNTS)
        if self.of_video and not of_samples and isinstance(pixels, Tensor) and pixels.ndim == 5:
            given, of_samples = [pixels.shape[1]] * len(pixels), True
            pixels = pixels.flatten(0, 1)
        images = "samples, frames" if self.of_video else "images"
        check_pixels(pixels, _sides(config.vision_config), images=images)
        here = images_at_hand(given, len(pixels), counts)
        arguments = {PIXELS: pixels}
        if self.takes and len(pixels) > 0:
            of_samples = of_samples or self.of_video
            arguments |= _instructions(batch, here, of_samples=of_samples)
        return arguments, here

    def frame_places(self, processor: Processor) -> int:
        return processor.places

    def frames(
        self,
        processor: Processor,
        input_ids: Tensor,
        pictures: Sequence[Iterable[Any]],
        *,
        count: int,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        return processor.frames(pictures, dtype=dtype)

    def blank(self, model: Any) -> dict[str, Tensor]:
        blank = {key: torch.ones(1, 1, dtype=torch.int64) for key in self.takes}
        return {PIXELS: torch.zeros(1, 3, *_sides(model.config.vision_config)), **blank}

    # ---- models

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        return self.of_class.from_pretrained(name, dtype=dtype, **more)

    def load_processor(self, name: str) -> Processor:
        return Processor.of(name, self.of_class.config_class.from_pretrained(name))

    dimensions = staticmethod(dimensions.dimensions)

    def config(self, size: Size) -> Any:
        token = "video_token_index" if self.of_video else "image_token_index"
        of_config = self.of_class.config_class
        return sized.config_of(size, of_config, token=token, on_opt=self.on_opt)

    def size(self, config: Any = None) -> Size:
        return sized.size_of(config, on_opt=self.on_opt)

    def build(self, config: Any, *, gate: float, dtype: torch.dtype) -> Any:
        return sized.build(self.of_class, config, dtype=dtype)

    def random_frames(
        self, config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
    ) -> dict[str, Tensor]:
        image = self.image_token(config)
        assert image is not None, "a configuration of ours has one"
        return sized.random_frames(
            config,
            image,
            reads=self.takes,
            text_tokens=text_tokens,
            total=total,
            frames=frames,
            seed=seed,
        )

    def regions(self) -> Mapping[str, str]:
        return {
            r".*\blanguage_model\..*layers\.\d+\.self_attn": "cross_attention",
            r".*\blanguage_model": "text",
            r".*\b(vision_model|qformer|query_tokens|language_projection)": "vision",
        }


class InstructBlip(Blip2):
    """Its Q-Former reads an instruction for each image, by tokens of its own."""

    keys = (PIXELS, COUNTS, INSTRUCTION, INSTRUCTION_MASK)
    within: tuple[type[nn.Module], ...] = (
        InstructBlipAttention,
        InstructBlipQFormerMultiHeadAttention,
    )
    of_class: Any = InstructBlipForConditionalGeneration
    takes = (INSTRUCTION, INSTRUCTION_MASK)
    on_opt = False

    def beside_text(
        self, processor: Processor, prompts: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        return processor.instructions(prompts)


class InstructBlipVideo(InstructBlip):
    """Its Q-Former makes tokens of a frame, and reads the sample's instruction for each."""

    within = (InstructBlipVideoAttention, InstructBlipVideoQFormerMultiHeadAttention)
    of_class = InstructBlipVideoForConditionalGeneration
    encoder = "get_video_features"
    of_video = True


def _sides(vision: Any) -> tuple[int, int]:
    """Height and width of an image."""
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _instructions(batch: Mapping[str, Any], here: Tensor, *, of_samples: bool) -> dict[str, Tensor]:
    """What the Q-Former reads with each image.

    Args:
        batch: the whole batch.
        here: int64 ``[B]``, images at hand of each sample.
        of_samples: the instructions are those of the samples; else of the images.
    """
    ids: Any = batch.get(INSTRUCTION)
    shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
    of_samples = of_samples or (len(here) == 1 and shape is not None and shape[0] == 1)
    rows = len(here) if of_samples else int(here.sum())
    mask: Any = batch.get(INSTRUCTION_MASK)
    if mask is None and isinstance(ids, Tensor):
        mask = torch.ones_like(ids)
    for key, value in ((INSTRUCTION, ids), (INSTRUCTION_MASK, mask)):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape is None or len(shape) != 2 or found != (rows, shape[1]):
            raise ValueError(
                f"got {key} {found}; expected (images, tokens), {rows} rows: an instruction for "
                f"each image, or with {COUNTS}, or of a video, one for each sample"
            )
    given: dict[str, Any] = {INSTRUCTION: ids, INSTRUCTION_MASK: mask}
    if not of_samples:
        return given
    counts = here.to(ids.device)
    return {key: value.repeat_interleave(counts, dim=0) for key, value in given.items()}
