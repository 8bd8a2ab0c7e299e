"""Models with random weights, and samples to measure them with: what families have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from ds_lvx.models.dimensions import Model
from ds_lvx.models.size import Size

_TEXT: Mapping[str, Sequence[str]] = {
    "vocabulary": ("vocab_size",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "mlp": ("ffn_dim", "intermediate_size"),
    "layers": ("num_hidden_layers",),
    "positions": ("max_position_embeddings",),
}
_VISION: Mapping[str, Sequence[str]] = {
    "vision_hidden": ("hidden_size",),
    "vision_heads": ("num_heads", "num_attention_heads", "attention_heads"),
    "vision_mlp": ("intermediate_size",),
    "vision_layers": ("depth", "num_hidden_layers"),
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
}
"""Fields of a `Size`, and the words that configurations have for them, of which the first counts
that is there."""


def text_settings(size: Size) -> dict[str, Any]:
    """Of a text model's configuration, what a size says; ``head_dim`` is resolved."""
    return {
        **plain_settings(size),
        "head_dim": size.head_dim or size.hidden // size.heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
    }


def plain_settings(size: Size) -> dict[str, Any]:
    """The same of one whose heads are as wide as the text over their number."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.positions,
        "initializer_range": size.initializer_range,
        "bos_token_id": size.bos,
        "eos_token_id": size.eos,
        "pad_token_id": size.pad,
    }


def size_of_parts(text: Any, vision: Any, **more: Any) -> Size:
    """The size of a configuration.

    Args:
        text, vision: its parts.
        more: fields that these do not have, or by other words; without ``cross_at`` all layers of
            the text see images.
    """
    parts = [(text, _TEXT), (vision, _VISION)]
    found = {
        field: _value(part, words)
        for part, table in parts
        for field, words in table.items()
        if field not in more
    }
    return _size({**found, **more})


def size_of_known(models: Iterable[Model], name: str, **more: Any) -> Size:
    """The size of one of the models that the planner knows.

    Args:
        models: of a family.
        name: a part of its name.
        more: fields that the planner does not know, or counts otherwise; without ``cross_at`` all
            layers of the text see images.
    """
    model = next(each for each in models if name in each.name)
    text, tower = model.text if model.text.count else model.cross, model.tower
    fields = {key: getattr(text, key) for key in ("hidden", "heads", "kv_heads", "head_dim", "mlp")}
    fields |= {f"vision_{key}": getattr(tower, key) for key in ("hidden", "heads", "mlp")}
    fields |= {"vocabulary": model.vocabulary, "vision_layers": tower.count}
    fields["layers"] = sum(each.count for each in model.decoding)
    if (states := model.recurrent) is not None:
        fields |= {"state_heads": states.kv_heads, "state_values": states.heads}
        fields["state_dim"] = states.key_dim
    return _size({**fields, **more})


def _size(fields: Mapping[str, Any]) -> Size:
    among = {"cross_at": tuple(range(fields["layers"])), "vision_global_layers": 0}
    return Size(**{**among, **fields})


def refuse_none(config: Any, name: str) -> None:
    """Raise a NotImplementedError where there is no configuration, and no code to make one."""
    if config is None:
        raise NotImplementedError(
            f"got no configuration of {name}, whose code comes with its checkpoints; pass the "
            "folder of one"
        )


def tiny_size(tokenizer: Any, **more: Any) -> Size:
    """The size of a tiny model whose text is a tokenizer's; ``more`` are fields that are
    otherwise."""
    ids = {key: int(getattr(tokenizer, f"{key}_token_id")) for key in ("eos", "pad")}
    given = {"vocabulary": len(tokenizer), "cross_at": (), "positions": 4096, **ids, **more}
    return Size(**given)


def vision_settings(size: Size) -> dict[str, Any]:
    """Of a vision tower's configuration, what a size says, in the words of most."""
    return {
        "num_hidden_layers": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "num_attention_heads": size.vision_heads,
        "intermediate_size": size.vision_mlp,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
    }


def _value(part: Any, words: Sequence[str]) -> Any:
    there = (word for word in words if getattr(part, word, None) is not None)
    return getattr(part, next(there, words[0]))


def of_heads(text: Any) -> dict[str, Any]:
    """Fields of a text's `Size` by which its heads and their rotary embedding are its own."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {"head_dim": size, "rope_theta": text.rope_parameters["rope_theta"]}


def refill(model: nn.Module, names: str | tuple[str, ...], init: Callable[[Tensor], Any]) -> None:
    """Give parameters other values, also where ZeRO-3 has partitioned them.

    Args:
        model: whose they are.
        names: how the names of these end.
        init: fills one in place.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=partitioned
            ):
                init(parameter)


def random_text(
    text_tokens: int, *, first: int, seed: int, front: Tensor | None = None
) -> dict[str, Tensor]:
    """Ids and labels of one sample of random text, ``[1, tokens]``.

    Args:
        text_tokens: of it.
        first: special token; all below but 0 are words, and nothing else is learnt.
        seed: of the words.
        front: int64 ``[n]``, tokens before it.
    """
    words = torch.randint(1, first, (text_tokens,), generator=torch.Generator().manual_seed(seed))
    ids = (words if front is None else torch.cat((front, words)))[None]
    return {"input_ids": ids, "labels": ids.masked_fill(ids >= first, -100)}


def random_pixels(
    frames: Iterable[int], shape: tuple[int, ...], *, seed: int, apart: tuple[int, ...] = (3, 1, 1)
) -> Tensor:
    """float32 ``[frames, *shape]``, each by its number and the seed.

    Args:
        frames: their numbers.
        shape: of one.
        seed: of all.
        apart: shape of what makes a frame brighter or darker than others, so that a method which
            lost some would show.
    """
    mine, generator = list(frames), torch.Generator()
    pixels = torch.empty(len(mine), *shape)
    for place, frame in enumerate(mine):
        generator.manual_seed(seed + 1 + frame)
        shift = torch.randn(apart, generator=generator)
        pixels[place] = shift + torch.randn(shape, generator=generator)
    return pixels
