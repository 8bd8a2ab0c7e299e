"""Checkpoints of other ranks: which are looked at, and which are left to DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_lvx.training import resumed


class Own:
    """What a script of one's own may put into a checkpoint's ``client_state``."""


def test_objects_of_a_script_are_left_to_deepspeed(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    file = folder / "mp_rank_00_model_states.pt"
    torch.save({"dp_world_size": 2}, file)
    assert resumed._found(tmp_path, "step") == (folder, {"dp_world_size": 2})
    assert resumed._found(tmp_path, None) is None  # no file "latest"
    torch.save({"dp_world_size": 2, "of_the_script": Own()}, file)
    assert resumed._found(tmp_path, "step") is None
