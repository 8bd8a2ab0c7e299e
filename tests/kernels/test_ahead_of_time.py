"""The Triton kernels compiled for GPUs that are not here: nothing spilled, shared memory fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ds_lvx.plan.occupancy import BLOCK_SHARED_BYTES


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """One process a capability, side by side."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    started = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "ds_lvx.compare.kernels.compiled", str(capability)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in BLOCK_SHARED_BYTES
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("capability", BLOCK_SHARED_BYTES)
def test_every_configuration_compiles(
    capability: int, compilers: dict[int, subprocess.Popen[str]]
) -> None:
    listing, _ = compilers[capability].communicate(timeout=400)
    records = json.loads(listing.splitlines()[-1])
    assert len(records) == 3 * 2 * 9
    for record in records:
        assert record["spilled_bytes"] == 0, record
        assert record["shared_bytes"] <= record["most_shared_bytes"], record
        assert record["programs_per_multiprocessor"] >= 1, record
        if capability == 90 and record["dtype"] == "bf16" and record["tile_rows"] >= 64:
            assert record["wgmma"], record
