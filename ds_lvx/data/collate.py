"""Batches for a loop of one's own or a Trainer: the encoder of `launch/finetune.py`, all frames."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ds_lvx.data.batch import BatchMaker
from ds_lvx.data.chosen import FrameRate
from ds_lvx.data.conversation import Conversation
from ds_lvx.data.limits import DEFAULT_LIMITS, Limits
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.registry import FAMILIES, check_packs


class ChatCollator:
    """The ``data_collator`` for `ds_lvx.data.chat.Chats`: makes whole batches of conversations.

    Learnt is what the assistant says, as `launch/finetune.py` has it. All frames are decoded on
    every rank, since a Trainer's batches are whole.

    Args:
        processor: the checkpoint's.
        model: or anything else with its ``config``.
        rate: which frames of a video are taken; without one a second.
        max_length: text tokens that a sample may have; None: the model's positions.
        limits: for images and films.
        pack: text tokens of a row up to which samples share one (`ds_lvx.data.packing`); None:
            each has its own.

    Attributes:
        apart: the same with a row for each sample, in which a Trainer's predictions come.

    Raises:
        NotImplementedError: no family has models of this type, or it makes no such batches.
        ValueError: the tokenizer is no fast one, or has no image token.
    """

    def __init__(
        self,
        processor: Any,
        model: Any,
        *,
        rate: FrameRate | None = None,
        max_length: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
        pack: int | None = None,
    ) -> None:
        config = model.config
        family = FAMILIES.named(config.model_type)
        positions = config.get_text_config().max_position_embeddings
        if pack is not None:
            check_packs(family, "pack")
        encoder = TextEncoder(processor, max_length or positions, family=family)
        maker = partial(BatchMaker, encoder, rate or FrameRate(fps=1), owned=range, limits=limits)
        self._maker = maker(pack=pack)
        self.apart = self
        if pack is not None:
            self.apart = copy.copy(self)
            self.apart._maker = maker()

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """A batch for ``ds_lvx.shard_batch``, by which a `ds_lvx.trainer.Trainer` cuts it.

        Args:
            conversations: B of them.

        Returns:
            As of `ds_lvx.data.batch.BatchMaker.batch`: ``input_ids``, ``attention_mask`` and
            ``labels`` int64 ``[B, T]`` (packed: ``position_ids`` in place of the mask), and what
            the family's processor returns for the frames.

        Raises:
            DataError: with file and line.
        """
        return self._maker.batch(list(conversations)).inputs
