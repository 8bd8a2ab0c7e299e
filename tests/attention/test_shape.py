"""How the gather schedule groups heads."""

from __future__ import annotations

import pytest

from ds_lvx.attention.shape import head_groups


@pytest.mark.parametrize(
    ("kv_heads", "groups"),
    [
        (1, (1,)),
        (2, (1, 1)),
        (3, (1, 1, 1)),
        (8, (1, 6, 1)),
        (15, (1, 13, 1)),
        (32, (4, 24, 4)),
    ],
)
def test_groups_of_heads_that_are_small_at_both_ends(
    kv_heads: int, groups: tuple[int, ...]
) -> None:
    assert head_groups(kv_heads=kv_heads, q_bytes=2**30, on_cpu=False) == groups
    assert sum(groups) == kv_heads


def test_small_queries_stay_together() -> None:
    for on_cpu, most in ((True, 2**15), (False, 2**22)):
        assert head_groups(kv_heads=8, q_bytes=most, on_cpu=on_cpu) == (8,)
        assert head_groups(kv_heads=8, q_bytes=most + 1, on_cpu=on_cpu) == (1, 6, 1)
