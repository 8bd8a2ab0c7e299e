"""What all tests share: the rank processes, and skipping of tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import session_pool

if not torch.cuda.is_available():
    # Read when Triton's kernels are imported: without a GPU they run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _rank_processes() -> Iterator[None]:
    """End the rank processes with the last test, before pytest-cov adds up their data."""
    yield
    session_pool().discard()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
