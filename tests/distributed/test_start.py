"""Locks that a killed process left behind."""

from __future__ import annotations

from pathlib import Path

from ds_lvx.distributed.start import remove_stale_locks


def test_only_locks_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    held, stale, deep = (tmp_path / name / "lock" for name in ("a", "b", "py311_cpu/c"))
    for lock in (held, stale, deep):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with held.open():
        assert set(remove_stale_locks(tmp_path)) == {stale, deep}
        assert held.exists()
    assert remove_stale_locks(tmp_path) == [held]
    assert remove_stale_locks(tmp_path / "nowhere") == []
