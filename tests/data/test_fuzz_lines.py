"""Lines of the fuzzer; `python -m tests.data.fuzz_lines` runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.fuzz_lines import Reader, fuzz


@pytest.mark.parametrize("lines", [200, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_every_line_is_read_or_refused_by_file_and_line(tmp_path: Path, lines: int) -> None:
    reader = Reader(tmp_path)
    good = sum(fuzz(reader, seed) for seed in range(lines))
    assert 0.1 < good / lines < 0.4, "lines that are all good or all bad test little"
