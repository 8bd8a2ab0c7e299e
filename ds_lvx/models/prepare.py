"""Patching a model of any family, and what its text model gets of a sharded batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ds_lvx.attention.features import share
from ds_lvx.config import LVXConfig
from ds_lvx.config.ds_config import SECTION
from ds_lvx.config.registry import AUTO
from ds_lvx.config.words import in_ranks
from ds_lvx.kernels.warn import warn_once
from ds_lvx.models.batch import ShardedBatch
from ds_lvx.models.contract import Family
from ds_lvx.models.layers import LayerPlan, make_plans
from ds_lvx.models.patch import KEYWORD, Hook, Patch, is_prepared
from ds_lvx.models.tiled_loss import install


def patch(family: Family, model: Any, config: LVXConfig, *, sp_size: int) -> Patch:
    """Make this instance's attention run as the config says; see `ds_lvx.models.patch_model`."""
    if is_prepared(model):
        raise ValueError(
            "got a model that ds_lvx has patched already; call ds_lvx.shutdown(engine) on the "
            "engine that uses it before a second ds_lvx.initialize"
        )
    family.check(model, sp_size=sp_size)
    if config.share_prefixes and not family.shares_prefixes:
        raise NotImplementedError(
            f"{SECTION}.share_prefixes: got true for a {type(model).__name__}; expected false: "
            "this model does not take rows that begin alike as one"
        )
    layers = family.attention_layers(model)
    plans = make_plans(layers, config, sp_size=sp_size)
    attentions = [
        family.forward(layer, plan)
        for layer, plan in zip(layers, plans, strict=True)
        if layer.kind != "local"
    ]
    made = Patch(model, layers, plans)
    _save_by_own_names(model)
    try:
        for attention in attentions:
            attention.ranks = sp_size
            attention.install()
        hook = PrepareText(
            family,
            sp_size,
            chunked=[plan.kind for plan in plans if plan.chunk_tokens()],
            zigzag=deals_zigzag(plans, config.text_order) and family.zigzag,
            shares_prefixes=config.share_prefixes,
        )
        family.text_model(model).register_forward_pre_hook(hook, with_kwargs=True)
        # Before what a family puts in the place of the loss function, and undone after it.
        tiled = install(model, config.loss_tiles) if config.loss_tiles > 1 else None
        try:
            family.install(model, plans)
        finally:  # of a model that the family refuses, too
            if tiled is not None:
                model.register_forward_pre_hook(tiled, with_kwargs=True)
    except BaseException:
        made.unpatch()  # whoever hears of it may try another config on the same model
        raise
    return made


def _save_by_own_names(model: nn.Module) -> None:
    """Forget renamings of checkpoints that no weight of this one needed: transformers 5.23, where
    it loads for ZeRO-3, keeps them all, and saves under names of older versions."""
    module: Any
    for module in model.modules():
        kept = vars(module).get("_weight_conversions")
        if kept:
            module._weight_conversions = [each for each in kept if each.was_used()]


def deals_zigzag(plans: Sequence[LayerPlan], text_order: str) -> bool:
    """Whether the ranks get an early and a late piece of the text each, not one run.

    Args:
        plans: of all attention layers.
        text_order: as `ds_lvx.config.LVXConfig` has it.
    """
    if text_order != AUTO:
        return text_order == "zigzag"
    uneven = ("ring", "lvx", "hybrid")  # in runs of a causal text
    return any(plan.kind == "self" and plan.method in uneven for plan in plans)


class PrepareText(Hook):
    """A forward pre-hook of the text model: checks a sharded batch and hands it what it misses.

    Attributes:
        zigzag: how the batches' text is to be cut.
        shares_prefixes: rows of it that begin alike are to be one.
    """

    def __init__(
        self,
        family: Family,
        sp_size: int,
        *,
        chunked: Collection[str] = (),
        zigzag: bool = False,
        shares_prefixes: bool = False,
    ) -> None:
        self.family = family
        self.sp_size = sp_size
        self.zigzag = zigzag
        self.shares_prefixes = shares_prefixes
        self.chunked = sorted({*chunked})  # kinds of layers that project in chunks

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
                f"got a batch sharded over {in_ranks(batch.channel.size)} for a model that shares "
                f"its batches between {self.sp_size}; pass shard_batch the groups of this model's "
                "engine: groups=engine.ds_lvx.groups"
            )
        key = self.family.features_key
        features = kwargs.get(key)
        if batch.decoding is not None:
            prepared = {**kwargs, KEYWORD: batch}
            if key:
                prepared[key] = _kept(batch, features)
            if batch.shards("self"):
                more = self.family.prepare(batch, prepared)
                return args, {**prepared, **more, "use_cache": True}
            return args, {**prepared, **self.family.decode(batch, prepared)}
        text = _check_arguments(batch, kwargs, features)
        if features is not None and batch.kv_lengths is not None:
            length = batch.kv_lengths[batch.channel.rank]
            features, gradient = share(_by_sample(features, text.shape[0], length))
            batch = replace(batch, features_gradient=gradient)
        self._tell_other_groups(batch, module)
        prepared = {**kwargs, KEYWORD: batch}
        if key:
            prepared[key] = features
        return args, {**prepared, **self.family.prepare(batch, prepared)}

    def _tell_other_groups(self, batch: ShardedBatch, module: nn.Module) -> None:
        """Let the chunks of a projection be as many in all groups as where they are the most.

        ZeRO-3 gathers the projection's weights from all ranks for each of them.

        Collectives: one agreement of all ranks on the control plane, where layers project in chunks
        under ZeRO-3 and there are other groups.
        """
        if not self.chunked or batch.world is None:
            return
        if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            return
        layouts = {kind: batch.layout(kind) for kind in self.chunked}
        most = {kind: max(layout.kv_lengths) for kind, layout in layouts.items()}
        records = batch.world.agree(most)
        for kind, layout in layouts.items():
            layout.elsewhere = max(record[kind] for record in records)


def zigzags(family: Family, model: nn.Module) -> bool:
    """Whether an early and a late piece of the text go to each rank, as `PrepareText` has it.

    A model without one attends to its own shard alone: rank 0 warns, once.
    """
    found = _prepares(family, model)
    if found is None:
        warn_once(
            f"shard_batch: got a {type(model).__name__} that ds_lvx has not patched, or not any "
            "more; it will attend to each rank's shard alone. Call ds_lvx.initialize (not "
            "deepspeed.initialize) or ds_lvx.apply first"
        )
    return found is not None and found.zigzag


def shares_prefixes(family: Family, model: Any) -> bool:
    """Whether rows of a batch that begin alike are to be one; of a config alone, False."""
    found = _prepares(family, model) if isinstance(model, nn.Module) else None
    return found is not None and found.shares_prefixes


def _prepares(family: Family, model: nn.Module) -> PrepareText | None:
    hooks = family.text_model(model)._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, PrepareText)), None)


def _check_arguments(
    batch: ShardedBatch, kwargs: Mapping[str, Any], features: Tensor | None
) -> Tensor:
    """The text, ``[B, s]`` or embedded ``[B, s, hidden]``."""
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise NotImplementedError(
            "got past_key_values or use_cache=True with a sharded batch; a cache of sharded keys "
            "does not exist: pass use_cache=False, as ds_lvx.shard_batch does"
        )
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    text = next((each for each in given if each is not None), None)
    expected = batch.text_lengths[batch.channel.rank]
    if text is None or text.shape[1] != expected:
        got = "none" if text is None else f"{text.shape[1]} tokens"
        raise ValueError(
            f"got input_ids with {got}; expected the {expected} tokens of this rank's shard: pass "
            "what ds_lvx.shard_batch returned as it is"
        )
    if (features is None) != (batch.kv_lengths is None):
        raise ValueError(
            "got the visual input of another batch than the one that was sharded; pass what "
            "ds_lvx.shard_batch returned as it is"
        )
    return text


def _kept(batch: ShardedBatch, features: Tensor | None) -> Tensor | None:
    """What stands in the place of features in a forward of generation; None without images."""
    if batch.kv_lengths is None:
        return None
    length = batch.kv_lengths[batch.channel.rank]
    assert batch.decoding is not None
    copies = 1 if batch.split else batch.decoding.copies
    return batch.decoding.keep(features, lambda x, b: _by_sample(x, b, length), copies=copies)


def _by_sample(features: Tensor, batch_size: int, length: int) -> Tensor:
    """Visual features as ``[B, s_kv, hidden]``; those of a blank frame are cut to nothing."""
    if length == 0:
        return features.reshape(1, -1, features.shape[-1])[:, :0].expand(batch_size, -1, -1)
    features = features.reshape(batch_size, -1, features.shape[-1])
    if features.shape[1] != length:
        raise ValueError(
            f"got {features.shape[1]} visual tokens a sample; expected the {length} of this rank's "
            "shard: pass what ds_lvx.shard_batch returned as it is"
        )
    return features
