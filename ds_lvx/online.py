"""TRL's trainers that generate as they train, for models whose visual tokens are sharded.

They count by processes: of the rewards of all each takes its own by its index, and what is logged
is gathered from all. Here a process is a replica: the ranks of a sequence-parallel group have the
same prompts, generate the same completions, and get the rewards that their first rank asked for.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import accelerate.utils
import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from ds_lvx.accelerate import Accelerator
from ds_lvx.data.processed_once import alike, processing_once
from ds_lvx.models.generating.past import media_tokens

_REFUSED = {
    "use_vllm": "which would generate for each rank apart",
    "use_transformers_continuous_batching": "which knows no sharded keys",
}
_REFUSED_OF_TRAINER = ("tools", "environment_factories", "rollout_func")
_ONLINE = {"GRPOTrainer", "RLOOTrainer"}
_SHUFFLE = "shuffle_sequence_dict"  # TRL's


class OnlineMixin:
    """What `ds_lvx.trainer.TrainerMixin` does for TRL's ``GRPOTrainer`` and ``RLOOTrainer``.

    Other trainers, whose methods of these names take and return something else, have their own.
    """

    accelerator: Accelerator
    args: Any
    generation_config: Any
    model: Any
    num_generations: int
    num_generations_eval: int
    processing_class: Any
    _copies = 1
    _asks_for_rewards = False
    reward_funcs: list[Any]

    @property
    def _is_online(self) -> bool:
        kinds = type(self).__mro__
        return any(k.__name__ in _ONLINE and k.__module__.startswith("trl.") for k in kinds)

    def _check_online(self) -> None:
        """Count samples of a generation by replicas, and refuse what runs once a process.

        Raises:
            ValueError: a prompt's completions do not fill the replicas' batches.
            NotImplementedError: settings that do not go with samples that several ranks share.
        """
        args, ours = self.args, self.accelerator
        if not self._is_online:
            if hasattr(args, "steps_per_generation") and ours.sp_size > 1:
                raise NotImplementedError(
                    f"got {type(self).__name__}, a trainer that shuffles what it generates, each "
                    f"rank for itself; expected one of {' and '.join(sorted(_ONLINE))} of TRL"
                )
            return
        for name, why in _REFUSED.items():
            if getattr(args, name, False):
                raise NotImplementedError(
                    f"got {name} in the training arguments, {why} where ranks share a sample; "
                    "leave it out"
                )
        for name in _REFUSED_OF_TRAINER if ours.sp_size > 1 else ():
            if getattr(self, name, None):
                raise NotImplementedError(
                    f"got {name} for the trainer, which each rank of a sample would call, with "
                    "answers of its own; leave it out"
                )
        args.generation_batch_size = _whole_prompts(
            "per_device_train_batch_size x replicas x steps_per_generation",
            (args.per_device_train_batch_size, ours.num_processes, args.steps_per_generation),
            args.num_generations,
        )
        if args.do_eval and args.eval_strategy != "no":
            _whole_prompts(
                "per_device_eval_batch_size x replicas",
                (args.per_device_eval_batch_size, ours.num_processes),
                args.num_generations_eval or args.num_generations,
            )

    def _begin_online(self) -> None:
        """Random numbers by replica, and completions without tokens that stand for an image."""
        if not self._is_online:
            return
        with self.accelerator.indexing_replicas():
            set_seed(self.args.seed + self.accelerator.process_index)
        settings = self.generation_config
        settings.suppress_tokens = sorted(
            {*(settings.suppress_tokens or ()), *media_tokens(self.model)}
        )

    def _generate_and_score_completions(self, inputs: Sequence[Any]) -> Any:
        """TRL's, by replicas; the ranks of one have the same random numbers afterwards."""
        if not self._is_online:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        # Of the prompts with their completions TRL keeps what is seen, not the tokens.
        copies = math.gcd(len(inputs), self._copies_here)  # others' may be on other replicas
        once = processing_once(self.processing_class, copies)
        by_replicas = self._by_replicas(self.accelerator.gather)
        with by_replicas, _replaced(self, "processing_class", once):
            scored = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        share_random_numbers(self.accelerator)  # TRL shuffles the completions by them
        return scored

    def _prepare_inputs(self, inputs: Any) -> Any:
        """TRL's; completions of a prompt stay together where they share it in training."""
        session = self.accelerator.session if self._is_online else None
        with ExitStack() as stack:
            if session is not None and session.config.share_prefixes:
                together = math.gcd(self.args.per_device_train_batch_size, self.num_generations)
                for module in self._modules:
                    own = getattr(module, _SHUFFLE, None)
                    if own is not None:
                        by_prompt = functools.partial(_shuffled, own, together=together)
                        stack.enter_context(_replaced(module, _SHUFFLE, by_prompt))
            return super()._prepare_inputs(inputs)  # type: ignore[misc]

    @property
    def _modules(self) -> set[Any]:
        """Where TRL's trainer, and subclasses, look up functions."""
        return {sys.modules[kind.__module__] for kind in type(self).__mro__}

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> Any:
        """TRL's; a prompt whose completions all are this replica's is processed once."""
        copies = self._copies = self._copies_of(prompts)
        if copies == 1:
            return super()._tokenize_prompts(prompts)  # type: ignore[misc]
        ids, images, fields = super()._tokenize_prompts(prompts[::copies])  # type: ignore[misc]
        return _repeated(ids, copies), images and _repeated(images, copies), fields

    def _copies_of(self, prompts: Sequence[Any]) -> int:
        """How many prompts in a row are one: its completions, or 1 where they are not all here.

        Tools, and environments, answer each completion, which goes on as a prompt of its own.
        """
        answered = any(getattr(self, name, None) for name in _REFUSED_OF_TRAINER)
        if answered or not self._is_online:
            return 1
        copies = self._copies_here
        starts = range(0, len(prompts), copies)
        are_one = self.generation_config.do_sample and all(
            len(prompts) >= start + copies
            and all(alike(prompts[start], other) for other in prompts[start + 1 : start + copies])
            for start in starts
        )
        return copies if are_one else 1

    @property
    def _copies_here(self) -> int:
        """Completions of a prompt."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate_single_turn(
        self, prompt_ids: Sequence[Any], images: Any, fields: Any, *more: Any, **options: Any
    ) -> Any:
        """TRL's; completions of one prompt share its keys, and its images are encoded once."""
        copies, run = self._copies, super()._generate_single_turn  # type: ignore[misc]
        if copies == 1:
            return run(prompt_ids, images, fields, *more, **options)
        with _replaced(self.generation_config, "num_return_sequences", copies):
            own = prompt_ids[::copies], images and images[::copies]
            return run(*own, fields, *more, **options)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's; the first rank of a group asks the functions, once for all of them.

        Raises:
            RuntimeError: on all ranks, where a function failed on one.
        """
        rewards: Tensor
        if not self._is_online:
            rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
            return rewards
        ours, own, told = self.accelerator, self.reward_funcs, False

        def agree(*_: Any) -> None:
            nonlocal told
            told = True
            ours.agree_on_failure(None)
            told = False

        def gather(rewards: Tensor) -> Tensor:
            nonlocal told
            agree()
            told = True
            return ours.gather(rewards)

        # At ZeRO-3 ranks wait for each other in a model: none enters where another has failed.
        models = [f for f in own if isinstance(f, nn.Module)]
        hooks = [model.register_forward_pre_hook(agree) for model in models]
        if not ours.is_first_of_replica:
            self.reward_funcs = [f if isinstance(f, nn.Module) else _unasked for f in own]
        try:
            with self._by_replicas(gather), _replaced(self, "_asks_for_rewards", True):
                rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        except Exception as caught:
            if told:
                raise
            failure = RuntimeError(f"a reward failed: {type(caught).__name__}: {caught}")
            failure.__cause__ = caught
            ours.agree_on_failure(failure)
        finally:
            self.reward_funcs = own
            for hook in hooks:
                hook.remove()
        return rewards

    @contextmanager
    def _by_replicas(self, gather: Callable[[Any], Any]) -> Iterator[None]:
        """Let TRL's modules, and those of subclasses, gather from replicas, and index by them."""
        ours = self.accelerator
        with ExitStack() as stack:
            for name, by_replica in (("gather", gather), ("gather_object", ours.gather_object)):
                known = (getattr(accelerate.utils, name), getattr(ours, name))
                for module in self._modules:
                    if getattr(module, name, None) in known:
                        stack.enter_context(_replaced(module, name, by_replica))
            stack.enter_context(ours.indexing_replicas())
            yield


def share_random_numbers(accelerator: Accelerator) -> None:
    """Give the CPU's random generators of a group's first rank to its others.

    Torch's, NumPy's and Python's: a data set that changes its samples may use any of them.
    """
    own = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with accelerator.indexing_replicas():
        states = accelerator.gather_object([own])[accelerator.process_index]
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _repeated(items: Sequence[Any], copies: int) -> list[Any]:
    return [item for item in items for _ in range(copies)]


def _shuffled(
    shuffle: Callable[[dict[str, Any]], dict[str, Any]], entries: dict[str, Any], *, together: int
) -> dict[str, Any]:
    """TRL's shuffle of a generation's samples, of which so many in a row stay together.

    It takes as many random numbers.
    """
    samples = len(next(value for value in entries.values() if value is not None))
    drawn = shuffle({"run": torch.arange(samples) // together})["run"]
    runs = torch.tensor([*dict.fromkeys(drawn.tolist())])
    order = (runs[:, None] * together + torch.arange(together)).flatten()

    def ordered(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[n] for n in order]

    return {key: ordered(value) for key, value in entries.items()}


def _unasked(prompts: Sequence[Any], **_: Any) -> list[float]:
    """In the place of a function that the group's first rank calls."""
    return [0.0] * len(prompts)


def _whole_prompts(names: str, factors: Sequence[int], generations: int) -> int:
    """The product of the factors, which has whole prompts' completions."""
    samples = math.prod(factors)
    if samples % generations:
        raise ValueError(
            f"got {names} = {' x '.join(map(str, factors))} = {samples}; expected a multiple of "
            f"num_generations, {generations}: the ranks of a sequence-parallel group share a "
            "sample, and count once; raise steps_per_generation or the batch size"
        )
    return samples
