"""Combinations of a rule's values that do not exist: each is named with its key and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from ds_lvx.config.layer_rule import LayerRule
from ds_lvx.config.registry import AUTO, METHODS, can_chunk
from ds_lvx.config.words import shown


def missing_combinations(rule: LayerRule) -> Iterator[str]:
    """What a rule asks for and no version has: key, got, what to do."""
    method = rule.method
    entry = METHODS.get(method)  # None for auto
    if entry is not None and not entry.recomputes and rule.recompute_kv:
        able = " or ".join(f'"{name}"' for name, each in METHODS.items() if each.recomputes)
        yield (
            f'recompute_kv: does not exist for method "{method}"; use method {able}, or remove '
            "recompute_kv"
        )
    yield from _without_recomputation(rule)
    yield from _without_subgroups(rule)
    if entry is not None and not entry.has_schedules and rule.schedule != AUTO:
        able = " or ".join(f'"{name}"' for name, each in METHODS.items() if each.has_schedules)
        yield (
            f'schedule: got "{rule.schedule}", but method "{method}" has no schedules; use method '
            f"{able}, or remove schedule"
        )
    if method == "none" and rule.kernel != "auto":
        yield (
            f'kernel: got "{rule.kernel}", but a layer with method "none" runs the model\'s own '
            "attention; remove kernel"
        )


def _without_subgroups(rule: LayerRule) -> Iterator[str]:
    """What only a hybrid has, and what its lvx across cannot do."""
    if rule.method != "hybrid":
        asked = {"ulysses": rule.ulysses is not None, "across": rule.across != AUTO}
        for key in (key for key, given in asked.items() if given):
            yield (
                f'{key}: got {shown(getattr(rule, key))} for method "{rule.method}"; it is for '
                f'method "hybrid": use that, or remove {key}'
            )
    elif rule.schedule != AUTO and rule.across == "ring":
        yield (
            f'schedule: got "{rule.schedule}" with across "ring", which has no schedules; use '
            'across "lvx", or remove schedule'
        )
    elif rule.schedule == "replicated":
        yield (
            'schedule: got "replicated" for method "hybrid", which shards the queries; use "ring", '
            '"gather" or "auto"'
        )


def subgroups_problem(ulysses: int | None, ranks: int) -> str | None:
    """What is wrong with a hybrid's subgroups of so many ranks in a group of ``ranks``."""
    divisors = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
    if ulysses is None:
        return f'missing; method "hybrid" needs the ranks of a subgroup: one of {divisors}'
    if ranks % ulysses == 0:
        return None
    return (
        f"got {ulysses}, which does not divide sequence_parallel_size {ranks}; set it to one of "
        f"{divisors}"
    )


def _without_recomputation(rule: LayerRule) -> Iterator[str]:
    """What only a layer that projects K and V again in backward can do."""
    asked = {"features": rule.features == "offload", "kv_chunk_tokens": rule.kv_chunk_tokens}
    for key, value in asked.items():
        if value and not rule.recompute_kv:
            yield (
                f"{key}: got {shown(getattr(rule, key))} without recompute_kv, which keeps K and V "
                f'whole for backward; add "recompute_kv": true, or remove {key}'
            )
        elif value and not can_chunk(rule.schedule):
            yield (
                f'{key}: got {shown(getattr(rule, key))} with schedule "{rule.schedule}", which '
                "needs a layer's K and V whole for every query shard that passes; use schedule "
                '"gather" or "auto"'
            )
