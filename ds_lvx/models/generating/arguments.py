"""The arguments of transformers' ``generate``: which are served with sharded keys, what it takes
where one is not given, and how ranks compare them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ds_lvx.models.contract import Family
from ds_lvx.models.generating.past import is_fresh
from ds_lvx.models.generating.started import ENCODED, has_encoder
from ds_lvx.models.generating.text_keys import AUTO, WORDS
from ds_lvx.models.text import TEXT_KEYS, digest, is_integer

TEXT_KEYS_WORD = "text_keys"
ARGUMENTS = "the arguments of generate"
OWN_SETTINGS = "the model's generation_config"
_SHORT = 60
_EMBEDDED = ("inputs", "inputs_embeds", "decoder_inputs_embeds", ENCODED)
# By the name of a setting: values that are served, and what to do with another one.
_SERVED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_cache": ((True,), "without a cache every token would run the whole text: leave it out"),
    # transformers takes its dynamic cache for hybrid, which published Gemma 3 models ask for.
    "cache_implementation": (("dynamic", "hybrid"), 'expected "dynamic", transformers\' own cache'),
    "max_time": ((), "each rank has a clock of its own: use max_new_tokens"),
    "prefill_chunk_size": ((), "the prompt runs as a whole: leave it out"),
    "output_attentions": ((False,), "no rank has the weights of all keys: leave it out"),
}
# Likewise: those that run the model in another way than token by token, or another model.
_ALONE: Mapping[str, tuple[Any, ...]] = {
    "assistant_model": (),
    "assistant_early_exit": (),
    "constraints": (),
    "custom_generate": (),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "negative_prompt_ids": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "token_healing": (False,),
}


def _check_text_keys(family: Family, setting: Any) -> None:
    if not isinstance(setting, str) or setting not in WORDS:
        raise ValueError(f"got text_keys={setting!r}; expected one of {', '.join(WORDS)}")
    if setting != AUTO and not family.splits_prompt:
        raise NotImplementedError(
            f"got text_keys={setting!r} for a model of {family.model_type!r}, whose keys of the "
            "text are sharded or whole as its images are: leave it out"
        )


def check(family: Family, runner: Any, kwargs: Mapping[str, Any]) -> None:
    """Look at the arguments of a call.

    Args:
        family: of the model.
        runner: the module whose ``generate`` runs.
        kwargs: the arguments.

    Raises:
        ValueError: an input that belongs into the batch.
        NotImplementedError: what is not served; says what is.
    """
    inputs = {*TEXT_KEYS, *family.keys, *_EMBEDDED} & kwargs.keys()
    if inputs:
        raise ValueError(
            f"got {', '.join(sorted(inputs))} among the arguments of generate; expected the whole "
            "input in the batch, as the processor returns it"
        )
    if has_encoder(runner) and kwargs.get("past_key_values") is not None:
        raise NotImplementedError(
            "got past_key_values for a model with an encoder, which is not asked again with what "
            "its decoder said; expected the whole batch in every call: leave it out"
        )
    _check_text_keys(family, kwargs.get(TEXT_KEYS_WORD, AUTO))
    alone = "expected a way to generate that runs the model alone, token by token: leave it out"
    for name, (served, advice) in {
        **_SERVED,
        **{name: (served, alone) for name, served in _ALONE.items()},
    }.items():
        value = setting_of(runner, kwargs, name)
        if value is not None and not any(value == each for each in served):
            raise NotImplementedError(
                f"got {name}={_word(value)} for generation with sharded keys; {advice}"
            )


def setting_of(runner: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting as transformers finds it: an argument, or of the config that was given, or of the
    model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config")
    if name == "use_cache" and given is None:
        return None
    for config in (given, runner.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def with_mask(
    runner: Any, kwargs: Mapping[str, Any], batch: Mapping[str, Any]
) -> Mapping[str, Any]:
    """A batch with the mask that transformers finds for one without: padding is no text.

    Args:
        runner, kwargs: as of `check`; the model has no encoder.
        batch: what the caller gave.

    Source: transformers, ``GenerationMixin._prepare_attention_mask_for_generation``.
    """
    ids, pad = batch.get("input_ids"), setting_of(runner, kwargs, "pad_token_id")
    if batch.get("attention_mask") is not None or not is_integer(ids) or pad is None:
        return batch
    ends = setting_of(runner, kwargs, "eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [ends]
    padding = ids == pad
    if pad in ends or not bool(padding.any()):
        return batch
    return {**batch, "attention_mask": (~padding).long()}


def described(runner: Any, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """The arguments, and the model's own settings, in words that are the same on ranks which were
    given the same.

    Args:
        runner, kwargs: as of `check`.
    """
    used = {name: value for name, value in kwargs.items() if name != "streamer"}
    if is_fresh(kwargs.get("past_key_values")):
        used["past_key_values"] = "empty"
    given = ", ".join(f"{name}={_word(used[name])}" for name in sorted(used)) or "none"
    own = runner.generation_config
    return {ARGUMENTS: given, OWN_SETTINGS: "none" if own is None else _word(own)}


def _word(value: Any) -> str:
    """A value, or what can be said of it: objects are told by their class."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {digest(value)}"
    if isinstance(value, str | int | float | None):
        text = repr(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{_word(k)}: {_word(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(_word, value)) + "]"
    elif hasattr(value, "to_diff_dict"):  # a GenerationConfig
        text = f"{type(value).__name__} {_word(value.to_diff_dict())}"
    else:
        return type(value).__name__
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}... ({zlib.crc32(text.encode())})"
