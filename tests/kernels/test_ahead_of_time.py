"""The Triton kernels compiled for GPUs that are not here: what they spill, shared memory fits.

A sample of the configurations, of which docs/benchmarks/kernels-compiled.json has all, and the
widest heads in fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench.kernels.occupancy import BLOCK_SHARED_BYTES

# One process, and one compiler at a time: each takes a core and some memory.
COMPILE = """
import json, sys
import torch
from bench.kernels.compiled import Configuration, NAMES, compiled, configurations

sample, gaps = {("bf16", 128, 4096)}, {("bf16", 64, 4)}
if len(sys.argv) > 2:
    sample |= {("bf16", 80, 4), ("bf16", 256, 4096), ("fp32", 256, 4096)}
    sample |= {("fp32", 128, 4096)}  # the widest that adds up dq
    sample |= {("bf16", 512, 4096), ("bf16", 512, 4), ("fp32", 512, 4096)}
    gaps = {("bf16", 128, 4096)}
wide = [
    Configuration(kernel, torch.float32, 512, 4096, "yes")
    for kernel in ("forward", "queries", "keys")
]
for each in (*configurations(), *wide):
    name = (NAMES[each.dtype], each.head_dim, each.rows)
    if name in {"no": (), "yes": sample, "gaps": gaps}[each.visibility]:
        # The others for one GPU: what they spill there they spill elsewhere, as a rule.
        each_gpu = name in (*gaps, ("bf16", 128, 4096), ("bf16", 512, 4096))
        for capability in map(int, sys.argv[1:] if each_gpu else sys.argv[2:3]):
            print(json.dumps(compiled(each, capability)), flush=True)
"""


def most_spilled(record: dict[str, Any]) -> int:
    """None, but of the tiles that were the fastest on an H200 although they spill a little, of the
    widest heads, which fill the registers, and of gaps, which take a few more."""
    if record["head_dim"] > 256:
        return 32
    measured = record["capability"] == 90 and record["head_dim"] == 128 and record["rows"] > 64
    fastest = measured and record["dtype"] == "bf16" and record["kernel"] in ("forward", "atomic")
    if fastest:
        return 256
    return 40 if record["visibility"] == "gaps" else 0


@pytest.mark.parametrize(
    "capabilities",
    [
        pytest.param([90], marks=pytest.mark.slow),
        pytest.param([*BLOCK_SHARED_BYTES], marks=pytest.mark.exhaustive),
    ],
    ids=["one", "all"],
)
def test_the_sample_compiles_for_every_gpu(capabilities: list[int]) -> None:
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # pytest has added launch/
    command = [sys.executable, "-c", COMPILE, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == (8 if len(capabilities) == 1 else 4 * (3 * len(capabilities) + 4) + 3)
    for record in records:
        assert record["spilled_bytes"] <= most_spilled(record), record
        assert record["shared_bytes"] <= record["most_shared_bytes"], record
        assert record["programs_per_multiprocessor"] >= 1, record
        if record["capability"] == 90 and record["dtype"] == "bf16" and record["tile_rows"] >= 64:
            assert record["wgmma"], record
