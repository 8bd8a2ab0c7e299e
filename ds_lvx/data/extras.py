"""Packages that only some uses need."""

from __future__ import annotations

from importlib.util import find_spec


def need(package: str, extra: str, *, why: str) -> None:
    """Refuse what wants a package that is not installed, before anything is loaded for it.

    Args:
        package: as it is imported.
        extra: of ds_lvx that brings it.
        why: option or file that wants it.

    Raises:
        ValueError: it is not there.
    """
    if find_spec(package) is None:
        raise ValueError(
            f"{why}: got no package {package!r}; expected it; install it: pip install "
            f"'ds_lvx[{extra}]'"
        )
