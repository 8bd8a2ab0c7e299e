"""Text that no rank splits, for language models with an encoder: each rank runs them whole.

Their attention has biases by position, which the sharded one has not. Images are dealt out all the
same. Every rank gets what all of them made, and an even share of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from torch import nn

from ds_lvx.kernels.visibility import Visibility
from ds_lvx.models.patch import KEYWORD, Hook
from ds_lvx.models.text import ITEMS_KEY, Here, Text, described, is_integer
from ds_lvx.models.tiled_loss import share_of_loss

_LABELS = "labels"


class WholeText(Text):
    """The text of the encoder, and the labels of the decoder, ``[B, L]``."""

    whole = True
    unlearnt = 0

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Self:
        """Take the text out of a batch.

        Raises:
            ValueError: as of `Text.of`; labels that are no integers ``[B, L]``.
        """
        others = {key: value for key, value in batch.items() if key != _LABELS}
        text = super().of(others)
        labels = batch.get(_LABELS)
        if labels is None:
            return text
        if not is_integer(labels) or labels.ndim != 2 or len(labels) != text.shape[0]:
            raise ValueError(
                f"got labels {described(labels)}; expected ({text.shape[0]}, tokens), integers: "
                "what the decoder is to write for each sample, of any length"
            )
        return replace(text, labels=labels.long())

    def lengths(self, size: int) -> tuple[int, ...]:
        """Tokens by rank: all."""
        return (self.shape[1],) * size

    def part(self, rank: int, size: int) -> slice:
        """A rank's part: all."""
        return slice(0, self.shape[1])

    def visibility(self) -> Visibility | None:
        """None: no sharded layer attends to it."""
        return None

    def shard(self, here: Here) -> dict[str, Any]:
        """The model's text arguments, and by what the sum of the losses is divided."""
        shard: dict[str, Any] = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            shard["attention_mask"] = self.attention_mask
        if self.labels is not None:
            shard[_LABELS] = self.labels
            shard[ITEMS_KEY] = self.divisor
        return shard


class ShareLoss(Hook):
    """A forward hook of the model: every rank computed the whole loss, and gets its share of it."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> Any:
        batch, labels = kwargs.get(KEYWORD), kwargs.get(_LABELS)
        if batch is None or labels is None:
            return None
        items = kwargs[ITEMS_KEY] * batch.channel.size
        out.loss = share_of_loss(module, out.logits, labels, items)
        return out
