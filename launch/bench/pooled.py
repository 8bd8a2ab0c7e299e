"""Samples of a calibration before something and behind it, as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ds_lvx.plan.calibrate import refit


def pooled(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first profile with the samples of both, which were measured with the same request.

    A machine's speed drifts; calibrated before and after something, both ends count.
    """
    if len({json.dumps([each["request"], each["ranks"]]) for each in (first, second)}) > 1:
        raise ValueError(
            "got profiles of different requests or ranks; expected the same, so that their samples "
            "belong together"
        )
    return refit({**first, "answers": joined(first["answers"], second["answers"])})


def short(record: Any) -> Any:
    """A record with the digits of its samples that are committed."""
    text = json.dumps(record)
    return json.loads(text, parse_float=lambda digits: float(f"{float(digits):.4g}"))


def joined(one: Any, other: Any) -> Any:
    """Two answers, or those of all ranks, as one: lists of numbers are samples, lists of records
    the same in both."""
    if isinstance(one, Mapping):
        return {key: joined(one[key], other[key]) for key in one}
    if isinstance(one, list) and one and isinstance(one[0], Mapping):
        # Transfers end at a size that takes long: what only one of the two reached is left out.
        return [joined(a, b) for a, b in zip(one, other, strict=False)]
    return [*one, *other] if isinstance(one, list) else one
