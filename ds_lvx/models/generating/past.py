"""What a cache of ``ds_lvx.generate`` holds beside the text, so that a later call goes on from it.

transformers' way: the ``past_key_values`` that one call returned go into the next, with the longer
text. Keys of images stay where they are, and nothing is encoded again. Shapes: ``B`` samples, ``T``
tokens of the first prompt, ``t`` of the text so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ds_lvx.distributed.channel import Channel
from ds_lvx.models.batch import device_of, move
from ds_lvx.models.contract import Family
from ds_lvx.models.decoding_keys import LayerKey
from ds_lvx.models.generating.decoding import Decoding
from ds_lvx.models.generating.limits import splits
from ds_lvx.models.generating.prompt import Prompt
from ds_lvx.models.generating.text_keys import BESIDE, has_states, tokens_of
from ds_lvx.models.text import Text, digest

_MEDIA_TOKENS = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("media_token_id", "IMAGE_PATCH_TOKEN_ID"),
)


@dataclass(frozen=True, eq=False)
class Past:
    """What goes with a cache; copies of the cache share it.

    Attributes:
        model: whose keys these are.
        prompt: the first prompt.
        keys, stand_in: of its `DecodingKeys`.
        tokens: int64 ``[B, t]`` on the CPU, the text that the cache is of.
        states_behind: of how many tokens the states are that layers have in the cache; -1: not
            known, as where a forward failed.
    """

    model: ref[nn.Module]
    prompt: Prompt
    keys: Mapping[LayerKey, tuple[Tensor, Tensor]]
    stand_in: Tensor | None
    tokens: Tensor
    states_behind: int = -1

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @property
    def settled(self) -> int:
        """How many tokens of the text have to be kept: those behind see what the last one sees."""
        if self.prompt.among:
            assert self.prompt.text is not None, "its keys are sharded"
            return self.prompt.text.pieces[0].tokens
        rule, least = self.prompt.rule, 1
        rows = [self.prompt.row_mask]
        rows += [] if rule is None else [rule.q_start, rule.q_end]
        for row in rows:
            if row is not None:
                differ = (row != row[:, -1:]).any(dim=0).nonzero()
                least = max([least, *(int(place) + 2 for place in differ[-1:])])
        return least

    def until(self, tokens: int) -> Self:
        """The same of the first tokens alone, which are enough."""
        prompt, keys = self.prompt.until(tokens), self.keys
        if prompt.text is not None:
            held = prompt.text.lengths[prompt.channel.rank]
            keys = {
                key: (k[:, :held], v[:, :held]) if key[0] == "self" else (k, v)
                for key, (k, v) in keys.items()
            }
        return replace(self, prompt=prompt, keys=keys, tokens=self.tokens[:, :tokens])


def is_fresh(cache: Any) -> bool:
    """Whether a cache holds nothing yet, and is what transformers would make itself."""
    return (
        type(cache) is DynamicCache
        and not hasattr(cache, BESIDE)
        and not cache.offloading
        and cache.get_seq_length() == 0
    )


def leave(cache: Any, model: nn.Module, decoding: Decoding, sequences: Tensor) -> None:
    """Leave on a cache what goes with it.

    Nothing is left where rows of a sample share its keys: transformers goes on from no such cache.

    Args:
        cache: transformers' own, or None.
        model: whose it is.
        decoding: that filled it.
        sequences: ``[B, tokens]``, what was returned.
    """
    found = decoding.kept()
    if cache is not None and found is not None:
        prompt, keys, stand_in = found
        text = sequences.cpu()[:, : cache.get_seq_length()]
        behind = cache.get_seq_length()
        setattr(cache, BESIDE, Past(ref(model), prompt, keys, stand_in, text, behind))


@dataclass(frozen=True, eq=False)
class Continued:
    """A batch that goes on from a cache: in place of what is drafted of one that begins.

    Attributes:
        past: what goes with the cache.
        cache: transformers' own.
        text: the whole text, as the caller gave it.
        common: tokens at its beginning of which the cache is used.
    """

    past: Past
    cache: Any
    text: Text
    common: int

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        cache: Any,
        *,
        family: Family,
        model: nn.Module,
        channel: Channel,
    ) -> Self:
        """Look at a batch and the cache that was given with it.

        Raises:
            ValueError: a cache that no `ds_lvx.generate` of this model returned; images in the
                batch; another text.
        """
        past = getattr(cache, BESIDE, None)
        if not isinstance(past, Past):
            raise ValueError(
                f"got past_key_values of type {type(cache).__name__} without sharded keys; "
                "expected those that ds_lvx.generate(..., return_dict_in_generate=True) returned, "
                "of one sequence a sample, or an empty DynamicCache() to be filled: leave it out, "
                "and the whole batch is encoded"
            )
        if past.model() is not model or past.prompt.channel is not channel:
            raise ValueError(
                "got past_key_values of another model or of other groups; expected those of this "
                "one since the last ds_lvx.apply or ds_lvx.initialize: leave it out"
            )
        images = [key for key in family.keys if batch.get(key) is not None]
        if images:
            raise ValueError(
                f"got {', '.join(images)} beside past_key_values, which has the images already; "
                "expected the text alone: pass input_ids and attention_mask"
            )
        text = Text.of(batch)
        return cls(past, cache, text, _common(past, cache, text, media_tokens(model)))

    def record(self) -> dict[str, Any]:
        """What the other ranks of the group have to know of it, JSON."""
        return self.shared_record()

    def shared_record(self) -> dict[str, Any]:
        """What must be the same on every rank of the group."""
        return {
            "shape of input_ids": list(self.text.shape),
            "contents of the text (a checksum)": self.text.digest(),
            "tokens of past_key_values": self.cache.get_seq_length(),
            "the text of past_key_values (a checksum)": digest(self.past.tokens),
        }

    def prompt(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        family: Family,
        model: Any,
        channel: Channel,
        **_of_images: Any,
    ) -> tuple[dict[str, Tensor], Prompt]:
        """The whole text on the model's device, and what generation goes on with; crops the cache.

        Args:
            records: of all ranks.
            family, model: that generates.
            channel: the sequence-parallel group.
        """
        device, length = device_of(model), self.text.shape[1]
        _crop(self.cache, self.common)
        if self.common != self.past.states_behind:
            _go_back(self.cache, self.past.keys, model)
        given = self.text.named
        positions = self.past.prompt.positions
        if positions is not None:
            known = positions[..., : min(self.common, positions.shape[-1])]
            more = torch.arange(1, length - known.shape[-1] + 1, dtype=known.dtype, device="cpu")
            mask = self.text.attention_mask
            if self.past.prompt.among and mask is not None:  # padding takes no place
                more = mask[:, known.shape[-1] :].cpu().to(known.dtype).cumsum(dim=1)
            given["position_ids"] = torch.cat((known, known[..., -1:] + more), dim=-1)
        # What fails on the way leaves a cache that goes with no more than this.
        past = self.past.until(self.common)
        setattr(self.cache, BESIDE, replace(past, states_behind=-1))
        mask, first = self.text.attention_mask, past.prompt
        sharded = first.text is not None
        prompt = replace(
            first.behind(length - self.common),
            kept=(first, past.keys, past.stand_in),
            gaps=sharded and mask is not None and not bool(mask[:, first.shape[1] :].all()),
        )
        if (family.splits_prompt or first.among) and splits(prompt.shape[1], channel.size):
            prompt = prompt.split_behind(self.common, mask)
        return {k: move(v, device) for k, v in given.items() if v is not None}, prompt


def _common(past: Past, cache: Any, text: Text, media_tokens: Sequence[int]) -> int:
    """How many tokens at the beginning of the text the cache serves for; of layers with a state all
    that it has, or those of the first prompt.

    Raises:
        ValueError: the text leaves the cache's before its last image, or has further images.
    """
    ids, known = text.input_ids.cpu(), past.tokens[:, : cache.get_seq_length()]
    common = min(known.shape[1], ids.shape[1] - 1)
    if len(ids) == len(known):
        differ = (ids[:, :common] != known[:, :common]).any(dim=0).nonzero()
        common = min([common, *(int(place) for place in differ[:1])])
    if len(ids) != len(known) or common < past.settled:
        raise ValueError(
            f"got a text {list(ids.shape)} that goes with past_key_values of {list(known.shape)} "
            f"for {common if len(ids) == len(known) else 0} tokens; expected the same samples, and "
            f"the same text for {past.settled} tokens at least, to behind the last image: leave "
            "past_key_values out, and the whole batch is encoded"
        )
    if bool(
        torch.isin(ids[:, common:], torch.tensor(media_tokens, dtype=ids.dtype, device="cpu")).any()
    ):
        raise ValueError(
            "got an image in the text behind that of past_key_values; expected all images in the "
            "first call: leave past_key_values out, and the whole batch is encoded"
        )
    # A state does not go back but to where one was kept.
    return past.settled if has_states(cache) and common != past.states_behind else common


def media_tokens(model: Any) -> list[int]:
    """Where the model says which tokens stand for an image or a video."""
    config = getattr(model, "config", None)
    found = [getattr(owner, name, None) for owner in (config, model) for name in _MEDIA_TOKENS]
    visual = getattr(config, "visual", None)  # a dictionary, of Qwen's first
    found += [visual.get("image_start_id")] if isinstance(visual, dict) else []
    return [each for each in found if isinstance(each, int)]


def _crop(cache: Any, tokens: int) -> None:
    """Keep the first tokens of what a text attends to. transformers 5.17 itself cannot where a
    layer, such as one of cross-attention, has no keys of text. A forward that failed has left more
    in some layers than in others."""
    for layer in cache.layers:
        surplus = tokens_of(layer) - tokens
        if surplus > 0:
            layer.crop(-surplus)


def _go_back(cache: Any, keys: Mapping[LayerKey, tuple[Tensor, Tensor]], model: Any) -> None:
    """Give layers that carry a state the one behind the first prompt again."""
    for (kind, name), (mixed, memory) in keys.items():
        if kind == "recurrent":
            layer = cache.layers[model.get_submodule(name).layer_idx]
            layer.conv_states[0].copy_(mixed)
            layer.recurrent_states[0].copy_(memory)
