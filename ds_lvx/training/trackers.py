"""Experiment trackers, by accelerate's own classes: TensorBoard, Weights & Biases, trackio, ..."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_LOGS = "logs"
_NONE = "none"
_WANDB, _WANDB_FOLDER = "wandb", "WANDB_DIR"
_KINDS = int | float | str | bool


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be reported to.

    Args:
        names: as the user gave them.

    Raises:
        ValueError: accelerate, or a tracker's package, is not there, or nobody knows the name.
    """
    if not _wanted(names):
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError:
        raise ValueError(
            "--report_to: got no accelerate, whose trackers these are; install it: pip install "
            "'ds_lvx[trainer]'"
        ) from None
    there = sorted(map(str, get_available_trackers()))
    for name in _wanted(names):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"--report_to: got {name!r}; expected some of {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in there:
            raise ValueError(
                f"--report_to: got {name}, which is not installed; expected one of those that are "
                f"({', '.join(there) or 'none'}): pip install {name}, or leave it out"
            )


class Trackers:
    """What a run reports to. Of one process, the first.

    Args:
        names: of trackers that `check_trackers` let pass.
        folder: of the run; trackers that keep files keep them in ``logs`` there
            (Weights & Biases in ``WANDB_DIR``, where that is set).
        settings: of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._trackers: list[Any] = []
        self._owns_state = False
        if not _wanted(names):
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._owns_state = not PartialState._shared_state
        PartialState()
        known = {key: value for key, value in settings.items() if isinstance(value, _KINDS)}
        for name in _wanted(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": folder / _LOGS} if kind.requires_logging_directory else {}
            if name == _WANDB and _WANDB_FOLDER not in os.environ:
                (folder / _LOGS).mkdir(parents=True, exist_ok=True)  # else it takes another
                place = {"dir": folder / _LOGS}
            tracker = kind(folder.resolve().name, **place)
            tracker.start()
            tracker.store_init_configuration(known)
            self._trackers.append(tracker)

    def log(self, row: Mapping[str, Any]) -> list[str]:
        """Report what a line of ``metrics.jsonl`` has, numbers and text, at its ``step``.

        Returns:
            What trackers raised; these get nothing more.
        """
        values = {
            key: value for key, value in row.items() if key != "step" and isinstance(value, _KINDS)
        }
        problems = []
        for tracker in [*self._trackers]:
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:  # noqa: BLE001  a run does not end with its tracker
                self._trackers.remove(tracker)
                problems.append(f"--report_to {tracker.name}: {error}; it gets nothing more")
        return problems

    def finish(self) -> None:
        """End them; calling it twice is allowed."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            with suppress(Exception):  # what ended the run is to be said, not this
                tracker.finish()
        if self._owns_state:
            self._owns_state = False
            from accelerate import PartialState

            PartialState._reset_state()


def _wanted(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name != _NONE]
