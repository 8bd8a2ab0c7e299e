"""The model families that ds_lvx knows, by ``model_type``; each is imported when it is asked for.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract, isclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ds_lvx.models.contract import Family

if TYPE_CHECKING:
    from torch import nn

    from ds_lvx.models.dimensions import Model

Dimensions: TypeAlias = "Callable[[Mapping[str, Any], str, str], Model]"

BUILT_IN: Mapping[str, str] = {
    "mllama": "ds_lvx.models.mllama.family:Mllama",
    "moss_vl": "ds_lvx.models.moss_vl.family:MossVL",
    "idefics": "ds_lvx.models.idefics.family:Idefics",
    "mplugowl3": "ds_lvx.models.mplugowl3.family:MPlugOwl3",
    "openflamingo": "ds_lvx.models.openflamingo.family:OpenFlamingo",
    "blip-2": "ds_lvx.models.adapters.blip:Blip2",
    "instructblip": "ds_lvx.models.adapters.blip:InstructBlip",
    "instructblipvideo": "ds_lvx.models.adapters.blip:InstructBlipVideo",
    "qwen": "ds_lvx.models.qwen_vl.family:QwenVL",
    "video_llama": "ds_lvx.models.video_llama.family:VideoLlama",
    "t5gemma2": "ds_lvx.models.t5gemma2.family:T5Gemma2",
    "qwen2_5_vl": "ds_lvx.models.qwen2_5_vl.family:Qwen25VL",
    "qwen2_vl": "ds_lvx.models.qwen2_vl.family:Qwen2VL",
    "qwen3_vl": "ds_lvx.models.qwen3_vl.family:Qwen3VL",
    "qwen3_vl_moe": "ds_lvx.models.qwen3_vl_moe.family:Qwen3VLMoe",
    "qwen3_5": "ds_lvx.models.qwen3_5.family:Qwen35",
    "qwen3_5_moe": "ds_lvx.models.qwen3_5_moe.family:Qwen35Moe",
    "glm4v": "ds_lvx.models.glm4v.family:Glm4V",
    "glm46v": "ds_lvx.models.glm46v.family:Glm46V",
    "glm4v_moe": "ds_lvx.models.glm4v_moe.family:Glm4vMoe",
    "gemma3": "ds_lvx.models.gemma3.family:Gemma3",
    "gemma4": "ds_lvx.models.gemma4.family:Gemma4",
    "internvl": "ds_lvx.models.internvl.family:InternVL",
    "llava_onevision": "ds_lvx.models.llava_onevision.family:LlavaOnevision",
    "video_llama_3": "ds_lvx.models.video_llama_3.family:VideoLlama3",
    "smolvlm": "ds_lvx.models.smolvlm.family:SmolVLM",
    "idefics3": "ds_lvx.models.smolvlm.family:Idefics3",
}
"""``model_type`` -> where its `Family` is."""

CLASSES: Mapping[str, str] = {"Flamingo": "openflamingo", "VideoLLAMA": "video_llama"}
"""``model_type`` of models that carry none, by the name of their class."""

_ROOMS = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), "adapters"),
    "qwen": "qwen_vl",
    "idefics3": "smolvlm",
}
KNOWN: Mapping[str, str] = {
    name: f"ds_lvx.models.{_ROOMS.get(name, name)}.dimensions"
    for name in (
        *("mllama", "moss_vl", "mplugowl3", "openflamingo", "idefics", "t5gemma2"),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        *("glm4v", "glm46v", "glm4v_moe", "gemma3", "gemma4", "internvl"),
        *("llava_onevision", "smolvlm", "video_llama", "video_llama_3"),
        *_ROOMS,
    )
}
"""``model_type`` -> the module with ``known``, a function that returns models known by name, and
where a config can be read, ``dimensions``, as in `Family`. The planner predicts more models than
can be sharded."""


class Families:
    """Families by ``model_type``: built in, and registered from outside."""

    def __init__(self, built_in: Mapping[str, str], known: Mapping[str, str]) -> None:
        self._paths = built_in
        self._known = known
        self._made: dict[str, Family] = {}
        self._given: dict[str, Any] = {}

    def __iter__(self) -> Any:
        """Every ``model_type``, the built-in ones first."""
        return iter(dict.fromkeys((*self._paths, *self._given)))

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._paths or model_type in self._given

    def register(self, model_type: str, family: Any) -> None:
        """See `register_family`."""
        if self._given.get(model_type) is family:
            return
        if model_type in self:
            there = self._given.get(model_type, self._paths.get(model_type))
            raise ValueError(
                f"register_family: got {model_type!r}, which {there} has already; register each "
                "model_type once"
            )
        made = _made(model_type, family)
        self._made[model_type], self._given[model_type] = made, family

    def forget(self, model_type: str) -> None:
        """Take a registered family out again."""
        del self._given[model_type], self._made[model_type]

    @contextmanager
    def instead(self, model_type: str, family: Any) -> Iterator[None]:
        """While the context is open, another family for a ``model_type``: a peer's, to compare."""
        before = self.named(model_type)
        self._made[model_type] = _made(model_type, family)
        try:
            yield
        finally:
            self._made[model_type] = before

    def named(self, model_type: str) -> Family:
        """The family of a ``model_type``.

        Raises:
            NotImplementedError: there is none; names those there are.
        """
        if model_type not in self:
            raise NotImplementedError(
                f"got a model of type {model_type!r}; expected one of {', '.join(self)}; "
                f"{self.advice(model_type)}"
            )
        if model_type not in self._made:
            module, _, name = self._paths[model_type].partition(":")
            self._made[model_type] = _made(model_type, getattr(import_module(module), name))
        return self._made[model_type]

    def advice(self, model_type: str) -> str:
        """What to do about a ``model_type`` without a family, for an error: the nearest, if one is
        like it, and how to add one."""
        near = get_close_matches(model_type, self, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{hint}for another see ds_lvx.register_family and docs/adding-a-model.md"

    def default(self) -> Family:
        """The family of tools that were told none."""
        return self.named(next(iter(self)))

    def dimensions(self) -> dict[str, Dimensions]:
        """How the planner reads a config, by ``model_type``. Imports no torch by itself."""
        modules = {name: import_module(path) for name, path in self._known.items()}
        known = {n: m.dimensions for n, m in modules.items() if hasattr(m, "dimensions")}
        return {**known, **{name: self._made[name].dimensions for name in self._given}}

    def known(self) -> tuple[Model, ...]:
        """The models that the planner knows by name."""
        paths = dict.fromkeys(self._known.values())
        return tuple(m for path in paths for m in import_module(path).known())


def _made(model_type: str, given: Any) -> Family:
    """An object that fulfils the contract, from a class or a module."""
    kind = given
    if isinstance(given, ModuleType):
        parts = {
            name: staticmethod(part) if isinstance(part, FunctionType) else part
            for name, part in vars(given).items()
            if not name.startswith("_") and hasattr(Family, name)
        }
        kind = type(given.__name__, (Family,), parts)
    elif not isclass(given):
        raise ValueError(
            f"register_family: got {given!r} for {model_type!r}; expected a class or a module with "
            "the parts of ds_lvx.models.contract.Family"
        )
    elif not issubclass(given, Family):
        kind = type(given.__name__, (given, Family), {})
    if isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise ValueError(
            f"register_family: got {given.__name__} for {model_type!r}, which lacks {missing}; "
            "ds_lvx.models.contract.Family says what each has to do"
        )
    family: Family = kind()
    family.model_type = model_type
    return family


FAMILIES = Families(BUILT_IN, KNOWN)


def register_family(model_type: str, family: Any) -> None:
    """Make a model family from outside the package known.

    Args:
        model_type: what its models carry as ``model.config.model_type`` (as transformers' do) or as
            ``model.model_type``, on the model itself or on one inside wrappers.
        family: a class, made once without arguments, or a module, that fulfils the contract
            (`ds_lvx.models.contract.Family`, ``docs/adding-a-model.md``).

    Raises:
        ValueError: something else is registered under ``model_type``, or required parts are
            missing; names them.
    """
    FAMILIES.register(model_type, family)


def check_packs(family: Family, option: str) -> None:
    """Refuse a family whose rows of text cannot hold several samples.

    Args:
        family: of the model.
        option: the name of what asks for it.

    Raises:
        NotImplementedError: names the families that can.
    """
    if family.has("packed_frames"):
        return
    able = [name for name in FAMILIES if FAMILIES.named(name).has("packed_frames")]
    raise NotImplementedError(
        f"{option}: got a model of the family {family.model_type!r}, whose samples cannot share a "
        f"row of text; expected one of {', '.join(able)}: leave {option} out"
    )


def family_of(model: nn.Module) -> tuple[Family, Any]:
    """The family of a model, and the model itself inside its wrappers (peft, an engine).

    Raises:
        ValueError: no module.
        NotImplementedError: no family that is known.
    """
    if not hasattr(model, "modules"):  # this module imports no torch
        raise ValueError(f"got a model of type {type(model).__name__}; expected a torch.nn.Module")
    seen = set()
    for module in model.modules():  # from outside in, until one is known: each batch asks
        model_type = _model_type(module)
        if model_type in FAMILIES and model_type not in seen:
            seen.add(model_type)
            family = FAMILIES.named(model_type)
            inside = family.find(model)
            if inside is not None:
                return family, inside
    raise NotImplementedError(
        f"got a model of class {type(model).__name__}; expected one of the model types "
        f"{', '.join(FAMILIES)}, or a model that wraps one; {FAMILIES.advice(_model_type(model))}"
    )


def _model_type(module: nn.Module) -> str:
    of_config = getattr(getattr(module, "config", None), "model_type", None)
    if of_config is None:
        of_config = getattr(module, "model_type", None)
    names = (CLASSES.get(kind.__name__) for kind in type(module).__mro__)
    return str(next(filter(None, names), None) if of_config is None else of_config)
