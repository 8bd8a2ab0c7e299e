"""The best evaluation of a run so far, and when a run that gets no better ends.

Options have the names of transformers' ``TrainingArguments`` and ``EarlyStoppingCallback``. What
decides is one number that all ranks have, and what was decided is in every checkpoint's
``run.json``, so that a run that resumes goes on with it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

METRICS: Mapping[str, bool] = {"eval_loss": False, "exact_match": True, "token_f1": True}
"""What evaluations are compared by, and whether greater is better; names of ``metrics.jsonl``."""
_SHORT = {"loss": "eval_loss"}  # transformers takes both
NAMES = (*METRICS, *_SHORT)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        metric: that evaluations are compared by.
        value: the best; None before the first.
        step: it was of.
        waited: evaluations since then.
    """

    metric: str
    value: float | None = None
    step: int | None = None
    waited: int = 0


def check_options(options: Any) -> None:
    """Refuse what cannot be compared, or decides nothing.

    Raises:
        ValueError: says what is missing.
    """
    patience, is_kept = options.early_stopping_patience, options.load_best_model_at_end
    option = "--load_best_model_at_end" if is_kept else "--early_stopping_patience"
    if not is_kept and patience is None:
        given = [
            f"--{name}"
            for name in ("metric_for_best_model", "greater_is_better", "early_stopping_threshold")
            if getattr(options, name) is not None
        ]
        if given:
            raise ValueError(
                f"{given[0]}: got it alone; expected --load_best_model_at_end or "
                "--early_stopping_patience, for which it counts"
            )
        return
    if options.early_stopping_threshold is not None and patience is None:
        raise ValueError(
            "--early_stopping_threshold: got it alone; expected --early_stopping_patience beside it"
        )
    if not options.evaluates or options.eval_steps is None:
        missing = "--eval_steps" if options.evaluates else "--eval_data"
        raise ValueError(f"{option}: got no {missing}; expected evaluations to compare")
    metric = _metric(options)
    if metric != "eval_loss" and options.eval_generate == 0:
        raise ValueError(
            f"--metric_for_best_model: got {metric} without answers; expected --eval_generate "
            "beside it, or eval_loss"
        )


class Watch:
    """Compares the evaluations of a run; on every rank the same.

    Args:
        options: of the run.

    Attributes:
        best: the best so far.
    """

    def __init__(self, options: Any) -> None:
        self._patience: int | None = options.early_stopping_patience
        self._threshold: float = options.early_stopping_threshold or 0.0
        self.best = Best(_metric(options))
        greater: bool | None = options.greater_is_better
        greater = METRICS[self.best.metric] if greater is None else greater
        self._is_better = operator.gt if greater else operator.lt

    def take(self, step: int, values: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best before it.

        Args:
            step: it is of.
            values: of it, by name; nan, or none, is never better.

        Returns:
            Whether it is the best so far. For the patience it counts as better only by more than
            ``--early_stopping_threshold``.
        """
        best, value = self.best, values.get(self.best.metric, math.nan)
        if best.value is None:
            is_best = is_much = value == value
        else:
            is_best = self._is_better(value, best.value)
            is_much = is_best and abs(value - best.value) > self._threshold
        if is_best:
            best = replace(best, value=value, step=step)
        self.best = replace(best, waited=0 if is_much else best.waited + 1)
        return is_best

    @property
    def stops(self) -> bool:
        """Whether evaluations have got no better for as long as the run is to wait."""
        return self._patience is not None and self.best.waited >= self._patience

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return asdict(self.best)

    def resume(self, record: Mapping[str, Any] | None) -> str | None:
        """Go on from what a checkpoint kept; what there is to say about it, or None."""
        if record is None:
            return None
        found = Best(**record)
        if found.metric != self.best.metric:
            return (
                f"the best so far was found by {found.metric}, and is forgotten: now it is "
                f"{self.best.metric}"
            )
        self.best = found
        return None


def _metric(options: Any) -> str:
    named = options.metric_for_best_model or "eval_loss"
    return _SHORT.get(named, named)
