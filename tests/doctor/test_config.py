"""`ds-lvx doctor --config` reads the section and says who acts on it."""

from __future__ import annotations

import json
from pathlib import Path

from ds_lvx.doctor.command import config_finding
from ds_lvx.doctor.findings import State


def test_a_config_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    section = {"sequence_parallel_size": 2, "layers": [{"match": "*", "method": "lvx"}]}
    path.write_text(json.dumps({"ds_lvx": section}))
    found = config_finding(str(path))
    assert found.value == "a section ds_lvx for 2 ranks a sample"
    assert found.advice.startswith("only ds_lvx.initialize, ds_lvx.trainer and ds_lvx.accelerate")
    path.write_text(json.dumps({"ds_lvx": {**section, "layer": []}}))
    wrong = config_finding(str(path))
    assert wrong.state is State.ERROR
    assert "did you mean" in wrong.value
