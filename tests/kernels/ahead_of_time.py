"""Compiles every kernel in every configuration that can be chosen, for GPUs that are not here.

A program of its own, because the other tests run the same kernels in Triton's interpreter:

    python -m tests.kernels.ahead_of_time 90

prints JSON, one record a configuration: registers, spilled bytes, shared memory, and whether the
code has wgmma instructions.
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
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_lvx.kernels import triton_backward, triton_forward, triton_kernel
from ds_lvx.kernels.triton_tiles import padded

INT32 = ("q_start", "q_end", "kv_pos", "visible", "counts")
FP32 = ("out", "lse", "delta", "dq", "parts", "part_lses")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = {
    "forward": (triton_forward.forward_kernel, triton_kernel.forward_tiles),
    "queries": (triton_backward.queries_kernel, triton_kernel.queries_tiles),
    "keys": (triton_backward.keys_kernel, triton_kernel.keys_tiles),
}


def configurations() -> Iterator[tuple[str, torch.dtype, int, int, bool]]:
    """Kernel, dtype, head_dim, query rows of a key/value head, visibility."""
    for name, visibility in product(KERNELS, (False, True)):
        for head_dim, rows in product((64, 80, 128, 256), (4, 4096)):
            yield name, torch.bfloat16, head_dim, rows, visibility
        yield name, torch.float32, 256, 4096, visibility  # fp32 has one tile for all


def signature(name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> Any:
    """Types of a kernel's arguments, and which of them are multiples of 16."""
    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in INT32:
            types[argument] = "*i32"
        elif argument in FP32:
            types[argument] = "*fp32"
        elif argument in ("q", "k", "v", "dout", "dk", "dv"):
            types[argument] = f"*{NAMES[dtype]}"
        else:
            types[argument] = "fp32" if argument.startswith("scale") else "i32"
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if types[argument].startswith("*") or argument.startswith("stride")
    }
    return types, aligned


def compiled(configuration: tuple[Any, ...], capability: int) -> dict[str, Any]:
    """One configuration, and what the compiler made of it."""
    name, dtype, head_dim, rows, visibility = configuration
    kernel, choose = KERNELS[name]
    group = 4
    q = torch.empty(1, max(rows // group, 1), group, head_dim, dtype=dtype, device="meta")
    k = torch.empty(1, 100_000, 1, head_dim, dtype=dtype, device="meta")
    tiles = choose(q, k)
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "VISIBILITY": visibility,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    types, aligned = signature(name, kernel, dtype, constants)
    done = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    return {
        "configuration": [name, NAMES[dtype], head_dim, rows, visibility],
        "tiles": [tiles.rows, tiles.keys, tiles.warps, tiles.stages],
        "shared": done.metadata.shared,
        "wgmma": "wgmma.mma_async" in done.asm["ptx"],
        **resources(done.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, from the compiled code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", listing.stdout + listing.stderr)
    assert found is not None, listing.stdout
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled": stack + local}


if __name__ == "__main__":
    print(json.dumps([compiled(each, int(sys.argv[1])) for each in configurations()]))
