"""Some cases of the fuzzer; `python -m tests.data.fuzz` has as many as one likes."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.data import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("cases", [100, pytest.param(800, marks=pytest.mark.exhaustive)])
def test_damaged_files_are_decoded_or_refused(cases: int) -> None:
    ends = list(fuzz.fuzz(range(cases), seed=7))
    assert [failure for _, failure in ends if failure is not None] == []
    counted = Counter(end for end, _ in ends)
    assert counted["differs"] <= max(cases / 400, 1), counted  # damage that no decoder notices
    assert min(counted["decoded"], counted["refused"]) > cases / 6, counted


def test_a_case_comes_again() -> None:
    data = bytes(range(256)) * 4
    first, second = (fuzz.damage(data, random.Random("7 3")) for _ in range(2))
    assert first == second != data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise KeyError(3)", "KeyError: 3"),
        ("raise ValueError('no name')", "a refusal without the name"),
        ("os._exit(5)", "died with exit code 5"),
        pytest.param("while True: pass", "nothing for 2 s", marks=pytest.mark.exhaustive),
    ],
)
def test_what_the_fuzzer_is_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str
) -> None:
    """A library that is broken in the child, which imports it anew: by a file on its path."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "import ds_lvx.data.images as images\n"
        "def broken(path, **options):\n"
        f"    {code}\n"
        "images.load_image = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(fuzz.__file__).parents[2]}")
    if "while" in code:
        monkeypatch.setattr(fuzz, "HANG_S", 2.0)
    monkeypatch.setattr(fuzz, "FILMS", ())
    monkeypatch.setattr(fuzz, "IMAGES", ("png",))
    ((end, failure),) = fuzz.fuzz([0], seed=7, keep=tmp_path / "kept")
    assert end == "failed"
    assert expected in str(failure)
    assert len(list((tmp_path / "kept").iterdir())) == 1
