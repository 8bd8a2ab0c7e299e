"""The registry of families, what it refuses, and that nothing outside of it names one."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_lvx.models import FAMILIES, Family, family_of, register_family
from ds_lvx.models.media import Medium
from ds_lvx.models.registry import BUILT_IN, KNOWN, Families
from ds_lvx.models.size import Size

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("find", "attention_layers", "forward", "text_model", "visual", "blank")


def with_parts(*names: str) -> type:
    """A class, not derived from `Family`, that has some of the parts."""
    return type("Partial", (), {name: lambda self, *args: None for name in names})


@pytest.fixture
def families() -> Families:
    return Families(BUILT_IN, {})


def test_a_class_that_lacks_parts_is_told_which(families: Families) -> None:
    with pytest.raises(ValueError, match="Partial for 'new', which lacks blank, visual;"):
        families.register("new", with_parts(*PARTS[:4]))
    assert "new" not in families
    families.register("new", with_parts(*PARTS))
    assert families.named("new").model_type == "new"
    assert list(families) == [*BUILT_IN, "new"]


def test_a_module_serves_as_well(families: Families) -> None:
    module = types.ModuleType("of_functions")
    for name in PARTS[1:]:
        setattr(module, name, lambda *args: None)
    with pytest.raises(ValueError, match="of_functions for 'new', which lacks find;"):
        families.register("new", module)
    module.find = lambda model: model  # type: ignore[attr-defined]
    families.register("new", module)
    model = nn.Linear(1, 1)
    assert families.named("new").find(model) is model
    assert isinstance(families.named("new"), Family)
    with pytest.raises(ValueError, match="expected a class or a module"):
        families.register("other", object())


def test_a_model_type_has_one_family(families: Families) -> None:
    first = with_parts(*PARTS)
    families.register("new", first)
    families.register("new", first)
    with pytest.raises(ValueError, match=r"'new', which .*Partial.* has already"):
        families.register("new", with_parts(*PARTS))
    with pytest.raises(ValueError, match=r"'mllama', which ds_lvx\.models\.mllama"):
        families.register("mllama", first)
    known = ", ".join((*BUILT_IN, "new"))
    known += "; did you mean 'new'\\? for another see ds_lvx.register_family"
    with pytest.raises(NotImplementedError, match=f"'newer'; expected one of {known}"):
        families.named("newer")


def test_a_model_is_known_by_its_attribute_or_its_config() -> None:
    class Plain(nn.Module):
        model_type = "plain_test"

    class Unasked(nn.Module):
        @property
        def config(self) -> Any:
            raise AssertionError("with every batch all modules are looked at")

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(model_type="plain_test")
            self.inside = Unasked()

    class OfBoth(with_parts(*PARTS)):  # type: ignore[misc]
        def find(self, model: nn.Module) -> Any:
            return next(m for m in model.modules() if isinstance(m, Plain | Configured))

    register_family("plain_test", OfBoth)
    try:
        for model in (Plain(), Configured()):
            family, inside = family_of(nn.Sequential(model))
            assert family.model_type == "plain_test"
            assert inside is model
    finally:
        FAMILIES.forget("plain_test")
    with pytest.raises(NotImplementedError, match=r"class Plain; .*mllama.*register_family"):
        family_of(Plain())
    Plain.model_type = "idefics2"
    with pytest.raises(NotImplementedError, match=r"did you mean 'idefics'\?"):
        family_of(Plain())


def test_a_tool_names_the_part_that_it_misses(families: Families) -> None:
    families.register("new", with_parts(*PARTS))
    family = families.named("new")
    for call in (
        lambda: family.dimensions({}, "", ""),
        lambda: family.frame_tokens(None),
        lambda: family.config(Size(vocabulary=1)),
        family.tiny,
        family.regions,
        lambda: family.vision_tower(None),
    ):
        with pytest.raises(NotImplementedError, match=r"family 'new' \(Partial\) has no \w+\(\)"):
            call()
    assert families.dimensions()["new"] == family.dimensions


def test_a_family_over_a_shared_base_misses_parts_by_name(families: Families) -> None:
    outside = type("Outside", (type(families.named("smolvlm")),), {"sized": None})
    families.register("outside", outside)
    family, processor = families.named("outside"), object()
    assert not family.has("tiny")
    assert families.named("smolvlm").has("tiny")
    for call in (
        family.tiny,
        family.size,
        lambda: family.shown(processor, Medium(None, (1, 1))),
        lambda: family.media(processor, [], dtype=torch.float32),
    ):
        with pytest.raises(NotImplementedError, match=r"'outside' \(Outside\) has no \w+\(\)"):
            call()


PLANNING = """
import sys, types
package = types.ModuleType("ds_lvx")
package.__path__ = ["ds_lvx"]
sys.modules["ds_lvx"] = package
import ds_lvx.models.mllama
from ds_lvx.models.registry import FAMILIES
print(len(FAMILIES.known()), *FAMILIES.dimensions())
print(sorted({"torch", "transformers", "deepspeed"} & set(sys.modules)))
"""


def test_the_planner_gets_dimensions_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANNING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, imported = done.stdout.splitlines()
    count, *names = first.split()
    assert int(count) >= 34
    assert names == [*KNOWN]
    assert {*names} == {*BUILT_IN}
    assert imported == "[]"


# ---- who names a family

CASES = (
    "launch/bench/kernels/",
    "launch/bench_kernels.py",
    "launch/bench_layout.py",
    "launch/bench_memory.py",
)
"""Measure shapes of named models."""
FAMILY = re.compile(
    "|".join((*BUILT_IN, r"llama-3\.2", "moss", "flamingo", "blip", "video_?llama", "t5gemma")),
    re.IGNORECASE,
)
USAGE = re.compile(r"--model |--deepspeed_config |ds_configs/")


def test_outside_of_models_nothing_names_a_family() -> None:
    named = []
    for path in sorted([*(ROOT / "ds_lvx").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("ds_lvx/models/", *CASES)):
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if FAMILY.search(line) and not USAGE.search(line):
                named.append(f"{name}:{number}: {line.strip()}")
    assert not named, "\n".join(named)
