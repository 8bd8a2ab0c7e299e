"""A patched model that takes whole batches, for trainers that know nothing of shards.

What such a trainer sees is one process's: the batch that it gives, the loss, the logits. Only the
gradient of the loss is this rank's share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_lvx.attention.sequence import gather_sequence
from ds_lvx.generation import generate
from ds_lvx.initialize import Session
from ds_lvx.models import family_of
from ds_lvx.models.draft import Draft
from ds_lvx.models.patch import KEYWORD, scale_gradient
from ds_lvx.models.precision import dtype_of
from ds_lvx.models.shares import share_table, shared_rows, shares
from ds_lvx.models.text import ITEMS_KEY, TEXT_KEYS
from ds_lvx.sharding import shard_batch

# TRL's models have these beside, or in place of, the logits.
_BY_TOKEN = (
    "logits",
    "log_probs",
    "entropy",
    "log_sum_sq_probs",
    "mean_logits",
    "is_top1",
    "label_mask",
)
# A keyword of their forward: TRL's own loss, in place of the model's.
_TRL_HEAD = "fused_lm_head"


class WholeBatches:
    """Hooks on a model: ``model(**batch)`` with the batch as a processor returns it.

    Every rank of a sequence-parallel group calls the model with the same batch. Each runs its
    shard; ``out.loss`` is the loss of the whole on every rank, and its gradient this rank's share.
    ``out.logits`` are of the whole where they are gathered, else of the shard. A forward whose
    batch was cut already (`ds_lvx.shard_batch`, `ds_lvx.generate`) is left alone.
    ``model.generate(**batch, ...)`` is `ds_lvx.generate`.

    Args:
        model: what the trainer calls: a patched model, or one around it.
        session: of the model: the groups that share a batch.
        averages: whether gradients are averaged over a group (ZeRO-3), not summed.

    Attributes:
        gathers_training: gather the logits in training too, differentiable: for a loss of the
            trainer's own. Without labels in the batch they always are.
        gathers_evaluation: gather them without gradients.
    """

    def __init__(self, model: nn.Module, session: Session, *, averages: bool) -> None:
        self.gathers_training = False
        self.gathers_evaluation = True
        self._session, self._groups = session, session.groups
        self._factor = 1.0 if averages else 1.0 / session.groups.sp_size
        self._proved = False
        self._running: tuple[Any, bool] | None = None
        self._model: Any = model
        self._own_generate = getattr(model, "generate", None)
        self._generating = False
        if self._own_generate is not None:
            vars(model)["generate"] = self._generate
        self._handles = [
            # First, so that every other hook sees the shard.
            model.register_forward_pre_hook(self._cut, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._join, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off. Calling it twice is allowed."""
        for handle in self._handles:
            handle.remove()
        vars(self._model).pop("generate", None)

    def _cut(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get(KEYWORD) is not None:
            return None
        if args:
            raise ValueError(
                f"got {len(args)} positional arguments for a model whose batches are sharded; "
                "expected the batch as keywords: model(**batch)"
            )
        if kwargs.get("past_key_values") is not None:
            raise NotImplementedError(
                "got a forward with past_key_values; call ds_lvx.generate(model, batch, ...) to "
                "generate with sharded visual keys"
            )
        batch = {key: value for key, value in kwargs.items() if _is_content(key, value)}
        options = {key: value for key, value in kwargs.items() if key not in batch}
        shard = shard_batch(self._draft(batch, model, options), model=model, groups=self._groups)
        gathers = self.gathers_training if torch.is_grad_enabled() else self.gathers_evaluation
        if torch.is_grad_enabled() and not self._proved:
            self._prove(model, shard)
        self._running = shard[KEYWORD], gathers or "labels" not in batch
        return (), {**options, **shard}

    def _draft(
        self, batch: Mapping[str, Any], model: nn.Module, options: Mapping[str, Any]
    ) -> Mapping[str, Any] | Draft:
        """The batch, with the labels that the forward's own loss takes."""
        if not options.get(_TRL_HEAD):
            return batch
        # TRL 1.16's vision collator leaves image tokens among the labels: where they lie beyond the
        # head, its loss has no logit of them, and counts the rest.
        family, inside = family_of(model)
        place = self._groups.sp_rank, self._groups.sp_size
        return Draft.of(family, batch, inside, place=place, frames="all", any_label=True)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` of a whole batch; inside of `ds_lvx.generate` the model's own."""
        assert self._own_generate is not None
        if self._generating:
            return self._own_generate(*args, **kwargs)
        if args:
            raise ValueError(
                f"got {len(args)} positional arguments for generate; expected the batch as "
                "keywords: model.generate(**batch, max_new_tokens=...)"
            )
        keys = {*TEXT_KEYS, *family_of(self._model)[0].keys}
        batch = {key: value for key, value in kwargs.items() if key in keys}
        options = {key: value for key, value in kwargs.items() if key not in keys}
        self._generating = True
        try:
            return generate(self._model, batch, groups=self._groups, **options)
        finally:
            self._generating = False

    def _prove(self, model: nn.Module, shard: Mapping[str, Any]) -> None:
        """Show what each rank holds of the first batch."""
        self._proved = True
        if self._groups.world_channel.rank == 0:
            batch, rows = shard[KEYWORD], shard["input_ids"].shape[0]
            found = shares(
                self._session.patch,
                batch,
                samples=rows,
                element_bytes=dtype_of(model).itemsize,
            )
            print(f"ds_lvx: the first batch\n{share_table(found)}", flush=True)
            if self._session.config.share_prefixes:
                print(shared_rows(batch, rows), flush=True)

    def _join(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> Any:
        running, self._running = self._running, None
        if running is None or kwargs.get(KEYWORD) is not running[0]:
            return None
        gathers = running[1]
        if isinstance(out, tuple):
            parts = list(out)
            place = 0
            if "labels" in kwargs:
                parts[0], place = self._whole_loss(parts[0]), 1
            if gathers:
                parts[place] = self._whole_sequence(parts[place], kwargs)
            return tuple(parts)
        if out.get("loss") is not None:
            out.loss = self._whole_loss(out.loss)
        for name in _BY_TOKEN if gathers else ():
            if out.get(name) is not None:
                whole = self._whole_sequence(out[name], kwargs)
                # TRL has its own for each token but the last, which predicts none.
                setattr(out, name, whole if name == "logits" else whole[:, :-1])
        return out

    def _whole_loss(self, share: Tensor) -> Tensor:
        """The sum of the shares, with the gradient of this one."""
        total = self._groups.channel.all_reduce(share.detach().to(torch.float32))
        whole: Tensor = _Valued.apply(share, total.to(share.dtype))
        return whole

    def _whole_sequence(self, part: Tensor, shard: Mapping[str, Any]) -> Tensor:
        """What there is of every token, on every rank.

        Every rank computes the same loss from it, so that its gradient arrives once a rank.
        """
        whole = gather_sequence(part, groups=self._groups, shard=shard)
        return scale_gradient(whole, self._factor) if whole.requires_grad else whole


class _Valued(torch.autograd.Function):
    """Another value, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _is_content(key: str, value: Any) -> bool:
    """Whether a keyword of the model is part of the batch, not an option of the forward."""
    return isinstance(value, Tensor | list) or (key == ITEMS_KEY and value is not None)
