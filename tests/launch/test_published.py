"""The paper's table, and what the planner says about it without having seen it."""

from __future__ import annotations

import pytest

from bench import published
from bench.published import TABLE, Row


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_speed_ups_are_within_a_factor_of_one_and_a_half(row: Row) -> None:
    found = published.compare(row, published.cluster(both_ways=True))
    assert found["speedup"] == pytest.approx(row.ring_s / row.lvx_s)
    assert 1 / 1.5 < found["predicted_over_published"] < 1.5
    # And not because two errors cancel.
    assert found["predicted_ring_s"] == pytest.approx(row.ring_s, rel=0.25)
    assert found["predicted_lvx_s"] == pytest.approx(row.lvx_s, rel=0.25)


def test_read_one_way_the_links_are_faster_than_the_table_allows() -> None:
    row = TABLE[0]
    assert published.ring_bytes(row) / row.ring_s < published.ACROSS_BYTES_PER_S / 2
    found = published.compare(row, published.cluster(both_ways=False))
    assert found["predicted_ring_s"] < row.ring_s / 2


def test_this_projects_own_code_sends_eight_heads() -> None:
    found = published.compare(TABLE[0], published.cluster(both_ways=True))
    ours = found["predicted_of_ds_lvx_s"]
    assert ours["lvx gather"] < found["predicted_lvx_s"] / 2
    assert ours["ring"] < found["predicted_ring_s"] / 3
