"""How many programs fit on a multiprocessor: by registers, shared memory and warps."""

from __future__ import annotations

import pytest

from bench.kernels.occupancy import KIB, programs_per_multiprocessor


@pytest.mark.parametrize(
    ("capability", "registers", "warps", "shared_kib", "programs"),
    [
        (90, 255, 8, 10, 1),  # 256 a thread: 65,536 of 65,536 registers
        (90, 128, 8, 10, 2),
        (90, 129, 8, 10, 1),  # rounded up to 136
        (80, 64, 4, 100, 1),  # 164 KiB, 1 reserved for each program
        (90, 64, 4, 75, 3),
        (90, 64, 4, 76, 2),
        (90, 24, 8, 1, 8),  # 64 warps
        (90, 24, 1, 1, 32),
        (90, 255, 16, 10, 0),  # would not start
    ],
)
def test_the_scarcest_resource_decides(
    capability: int, registers: int, warps: int, shared_kib: int, programs: int
) -> None:
    found = programs_per_multiprocessor(
        capability, registers=registers, warps=warps, shared_bytes=shared_kib * KIB
    )
    assert found == programs
