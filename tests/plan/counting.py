"""Counting what a real mllama saves for backward, and what is alive at the worst moment."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_lvx.compare.case import Case, build_model, ds_config, make_batch
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.plan.memory import Setting
from ds_lvx.sharding import shard_batch
from tests.models.mllama_case import with_lora

TINY = Case(
    hidden=48,
    heads=4,
    kv_heads=2,
    cross_layers=3,
    mlp=8,
    vocabulary=16,
    text_tokens=12,
    vision_hidden=8,
    vision_mlp=8,
    image_size=2,
    trains="cross",
)


class SavedBytes:
    """Counts, for every layer of a name, what autograd saves in its forward.

    Attributes:
        of_layers: bytes of each, without weights and without the features.
        features: bytes of the features, if any layer saved them.
    """

    def __init__(self, model: nn.Module, layers: str = "cross_attn") -> None:
        self.of_layers: list[int] = []
        self.features = 0
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._context: Any = None
        self._found: dict[int, int] = {}
        for name, module in model.named_modules():
            if name.endswith(layers):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, with_kwargs=True)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._found = {}
        self._context = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._context.__enter__()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _end(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        self._context.__exit__(None, None, None)
        if (features := kwargs.get("cross_attention_states")) is not None:
            place = features.untyped_storage().data_ptr()
            self.features = max(self.features, self._found.pop(place, 0))
        self.of_layers.append(sum(self._found.values()))


def saved_bytes(
    setting: Setting, *, frames: int, dtype: torch.dtype, lora: bool = False
) -> tuple[int, list[int]]:
    """Bytes that this rank saves: of the features, and of each layer. Runs on every rank."""
    model, groups = _patched(setting, TINY, dtype, lora=lora)
    counted = SavedBytes(model)
    batch = make_batch(TINY, frames=range(frames), total=frames * groups.sp_size)
    out = model(**shard_batch(batch, model=model, groups=groups, frames="local"))
    out.loss.backward()
    groups.close()
    return counted.features, counted.of_layers


def peak_bytes(setting: Setting, case: Case, *, keys: int) -> int:
    """The most bytes of tensors alive in a step over given features. Runs on one rank."""
    model, groups = _patched(setting, case, torch.bfloat16)
    features = torch.randn(1, keys, case.hidden).bfloat16()
    features.requires_grad_(case.features == "trained")
    whole = make_batch(case, frames=range(1), total=1)
    batch = {key: whole[key] for key in ("input_ids", "labels")}
    shard = shard_batch({**batch, "cross_attention_states": features}, model=model, groups=groups)
    with LiveBytes() as live:
        model(**shard).loss.backward()
    groups.close()
    return live.peak + features.nbytes


def _patched(
    setting: Setting, case: Case, dtype: torch.dtype, *, lora: bool = False
) -> tuple[Any, Any]:
    ranks = torch.distributed.get_world_size()
    model = build_model(case)
    model = (with_lora(model) if lora else model).to(dtype)
    config = LVXConfig.from_ds_config(ds_config(setting, case, ranks=ranks))
    groups = SequenceParallelGroups(ranks)
    patch_model(model, config, groups)
    return model, groups


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators have made and that are still there.

    Attributes:
        now: those that are there.
        peak: the most there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = {id(t.untyped_storage()) for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in made:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._live or key in given:
                continue
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key)
