"""Compiles every Triton kernel in every configuration that can be chosen, for GPUs not here.

A program of its own, because Triton decides when the kernels are imported whether to interpret:

    python -m bench.kernels.compiled 90

prints JSON for a compute capability (here 9.0), one record a configuration: registers, spilled
bytes, shared memory, and whether the code has wgmma instructions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.occupancy import BLOCK_SHARED_BYTES, programs_per_multiprocessor
from ds_lvx.kernels import triton_backward, triton_forward, triton_tiles
from ds_lvx.kernels.triton_tiles import ANY_ADDRESS, OF_RULE, padded

FP32 = ("out", "lse", "delta", "dq", "parts", "part_lses")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = {
    "forward": (triton_forward.forward_kernel, triton_tiles.forward_tiles),
    "queries": (triton_backward.queries_kernel, triton_tiles.queries_tiles),
    "keys": (triton_backward.keys_kernel, triton_tiles.keys_tiles),
    "atomic": (triton_backward.keys_kernel, triton_tiles.atomic_tiles),
}
_GROUP = 4


class Configuration(NamedTuple):
    """What decides how one of `KERNELS` is compiled; ``rows`` are those of a key/value head.

    ``visibility``: "no" rule, a rule ("yes"), or one with "gaps".
    """

    kernel: str
    dtype: torch.dtype
    head_dim: int
    rows: int
    visibility: str


def configurations() -> Iterator[Configuration]:
    """All that differ in the code: few and many rows, and the widths of a tile."""
    for name, visibility in product(KERNELS, ("no", "yes", "gaps")):
        for head_dim, rows in product((64, 80, 128, 256, 512), (4, 4096)):
            yield Configuration(name, torch.bfloat16, head_dim, rows, visibility)
        # fp32 has one tile for all that it does.
        widest = 128 if name == "atomic" else 256
        yield Configuration(name, torch.float32, widest, 4096, visibility)


def compiled(configuration: Configuration, capability: int) -> dict[str, Any]:
    """One configuration, and what the compiler made of it."""
    kernel, choose = KERNELS[configuration.kernel]
    dtype, head_dim, rows = configuration.dtype, configuration.head_dim, configuration.rows
    q = torch.empty(1, max(rows // _GROUP, 1), _GROUP, head_dim, dtype=dtype, device="meta")
    k = torch.empty(1, 100_000, 1, head_dim, dtype=dtype, device="meta")
    tiles = choose(q, k, capability)
    constants = {
        "GROUP": _GROUP,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "VISIBILITY": configuration.visibility != "no",
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    if configuration.visibility != "gaps":
        constants |= {"gap_start": None, "gap_end": None}
    if kernel is triton_backward.keys_kernel:
        constants["ATOMIC"] = configuration.kernel == "atomic"
    types, aligned = _signature(kernel, dtype, constants)
    done = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    registers, spilled = _resources(done.asm["cubin"])
    needs = {"registers": registers, "warps": tiles.warps, "shared_bytes": done.metadata.shared}
    return {
        "capability": capability,
        **configuration._asdict(),
        "dtype": NAMES[dtype],
        "tile_rows": tiles.rows,
        "tile_keys": tiles.keys,
        "stages": tiles.stages,
        **needs,
        "spilled_bytes": spilled,
        "most_shared_bytes": BLOCK_SHARED_BYTES[capability],
        "wgmma": "wgmma.mma_async" in done.asm["ptx"],
        "programs_per_multiprocessor": programs_per_multiprocessor(capability, **needs),
    }


def _signature(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> Any:
    """Types of a kernel's arguments, and which of them are multiples of 16."""
    known = dict.fromkeys(OF_RULE, "*i32") | dict.fromkeys(FP32, "*fp32")
    known |= dict.fromkeys(("q", "k", "v", "dout", "dk", "dv"), f"*{NAMES[dtype]}")
    known |= dict.fromkeys(constants, "constexpr")
    types = {
        argument: known.get(argument, "fp32" if argument.startswith("scale") else "i32")
        for argument in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument not in ANY_ADDRESS
        and (types[argument].startswith("*") or argument.startswith("stride"))
    }
    return types, aligned


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, from the compiled code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", listing.stdout + listing.stderr)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: got {listing.stdout!r}; expected registers")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    print(json.dumps([compiled(each, int(sys.argv[1])) for each in configurations()]))
