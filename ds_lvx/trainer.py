"""transformers' ``Trainer`` for models whose visual tokens are sharded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor

from ds_lvx.accelerate import Accelerator, initializing_by
from ds_lvx.config import read_ds_config
from ds_lvx.data.collate import ChatCollator
from ds_lvx.models import family_of
from ds_lvx.online import OnlineMixin

_BATCH_SIZE = "train_batch_size"


class TrainerMixin(OnlineMixin):
    """Goes before `transformers.Trainer` or a subclass: ``class SFT(TrainerMixin, SFTTrainer)``.

    The script stays as it is. ``TrainingArguments(deepspeed=...)`` has a ds_config with a section
    ``ds_lvx``; the ranks of a sequence-parallel group get the same samples, and each runs its
    shard. Losses, weights and metrics are those of one process for each replica.

    Where the subclass has a ``compute_loss`` of its own, it finds the logits of the whole batch in
    training too. In evaluation it finds them wherever predictions are wanted; these are the logits
    alone. A model that the subclass hands to DeepSpeed as it is made, as TRL does with the
    reference of ``DPOTrainer``, is sharded like the one that trains.

    Raises:
        ValueError: no section ``ds_lvx``, a mistake in it, or ranks that accelerate overlooks.
        NotImplementedError: settings of the arguments that do not go with sharded samples.
    """

    accelerator: Any
    args: Any
    data_collator: Any
    model: Any
    label_smoother: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with initializing_by(self._start_reference):
            super().__init__(*args, **kwargs)
        self._begin_online()

    def _start_reference(self, *, model: Any, config: Any, **arguments: Any) -> Any:
        """What the subclass calls ``deepspeed.initialize`` for while it is made."""
        if model is self.model:
            raise NotImplementedError(
                "got precompute_ref_log_probs in the training arguments, which asks the model "
                "before it is sharded; leave it out"
            )
        try:
            family_of(model)
        except NotImplementedError:  # of text alone, such as one that rewards
            return deepspeed.initialize(model=model, config=config, **arguments)
        return self.accelerator.start_reference(model=model, config=config)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, with an accelerator of ours."""
        _refuse(self.args, generates=isinstance(self, transformers.Seq2SeqTrainer))
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        ours = self.accelerator = Accelerator.of(self.accelerator)
        if self.args.neftune_noise_alpha is not None and ours.sp_size > 1:
            raise NotImplementedError(
                "got neftune_noise_alpha in the training arguments, whose noise is scaled by the "
                "length of a text, of which a rank sees a part; leave it out"
            )
        ours.gathers_training = type(self).compute_loss is not transformers.Trainer.compute_loss  # type: ignore[attr-defined]
        self.gather_function = functools.partial(
            ours.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        self._leave_batch_size(ours)
        self._check_online()

    def _leave_batch_size(self, ours: Accelerator) -> None:
        """``train_batch_size``: Trainer multiplies by all ranks, DeepSpeed by the replicas."""
        given = self.args.deepspeed
        config = {} if given is None else read_ds_config(given)
        ours.derives_batch_size = config.get(_BATCH_SIZE, "auto") == "auto"
        settings = ours.state.deepspeed_plugin.hf_ds_config
        settings.mismatches = [
            line for line in settings.mismatches if not line.startswith(f"- ds {_BATCH_SIZE}=")
        ]

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of an optimizer step: those of all replicas."""
        whole: int = super().get_total_train_batch_size(args)  # type: ignore[misc]
        return whole // self.accelerator.sp_size

    def floating_point_ops(self, inputs: Any) -> int:
        """Of this rank's share."""
        whole: int = super().floating_point_ops(inputs)  # type: ignore[misc]
        return whole // self.accelerator.sp_size

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with a row of text for each sample."""
        with self._apart():
            return super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with a row of text for each sample."""
        with self._apart():
            return super().get_test_dataloader(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Rows that samples share would be unequally many on replicas, and in no known order."""
        own = self.data_collator
        self.data_collator = own.apart if isinstance(own, ChatCollator) else own
        try:
            yield
        finally:
            self.data_collator = own

    def _prepare_input(self, data: Any) -> Any:
        """Trainer's; what is seen stays where it is, and only this rank's part leaves the CPU."""
        if self._asks_for_rewards or not isinstance(data, Mapping):  # keys of another model
            return super()._prepare_input(data)  # type: ignore[misc]
        visual = family_of(self.model)[0].keys
        dtype = self.accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
        rest = {key: value for key, value in data.items() if key not in visual}
        prepared: dict[str, Any] = super()._prepare_input(rest)  # type: ignore[misc]
        return {key: prepared[key] if key in rest else _cast(data[key], dtype) for key in data}

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Any, Any, Any]:
        """Trainer's; the logits are of the whole batch, and alone."""
        answers = getattr(self.args, "predict_with_generate", False) and self.label_smoother is None
        unread = prediction_loss_only or answers
        with self.accelerator.without_logits() if unread else nullcontext():
            loss, logits, labels = super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **generation
            )
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels


class Trainer(TrainerMixin, transformers.Trainer):
    """`transformers.Trainer` for models whose visual tokens are sharded: see `TrainerMixin`."""


class Seq2SeqTrainer(TrainerMixin, transformers.Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` likewise; with ``predict_with_generate`` predictions are the
    tokens that `ds_lvx.generate` makes, prompts included, the same on every rank."""


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _refuse(args: Any, *, generates: bool) -> None:
    """Raise for settings that do not go with sharded samples, or that Trainer would overlook."""
    if getattr(args, "predict_with_generate", False) and not generates:
        raise NotImplementedError(
            "got predict_with_generate for a Trainer that does not generate; use "
            "ds_lvx.trainer.Seq2SeqTrainer"
        )
    problems = {
        "parallelism_config": args.parallelism_config is not None,
        "train_sampling_strategy='batch_rebalance'": (
            args.train_sampling_strategy == "batch_rebalance"
        ),
        "use_liger_kernel": args.use_liger_kernel,
        "auto_find_batch_size": args.auto_find_batch_size,
        # Each rank would save at the step at which it sees the signal, and wait for the others.
        "enable_jit_checkpoint": getattr(args, "enable_jit_checkpoint", False),
    }
    for name, is_set in problems.items():
        if is_set:
            raise NotImplementedError(
                f"got {name} in the training arguments, which does not go with samples that are "
                "shared by several ranks; leave it out"
            )
