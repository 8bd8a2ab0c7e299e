"""Tokens and labels that a model has no row for.

Only the rank that holds such a token would fail, and the others would wait for it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ds_lvx.models.text import IGNORED_LABEL, Text


def check_tokens(ids: Tensor, text_model: Any, *, replaced: Tensor | None = None) -> None:
    """Compare tokens with the embedding that they will meet.

    Args:
        ids: int ``[B, T]``, of the whole text.
        text_model: that embeds them.
        replaced: bool ``[B, T]``, those that images take the place of; they may have no row.

    Raises:
        ValueError: one without an embedding.
    """
    rows = _rows(_asked("get_input_embeddings", text_model), "embeddings", "num")
    if rows is not None and (found := _beyond(ids, rows, but=replaced)) is not None:
        raise ValueError(
            f"got the token {found} for a model that embeds {rows}; expected 0 to {rows - 1}: use "
            "the tokenizer that belongs to the model, or call "
            "model.resize_token_embeddings(len(tokenizer)) before ds_lvx.initialize"
        )


def check_labels(text: Text, *models: nn.Module) -> None:
    """Compare labels with the head that they will meet.

    Args:
        text: the whole text.
        models: one of which may know the head.

    Raises:
        ValueError: one without a logit.
    """
    if text.labels is None:
        return
    words = _rows(_asked("get_output_embeddings", *models), "features", "out")
    labels = text.labels.clone()
    labels[:, : text.unlearnt] = IGNORED_LABEL
    kept = labels == IGNORED_LABEL
    if words is not None and (found := _beyond(labels, words, but=kept)) is not None:
        raise ValueError(
            f"got the label {found} for a model that writes {words} tokens; expected 0 to "
            f"{words - 1}, or {IGNORED_LABEL} where nothing is learnt, as of image tokens"
        )


def _asked(name: str, *modules: Any) -> Any:
    """What the first module returns that has such a method and an answer; None: there is none."""
    for module in modules:
        ask = getattr(module, name, None)
        with suppress(NotImplementedError):  # so transformers says that it does not know
            found = None if ask is None else ask()
            if found is not None:
                return found
    return None


def _rows(module: Any, what: str, prefix: str) -> int | None:
    """Of an embedding or a head, with those that idefics has beside them; None: not known."""
    rows = getattr(module, f"{prefix}_{what}", None)
    more = getattr(module, f"{prefix}_additional_{what}", 0)
    return None if rows is None else int(rows) + int(more)


def _beyond(values: Tensor, rows: int, *, but: Tensor | None) -> str | None:
    """The first that has no row, in words; None: each has one."""
    values = values.cpu()
    wrong = (values < 0) | (values >= rows)
    if but is not None:
        wrong &= ~but.cpu()
    if not bool(wrong.any()):
        return None
    row, column = wrong.nonzero()[0].tolist()
    return f"{int(values[row, column])} at place {column} of sample {row}"
