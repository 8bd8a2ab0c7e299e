"""Generating with the visual keys sharded: transformers' ``generate`` on every rank of a group.

The ranks have the same text, the same logits and the same random numbers, so that each of them
chooses the tokens itself. What the model needs for that is `ds_lvx.models.generating.decoding`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer

from ds_lvx.attention.checkpointing import is_partitioned
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.failures import named
from ds_lvx.distributed.groups import SequenceParallelGroups, resolve
from ds_lvx.kernels.transfer import HOST
from ds_lvx.models import family_of
from ds_lvx.models.batch import device_of
from ds_lvx.models.contract import Family
from ds_lvx.models.draft import Draft
from ds_lvx.models.generating import arguments
from ds_lvx.models.generating.decoding import Decoding
from ds_lvx.models.generating.feeding import feeding
from ds_lvx.models.generating.past import Continued, is_fresh, leave
from ds_lvx.models.generating.prompt import Fresh
from ds_lvx.models.generating.started import beside_decoder, has_encoder, started
from ds_lvx.models.generating.text_keys import AUTO, SHARDED
from ds_lvx.models.patch import is_prepared

_RANDOM = "random numbers"


def generate(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    groups: SequenceParallelGroups | None = None,
    frames: str = "all",
    **kwargs: Any,
) -> Any:
    """transformers' ``generate`` with the visual keys sharded over the ranks of a group.

    Every rank of a sequence-parallel group calls it with the same text and arguments. A rank
    encodes its own frames, projects K and V of them once a cross-attention layer, and keeps these
    and no others. The text is whole on every rank, with the model's own cache, but for the keys of
    a very long prompt, of which each rank keeps its part. Where visual tokens stand among the text,
    a rank has its part of both, as in training, and keeps the keys of that; what is generated is
    whole on every rank. The model runs in evaluation mode, whatever its mode.

    Args:
        model: from `ds_lvx.apply` or `ds_lvx.initialize`, or its engine at any ZeRO stage.
        batch: what the processor of the model's family returns, as for `ds_lvx.shard_batch`; pad
            texts on the left. Labels are not looked at. Of a model with an encoder the text is
            that one's, and the decoder begins with ``decoder_input_ids`` or as in transformers.
        groups: the groups; None is the current ones, or all ranks as one group.
        frames: ``"all"``: the batch holds every frame, this rank's are cut. ``"local"``: it holds
            this rank's frames already.
        kwargs: of transformers' ``generate``: ``generation_config`` and its fields
            (``max_new_tokens``, ``do_sample``, ``num_beams``, ``num_return_sequences``, ...),
            ``logits_processor``, ``stopping_criteria``, ``return_dict_in_generate`` and so on.
            ``streamer`` is used on the first rank of the group; others may pass None, or one that
            gets nothing but its end. It gets that where the call fails, too.
            ``past_key_values`` is that of an earlier result: nothing is encoded again. The batch
            is the longer text then, without images; what the cache has of another text behind
            their common beginning is dropped from it. An empty ``DynamicCache`` is filled, and is
            that of the result then.
            Besides ``text_keys``, of families with keys of images beside the text: ``"sharded"``:
            the prompt runs split, and a rank keeps K and V of its own part of the text;
            ``"whole"``: every rank has those of all; ``"auto"``, the default: sharded where the
            prompt can be split and the whole takes more than ``SHARDED_BYTES`` of
            `ds_lvx.models.generating.limits`. With ``past_key_values`` the first call's.

    Returns:
        What transformers returns, the same on every rank. Random numbers are those of the group's
        first rank; the generators of other ranks stay as they are, unless they were as that one's:
        then they go on together. ``past_key_values`` of the result holds the text, and this rank's
        visual keys beside it, for as long as the caller keeps it.

    Raises:
        ValueError: on all ranks, naming the rank that is wrong: a model that is not patched, what
            `ds_lvx.shard_batch` refuses of a batch, arguments that differ, no room for new tokens,
            a cache that is not of this model or goes with another text, another ``text_keys``.
        NotImplementedError: a family that cannot generate, or not with this ``text_keys``, no cache
            or another one than transformers' ``DynamicCache``, assisted decoding, weights of
            attention; where visual tokens stand among the text, or with ``text_keys="sharded"``,
            also states of layers, and of a model with an encoder these and ``past_key_values``.
        RuntimeError: on all ranks: they chose different tokens; names the token. Or another rank
            failed between two tokens; under ZeRO-3, whose ranks run every forward together, only
            the end of that rank's process tells them.
        RankOutOfMemoryError: names this rank and the size, as in an engine's calls.

    Collectives: two agreements of 2 KiB a rank on the control plane (the first may be longer). For
    each forward and cross-attention layer an all-gather of ``(n-1) R H (4 D + 4)`` bytes a rank,
    for R queries (those of the prompt, then one a row); of queries whose parts together are more
    than 1 MiB an all-gather of ``(n-1) R H 4`` and an all-reduce of ``R H D`` fp32. A token's
    first message carries ``8 (R + 1)`` bytes more, by which the ranks compare their tokens, and one
    message like it ends the generation. A prompt that is split (``SPLIT_TOKENS`` of
    `ds_lvx.models.generating.limits`) has those of a forward of training, then an all-gather of K
    and V of the text for each of its layers, and one of logits; where these keys stay sharded, and
    with visual tokens among the text, that of logits alone, and then a message as above for each
    layer of the text and token, too. So has a text of this length behind ``past_key_values``, whose
    layers all attend by `ds_lvx.lv_xattn`, schedule ``gather``. ZeRO-3 adds its own.
    """
    with _ending(kwargs.get("streamer"), first=resolve(groups).rank == 0):
        return _generate(model, batch, groups=groups, frames=frames, kwargs=kwargs)


def _generate(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    groups: SequenceParallelGroups | None,
    frames: str,
    kwargs: dict[str, Any],
) -> Any:
    """See `generate`."""
    channel = resolve(groups)
    current = SequenceParallelGroups.current() if groups is None else groups
    (family, inside), content, records = _agreed(
        model, batch, channel=channel, current=current, frames=frames, kwargs=kwargs
    )
    waits = is_partitioned(inside)
    try:
        with named("ds_lvx.generate", groups), HOST:
            text, prompt = content.prompt(
                records,
                family=family,
                model=inside,
                channel=channel,
                always_vision=waits,
                text_keys=kwargs.pop(arguments.TEXT_KEYS_WORD, AUTO),
            )
    except Exception as caught:
        with suppress(Exception):  # it would name the ranks once more
            channel.agree({}, caught)  # where the others agree on the rows of the prompt
        raise
    if current is not None and current.dp_size > 1:
        prompt = replace(prompt, world=current.world_channel)
    runner, decoding = family.generator(inside), Decoding(prompt)
    if has_encoder(runner):
        text |= beside_decoder(batch, prompt.device)
    del content, prompt  # pixels, which nobody needs once they are encoded
    if channel.rank > 0:
        kwargs["streamer"] = None
    if kwargs.get("generation_config") is None:
        kwargs["use_cache"] = True  # some models' own settings say no
    with (
        named("ds_lvx.generate", groups),
        _evaluating(inside),
        _random_numbers_of(records[0], inside),
        feeding(runner, decoding),
    ):
        try:
            result = runner.generate(**text, **{"synced_gpus": waits, **kwargs})
        except Exception as caught:
            decoding.fail(caught, waits=waits)
            if decoding.is_between:  # the caller's cache has the text whose forward is over
                leave(kwargs.get("past_key_values"), inside, decoding, text["input_ids"])
            raise
        sequences = result if isinstance(result, Tensor) else result.sequences
        leave(_filled(kwargs, result), inside, decoding, sequences)
    decoding.finish(sequences)
    return result


def _agreed(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    channel: Channel,
    current: SequenceParallelGroups | None,
    frames: str,
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Family, Any], Fresh | Continued, Sequence[Mapping[str, Any]]]:
    """Family and model, this rank's part of the batch, and what all ranks said of it."""
    found, content, record, error = None, None, {}, None
    try:
        found = family, inside = _patched(model)
        arguments.check(family, family.generator(inside), kwargs)
        if _goes_on(kwargs):
            _check_replicas(current, inside)
        with HOST:
            content = _content(family, inside, batch, channel=channel, frames=frames, kwargs=kwargs)
            record = content.record()
        record |= _record(family, inside, kwargs, first=channel.rank == 0)
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as caught:  # noqa: BLE001
        error = caught
    records = channel.agree(record, error)
    assert found is not None
    assert content is not None
    same = (arguments.ARGUMENTS, arguments.OWN_SETTINGS, *content.shared_record())
    require_same(records, same, what="ds_lvx.generate")
    return found, content, records


def _patched(model: Any) -> tuple[Family, Any]:
    """The family of a model, and the model itself inside its wrappers."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"got a model of type {type(model).__name__}; expected a torch.nn.Module that "
            "ds_lvx.apply has patched, or the engine of ds_lvx.initialize"
        )
    family, inside = family_of(model)
    if not is_prepared(inside):
        raise ValueError(
            "got a model that ds_lvx has not patched; call ds_lvx.apply(model, config) or "
            "ds_lvx.initialize first"
        )
    return family, inside


def _content(
    family: Family,
    model: Any,
    batch: Any,
    *,
    channel: Channel,
    frames: str,
    kwargs: Mapping[str, Any],
) -> Fresh | Continued:
    """This rank's part of the batch, or what goes on from the cache that came with it."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"got a batch of type {type(batch).__name__}; expected what the processor returns"
        )
    runner = family.generator(model)
    if has_encoder(runner):
        batch = started(batch, partial(arguments.setting_of, runner, kwargs))
    else:
        batch = arguments.with_mask(runner, kwargs, batch)
    if _goes_on(kwargs):
        cache = kwargs["past_key_values"]
        return Continued.of(batch, cache, family=family, model=model, channel=channel)
    place, whole = (channel.rank, channel.size), kwargs.get(arguments.TEXT_KEYS_WORD) != SHARDED
    draft = Draft.of(family, batch, model, place=place, frames=frames, whole_text=whole, apart=True)
    content = draft.checked()
    if content.text.shape[0] == 0:
        raise ValueError(
            f"got input_ids {content.text.shape}; expected a sample at least, with its images"
        )
    return Fresh(content)


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    """Whether a cache came with the batch that has some of its text; an empty one is filled."""
    cache = kwargs.get("past_key_values")
    return cache is not None and not is_fresh(cache)


def _filled(kwargs: Mapping[str, Any], result: Any) -> Any:
    """The cache that transformers filled: the caller's, or one that it made."""
    given = kwargs.get("past_key_values")
    return getattr(result, "past_key_values", None) if given is None else given


def _check_replicas(groups: SequenceParallelGroups | None, model: nn.Module) -> None:
    """A replica that encodes nothing leaves those alone that do, in ZeRO-3's collectives."""
    if groups is not None and groups.dp_size > 1 and is_partitioned(model):
        raise NotImplementedError(
            f"got past_key_values under ZeRO-3 with {groups.dp_size} replicas, which run the same "
            "forwards; expected one replica, or a lower stage: leave it out"
        )


def _record(
    family: Family, model: Any, kwargs: Mapping[str, Any], *, first: bool
) -> dict[str, Any]:
    """What the other ranks must know beside the batch."""
    runner = family.generator(model)
    record = arguments.described(runner, kwargs)
    if first and arguments.setting_of(runner, kwargs, "do_sample"):
        record[_RANDOM] = _Generator(model).packed()
    return record


# --------------------------------------------------------------------------------------------
# Surroundings


@contextmanager
def _ending(streamer: Any, *, first: bool) -> Iterator[None]:
    """End a streamer where transformers does not: another thread may wait for what comes from it.

    Args:
        streamer: the caller's, or None.
        first: it is used; else it gets its end alone, but for one that would print that.
    """
    done = False
    try:
        yield
        done = first
    finally:
        prints = isinstance(streamer, TextStreamer) and not isinstance(
            streamer, TextIteratorStreamer | AsyncTextIteratorStreamer
        )
        if streamer is not None and not done and (first or not prints):
            with suppress(Exception):
                streamer.end()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode: no dropout, and no checkpoints, which drop the cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Generator:
    """The random generator that chooses tokens: that of the device where the model computes."""

    def __init__(self, model: nn.Module) -> None:
        device = device_of(model)
        on_cpu = device.type == "cpu"
        self._module: Any = torch if on_cpu else torch.get_device_module(device)
        self._which: dict[str, Any] = {} if on_cpu else {"device": device}

    def state(self) -> Tensor:
        """A copy of it, uint8 on the CPU."""
        state: Tensor = self._module.get_rng_state(**self._which)
        return state

    def restore(self, state: Tensor) -> None:
        """Set it."""
        self._module.set_rng_state(state, **self._which)

    def packed(self) -> str:
        """The state for a record."""
        return base64.b85encode(self.state().numpy().tobytes()).decode()


@contextmanager
def _random_numbers_of(record: Mapping[str, Any], model: nn.Module) -> Iterator[None]:
    """Random numbers of the rank whose record it is, where it says any."""
    if _RANDOM not in record:
        yield
        return
    generator = _Generator(model)
    own = generator.state()
    theirs = torch.frombuffer(bytearray(base64.b85decode(record[_RANDOM])), dtype=torch.uint8)
    generator.restore(theirs)
    try:
        yield
    finally:
        if not torch.equal(own, theirs):
            generator.restore(own)
