"""Llama-3.2-Vision (mllama): which modules are patched, and what their forwards do.

The text model alternates self-attention layers over the text and cross-attention layers from the
text to all visual tokens. Both run on this rank's shards; the vision tower runs as it is, on this
rank's images. Shapes: ``B`` samples, ``s`` text tokens and ``s_kv`` visual tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import (
    MllamaForConditionalGeneration,
    MllamaTextCrossAttention,
    MllamaTextSelfAttention,
    MllamaVisionAttention,
    apply_rotary_pos_emb,
)

from ds_lvx.attention.features import share
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models.attend import attend
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.layers import Kind, Layer, make_plans
from ds_lvx.models.mllama import features
from ds_lvx.models.mllama.batch import shard
from ds_lvx.models.mllama.mask import visible_images
from ds_lvx.models.patch import KEYWORD, Hook, Patch, ShardedForward, is_patched

__all__ = ["attention_layers", "encoders", "find", "patch", "shard", "visible_images"]

_KINDS: dict[type[nn.Module], Kind] = {
    MllamaTextCrossAttention: "cross",
    MllamaTextSelfAttention: "self",
    MllamaVisionAttention: "local",
}


def find(model: nn.Module) -> MllamaForConditionalGeneration | None:
    """The mllama inside a model: itself, or inside peft's or DeepSpeed's wrappers."""
    inside = (m for m in model.modules() if isinstance(m, MllamaForConditionalGeneration))
    return next(inside, None)


def attention_layers(model: MllamaForConditionalGeneration) -> list[Layer]:
    """Every attention module of the model, in order."""
    return list(_layers(model))


def _layers(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        for module_type, kind in _KINDS.items():
            if isinstance(module, module_type):
                yield _layer(name, kind, module)


def _layer(name: str, kind: Kind, module: Any) -> Layer:
    heads = int(module.num_heads)
    kv_heads = int(getattr(module, "num_key_value_heads", heads))
    return Layer(name, kind, module, heads, kv_heads, int(module.head_dim))


def encoders(model: MllamaForConditionalGeneration) -> list[nn.Module]:
    """The two encoders of the vision tower."""
    tower = model.model.vision_model
    return [tower.transformer, tower.global_transformer]


def patch(
    model: MllamaForConditionalGeneration,
    config: LVXConfig,
    groups: SequenceParallelGroups,
) -> Patch:
    """Make this instance's attention run as the config says; see `ds_lvx.models.patch_model`."""
    if is_patched(model):
        raise ValueError(
            "got a model that ds_lvx has patched already; call ds_lvx.shutdown(engine) on the "
            "engine that uses it before a second ds_lvx.initialize"
        )
    _check_rope(model, groups.sp_size)
    layers = attention_layers(model)
    plans = make_plans(layers, config, sp_size=groups.sp_size)
    for layer, plan in zip(layers, plans, strict=True):
        if layer.kind == "cross":
            _CrossAttention(layer.module, plan).install()
        elif layer.kind == "self":
            _SelfAttention(layer.module, plan).install()
    hook = _PrepareText(groups.sp_size)
    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    features.install(model, offloads=any(plan.features == "offload" for plan in plans))
    return Patch(model, layers, plans)


def _check_rope(model: MllamaForConditionalGeneration, sp_size: int) -> None:
    rope = model.model.language_model.rotary_emb.rope_type
    if sp_size > 1 and ("dynamic" in rope or rope == "longrope"):
        raise NotImplementedError(
            f'got rope_type "{rope}", whose frequencies depend on the longest position that a '
            'rank sees; expected "default", "linear", "yarn" or "llama3", or '
            "sequence_parallel_size 1"
        )


class _PrepareText(Hook):
    """A forward pre-hook of the language model: hands it the masks of a sharded batch."""

    def __init__(self, sp_size: int) -> None:
        self.sp_size = sp_size

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        batch: ShardedBatch | None = kwargs.get(KEYWORD)
        if batch is None:
            if self.sp_size > 1:
                raise ValueError(
                    f"got a batch that is not sharded over the {self.sp_size} ranks of the "
                    "sequence-parallel group; call model(**ds_lvx.shard_batch(batch, model=model))"
                )
            return None
        if batch.channel.size != self.sp_size:
            raise ValueError(
                f"got a batch sharded over {batch.channel.size} ranks for a model that shares its "
                f"batches between {self.sp_size}; pass shard_batch the groups of this model's "
                "engine: groups=engine.ds_lvx.groups"
            )
        _check_arguments(batch, kwargs)
        states, row_mask = kwargs.get("cross_attention_states"), batch.row_mask
        if states is not None and batch.kv_lengths is not None:
            batch_size = kwargs["input_ids"].shape[0]
            states = _by_sample(states, batch_size, batch.kv_lengths[batch.channel.rank])
            states, gradient = share(states)
            batch = replace(batch, features_gradient=gradient)
            row_mask = None if row_mask is None else row_mask.to(states.dtype)
        prepared = {
            KEYWORD: batch,
            "cross_attention_states": states,
            "full_text_row_masked_out_mask": row_mask,
            # Four dimensions stop transformers from building a mask of [s, s]; nobody reads it.
            "attention_mask": kwargs["input_ids"].new_zeros(1, 1, 1, 1),
            "use_cache": False,
        }
        return args, {**kwargs, **prepared}


def _check_arguments(batch: ShardedBatch, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise NotImplementedError(
            "got past_key_values or use_cache=True with a sharded batch; a cache of sharded keys "
            "does not exist: pass use_cache=False, as ds_lvx.shard_batch does"
        )
    ids = kwargs.get("input_ids")
    expected = batch.text_lengths[batch.channel.rank]
    if ids is None or ids.shape[1] != expected:
        got = "none" if ids is None else f"{ids.shape[1]} tokens"
        raise ValueError(
            f"got input_ids with {got}; expected the {expected} tokens of this rank's shard: pass "
            "what ds_lvx.shard_batch returned as it is"
        )
    if (kwargs.get("cross_attention_states") is None) != (batch.kv_lengths is None):
        raise ValueError(
            "got the visual input of another batch than the one that was sharded; pass what "
            "ds_lvx.shard_batch returned as it is"
        )


def _by_sample(states: Tensor, batch_size: int, length: int) -> Tensor:
    """Visual features as ``[B, s_kv, hidden]``; those of a blank frame are cut to nothing."""
    if length == 0:
        return states.reshape(1, -1, states.shape[-1])[:, :0].expand(batch_size, -1, -1)
    states = states.reshape(batch_size, -1, states.shape[-1])
    if states.shape[1] != length:
        raise ValueError(
            f"got {states.shape[1]} visual tokens a sample; expected the {length} of this rank's "
            "shard: pass what ds_lvx.shard_batch returned as it is"
        )
    return states


class _CrossAttention(ShardedForward):
    """`MllamaTextCrossAttention` with this rank's text and this rank's images."""

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        *,
        cross_attention_states: Tensor,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        module: Any = self.module
        _refuse_dropout(module)
        projected = _heads(module.q_proj(hidden_states), module.head_dim)
        # Under autocast the norm's fp32 weight widens q; SDPA would have narrowed it again.
        q = module.q_norm(projected).to(projected.dtype)

        def project_kv(features: Tensor) -> tuple[Tensor, Tensor]:
            # Looked up at every call: LoRA and ZeRO-3 act on the modules' own calls.
            k = _heads(module.k_proj(features), module.head_dim)
            return module.k_norm(k).to(k.dtype), _heads(module.v_proj(features), module.head_dim)

        out = attend(
            self.plan,
            batch,
            q,
            features=cross_attention_states,
            project_kv=project_kv,
            trains=_trains(module.k_proj, module.v_proj, module.k_norm),
            kv_heads=module.num_key_value_heads,
            scale=module.scaling,
        )
        return module.o_proj(out.flatten(2)), None


class _SelfAttention(ShardedForward):
    """`MllamaTextSelfAttention` over the whole text, from this rank's part of it."""

    def sharded(
        self,
        batch: ShardedBatch,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        module: Any = self.module
        _refuse_dropout(module)
        cos, sin = position_embeddings
        q = _rotate(_heads(module.q_proj(hidden_states), module.head_dim), cos, sin)

        def project_kv(features: Tensor) -> tuple[Tensor, Tensor]:
            k = _heads(module.k_proj(features), module.head_dim)
            return _rotate(k, cos, sin), _heads(module.v_proj(features), module.head_dim)

        out = attend(
            self.plan,
            batch,
            q,
            features=hidden_states,
            project_kv=project_kv,
            trains=_trains(module.k_proj, module.v_proj),
            kv_heads=module.num_key_value_heads,
            scale=module.scaling,
        )
        return module.o_proj(out.flatten(2)), None


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, s, H * D]`` -> ``[B, s, H, D]``."""
    return x.unflatten(2, (x.shape[2] // head_dim, head_dim))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, s, H, D]``, in x's dtype."""
    rotated, _ = apply_rotary_pos_emb(x, x[:, :, :0], cos, sin, unsqueeze_dim=2)
    return rotated.to(x.dtype)


def _trains(*modules: nn.Module) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def _refuse_dropout(module: Any) -> None:
    if module.training and module.dropout > 0:
        raise NotImplementedError(
            f"got attention dropout {module.dropout} while training; the sharded attention has "
            "none: set text_config.dropout to 0"
        )
