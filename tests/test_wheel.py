"""A wheel, installed elsewhere, runs the example of the README without the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ds_lvx", "pyproject.toml", "README.md", "LICENSE")


def run(*words: object, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written into the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        taken = ROOT / name
        if taken.is_dir():
            shutil.copytree(taken, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(taken, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    name = run(sys.executable, "-c", build, folder=copy).split()[-1]
    return copy / "dist" / name


def test_a_wheel_holds_all_of_the_package(wheel: Path) -> None:
    named = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / "ds_lvx").rglob("*") if path.suffix in (".py", ".sh")]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(named)
    assert "ds_lvx/py.typed" in named
    assert not [name for name in named if name.startswith(("tests", "launch"))]


@pytest.mark.exhaustive
def test_an_installed_wheel_runs_the_readmes_example(wheel: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=True)
    python = bare / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    # What it depends on is taken from the environment of the tests, but for itself.
    others = {"PYTHONPATH": sysconfig.get_path("purelib")}
    where = run(python, "-c", "import ds_lvx; print(ds_lvx.__file__)", folder=tmp_path, **others)
    assert Path(where.split()[-1]).is_relative_to(bare)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "for step in range(20)" in block]
    (tmp_path / "example.py").write_text(example.replace("range(20)", "range(3)"))
    (tmp_path / "ds_configs").mkdir()
    shutil.copy(ROOT / "ds_configs" / "finetune-cpu.json", tmp_path / "ds_configs")
    port = str(29_900 + os.getpid() % 40)
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port)
    printed = run(python, *words, "example.py", folder=tmp_path, **others)
    losses = [float(line.split()[1]) for line in printed.splitlines() if line[:2] in ("0 ", "2 ")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert "usage: ds-lvx" in run(bare / "bin" / "ds-lvx", "--help", folder=tmp_path, **others)
