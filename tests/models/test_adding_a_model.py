"""The code of docs/adding-a-model.md, taken from there and run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from ds_lvx.models import FAMILIES
from tests.ranks import run_ranks

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "adding-a-model.md"


def save_code(folder: Path) -> list[str]:
    """Each block of Python under the name that the text before it gives; returns the names."""
    found = re.findall(
        r"Save this as `(\w+\.py)`.*?```python\n(.*?)```", DOCUMENT.read_text(), re.S
    )
    for name, code in found:
        (folder / name).write_text(code)
    return [name for name, _ in found]


def run_here(folder: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            return float(runpy.run_path(f"{folder}/check.py")["largest_difference"]())
        finally:
            FAMILIES.forget("nano_nvlm")
            for name in ("nano_nvlm", "nano_family"):
                sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_documents_model_equals_one_process_on_two_ranks(tmp_path: Path) -> None:
    assert save_code(tmp_path) == ["nano_nvlm.py", "nano_family.py", "check.py"]
    for difference in run_ranks(run_here, 2, str(tmp_path)):
        assert 0 <= difference < 1e-5


def test_it_is_as_small_as_it_says(tmp_path: Path) -> None:
    save_code(tmp_path)
    lines = (tmp_path / "nano_family.py").read_text().splitlines()
    assert len(lines) < 80
