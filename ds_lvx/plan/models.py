"""What the planner has to know of a model: by its name, or from a Hugging Face ``config.json``.

The families know their models and name their sources (`ds_lvx.models`). Nothing is downloaded.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from ds_lvx.models.dimensions import Model
from ds_lvx.models.registry import FAMILIES


@cache
def known() -> tuple[Model, ...]:
    """The models that the planner knows by name."""
    return FAMILIES.known()


def model(name: str) -> Model:
    """A model by its name on the hub, by the last part of it, or by the path of a config.json.

    Raises:
        ValueError: unknown; lists the known.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        return _from_file(path)
    names = {each.name.lower(): each for each in known()}
    names |= {full.rpartition("/")[2]: each for full, each in names.items()}
    wanted = name.lower().removesuffix("-instruct")
    found = {each.name: each for key, each in names.items() if f"{key}-".startswith(f"{wanted}-")}
    if len(found) == 1:  # mPLUG-Owl3-7B is mPLUG/mPLUG-Owl3-7B-240728
        return next(iter(found.values()))
    if path.is_dir():  # says what it lacks, as that of an adapter
        return _from_file(path / "config.json")
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"; did you mean {names[near[0]].name}?" if near else ""
    listed = ", ".join(each.name for each in known())
    raise ValueError(
        f"model: got {name!r}; expected one of {listed}, or the path of a config.json{hint}"
    )


def _from_file(path: Path) -> Model:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {path}, which cannot be read: {error}") from error
    family, families = config.get("model_type"), FAMILIES.dimensions()
    if family not in families:
        raise ValueError(
            f"model: got {path} of model_type {family!r}; expected one of {list(families)}"
        )
    try:
        return families[family](config, str(path), str(path))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"model: got {path}, which lacks {error}; expected the whole config of the model, as "
            "save_pretrained writes it"
        ) from error
