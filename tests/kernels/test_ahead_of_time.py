"""The Triton kernels compiled for GPUs that are not here: nothing spilled, shared memory fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

# Bytes of shared memory that a block may have (CUDA C programming guide, compute capabilities).
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """One process a capability, side by side."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    started = {
        capability: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.ahead_of_time", str(capability)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in SHARED_BYTES
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_configuration_compiles(
    capability: int, compilers: dict[int, subprocess.Popen[str]]
) -> None:
    listing, _ = compilers[capability].communicate(timeout=400)
    records = json.loads(listing.splitlines()[-1])
    assert len(records) == 3 * 2 * 9
    for record in records:
        assert record["spilled"] == 0, record
        assert record["shared"] <= SHARED_BYTES[capability], record
        if capability == 90 and record["configuration"][1] == "bf16" and record["tiles"][0] >= 64:
            assert record["wgmma"], record
