"""How many programs of a kernel fit on a multiprocessor of an NVIDIA GPU at once.

From the table of technical specifications in the CUDA C++ programming guide (compute capabilities).
"""

from __future__ import annotations

KIB = 1024
BLOCK_SHARED_BYTES = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
"""The most shared memory that a program may have, by compute capability."""
_RESERVED_BYTES = KIB  # of every program's shared memory, for the system
_REGISTERS = 64 * KIB
_REGISTERS_UNIT = 256  # a warp gets a multiple of it
_WARP = 32
_MOST_WARPS = 64
_MOST_PROGRAMS = 32


def programs_per_multiprocessor(
    capability: int, *, registers: int, warps: int, shared_bytes: int
) -> int:
    """How many programs, with so many registers a thread, run on a multiprocessor side by side.

    The tensor memory of compute capability 10.0 is not counted; it may allow fewer.
    """
    of_warp = -(-registers * _WARP // _REGISTERS_UNIT) * _REGISTERS_UNIT
    of_all = BLOCK_SHARED_BYTES[capability] + _RESERVED_BYTES  # one program may have all of it
    return min(
        _REGISTERS // (of_warp * warps),
        of_all // (shared_bytes + _RESERVED_BYTES),
        _MOST_WARPS // warps,
        _MOST_PROGRAMS,
    )
