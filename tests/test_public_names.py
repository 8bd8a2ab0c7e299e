"""The names and signatures that users build on."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import deepspeed
import pytest

import ds_lvx

ROOT = Path(__file__).resolve().parents[1]
COMMON = "group=None, visibility=None, softmax_scale=None"

SIGNATURES = {
    "lv_xattn": f"q, k, v, *, {COMMON}, schedule='auto', kernel='auto', return_lse=False",
    "lv_xattn_recompute": (
        f"q, features, project_kv, *, {COMMON}, schedule='auto', kernel='auto', return_lse=False, "
        "kv_chunk_tokens=None"
    ),
    "hybrid_attention": (
        f"q, k, v, *, ulysses, across='ring', {COMMON}, schedule='auto', kernel='auto', "
        "return_lse=False"
    ),
    "ring_attention": f"q, k, v, *, {COMMON}, kernel='auto', return_lse=False",
    "ulysses_attention": f"q, k, v, *, {COMMON}, kernel='auto'",
    "Visibility": "q_start, q_end, kv_pos, gap_start=None, gap_end=None",
    "apply": "model, config, *, groups=None",
    "generate": "model, batch, *, groups=None, frames='all', **kwargs",
    "SequenceParallelGroups": "sequence_parallel_size",
    "owned": "count, *, groups=None, model=None, costs=None",
    "shard_batch": "batch, *, model, groups=None, frames='all'",
    "gather_sequence": "x, dim=1, *, groups=None, shard=None",
    "zigzag": "length, *, groups=None",
    "mean_loss": "loss, *, groups=None",
    "merge_attention": "parts",
    "register_family": "model_type, family",
    "checkpointing": "checkpoint_function",
    "shutdown": "engine=None",
    "traffic": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(ds_lvx, name)).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


def test_initialize_has_the_signature_of_deepspeed() -> None:
    ours, theirs = (
        inspect.signature(f).parameters for f in (ds_lvx.initialize, deepspeed.initialize)
    )
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_every_public_name_exists_and_says_what_it_does() -> None:
    for name in ds_lvx.__all__:
        assert inspect.getdoc(getattr(ds_lvx, name)), name


def test_a_module_does_not_take_the_place_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python makes the module ``ds_lvx.initialize``, once imported, an attribute of the package."""
    monkeypatch.delitem(sys.modules, "ds_lvx.initialize")
    monkeypatch.delitem(vars(ds_lvx), "initialize", raising=False)
    module = importlib.import_module("ds_lvx.initialize")  # as if for the first time
    assert ds_lvx.initialize is module.initialize
    assert ds_lvx.sharding.owned is ds_lvx.owned  # a module that is no public name is an attribute
    monkeypatch.undo()
    function = ds_lvx.initialize
    ds_lvx.initialize = sys.modules["ds_lvx.initialize"]  # as an import after the first use does
    assert ds_lvx.initialize is function
    monkeypatch.setattr(ds_lvx, "initialize", len)  # what is no module may take it
    assert ds_lvx.initialize is len


def test_public_names_are_listed_and_others_are_no_attributes() -> None:
    assert set(ds_lvx.__all__) == set(ds_lvx._HOMES)
    assert set(ds_lvx.__all__) <= set(dir(ds_lvx))
    with pytest.raises(AttributeError, match="'ds_lvx' has no attribute 'lv_xatn'"):
        _ = ds_lvx.lv_xatn


def imports(path: Path) -> list[str]:
    """What a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_only_the_channel_imports_torch_distributed() -> None:
    for path in (ROOT / "ds_lvx").rglob("*.py"):
        if any(name.startswith("torch.distributed") for name in imports(path)):
            assert path.name == "channel.py", path


def test_what_runs_in_a_step_asks_the_planner_through_one_door() -> None:
    rooms = [ROOT / "ds_lvx" / room for room in ("attention", "kernels", "models")]
    asking = {
        path.relative_to(ROOT / "ds_lvx").as_posix()
        for room in rooms
        for path in room.rglob("*.py")
        if any(name.startswith("ds_lvx.plan") for name in imports(path))
    }
    # The layers' table names the type of what the door gave it.
    assert "attention/auto.py" in asking <= {"attention/auto.py", "models/layers.py"}


def test_the_readmes_config_is_one() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert ds_lvx.LVXConfig.from_ds_config(json.loads(block)).sequence_parallel_size == 4
