"""The model that is trained to measure: its size, weights, batch, rules and parts.

What is particular to a family of models, the family's contract answers. Sizes are those of the
first family's published model unless they are cut; weights are random, or a checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ds_lvx.config import LVXConfig
from ds_lvx.models import FAMILIES
from ds_lvx.models.contract import Family
from ds_lvx.models.dimensions import Layers
from ds_lvx.models.remote import read_config
from ds_lvx.models.size import Size
from ds_lvx.plan.memory import Setting
from ds_lvx.plan.units import at_least

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BUCKET_ELEMENTS = 2**23  # two of the largest weights that train for the memory's measurement
_KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm")

Regions: TypeAlias = Mapping[str, str]
"""Part of the model, by a regular expression for the whole name of a module."""


@dataclass(frozen=True)
class Case:
    """A model's sizes, and what of it trains."""

    # Of the text model, whose cross-attention layers come first.
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    cross_layers: int = 8
    self_layers: int = 0
    mlp: int = 64
    head_dim: int = 0  # 0: hidden / heads
    experts: int = 0  # 0: one MLP, without a router
    chosen_experts: int = 0
    state_heads: int = 0  # 0: no layer carries a state along the text
    state_values: int = 0
    state_dim: int = 0
    vocabulary: int = 512
    text_tokens: int = 256  # of the one sample, over all ranks
    # Of the vision tower, and of a frame.
    vision_hidden: int = 16
    vision_heads: int = 2
    vision_mlp: int = 32
    vision_layers: int = 1
    vision_global_layers: int = 1
    image_size: int = 8
    patch_size: int = 1
    tiles: int = 1
    # Of the text model, ``"kv"`` (what makes K and V of the visual features), ``"cross"`` (all of
    # the cross-attention layers) or ``"all"``.
    trains: str = "kv"
    # ``"trained"`` (the projector trains, so the features need a gradient), ``"frozen"``, or
    # ``"tower"`` (the vision tower trains as well).
    features: str = "trained"
    family: str = ""  # its ``model_type``; empty for the first one that ds_lvx knows
    trust_remote_code: bool = False  # code that comes with a checkpoint may run

    @classmethod
    def of(cls, size: Size, family: str) -> Case:
        """A whole model of a size; all of it trains."""
        cross = len(size.cross_at)
        return cls(
            **{k: v for k, v in vars(size).items() if k in cls.__dataclass_fields__},
            cross_layers=cross,
            self_layers=size.layers - cross,
            trains="all",
            features="tower",
            family=family,
        )

    def contract(self) -> Family:
        """The family."""
        return FAMILIES.named(self.family) if self.family else FAMILIES.default()

    def config(self, *, cross_at: Sequence[int] | None = None, positions: int = 2) -> Any:
        """The configuration of a model of these sizes, cross-attention layers first by default.

        It has at least so many ``positions``, and those of the text.
        """
        words = {k: v for k, v in vars(self).items() if k in Size.__dataclass_fields__}
        at = tuple(range(self.cross_layers) if cross_at is None else cross_at)
        return self.contract().config(
            Size(
                **words,
                layers=max(self.cross_layers + self.self_layers, *(each + 1 for each in at)),
                cross_at=at,
                positions=max(self.text_tokens, positions),
                rope_theta=5e5,
                pad=None,  # no sequence here begins, ends or is padded by a token
            )
        )

    @property
    def attends(self) -> str:
        """The kind of layers whose methods are compared: those that look at visual tokens."""
        return "cross" if "cross" in self.contract().patterns else "self"

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame."""
        return self.contract().frame_tokens(self.config())

    @property
    def layers(self) -> Layers:
        """Those that look at visual tokens."""
        head_dim = self.head_dim or self.hidden // self.heads
        return Layers(self.cross_layers, self.hidden, self.heads, self.kv_heads, head_dim, self.mlp)


TINY = Case(
    hidden=512,
    heads=8,
    kv_heads=4,
    cross_layers=2,
    self_layers=2,
    mlp=1024,
    vocabulary=128,
    vision_layers=2,
    image_size=112,
    patch_size=7,
    trains="all",
    features="tower",
)
"""A model of some nine million weights, with heads of a real size and 257 visual tokens a frame."""


def random_models() -> list[str]:
    """Models with random weights, by name; any other name is that of a checkpoint."""
    return ["tiny", *(name for name in FAMILIES if FAMILIES.named(name).has("build"))]


def random_case(name: str) -> Case:
    """The sizes of one of `random_models`."""
    return TINY if name == "tiny" else Case.of(FAMILIES.named(name).size(), name)


def cut(case: Case, *, hidden: int | None = None, **layers: int | None) -> Case:
    """A model of fewer (``cross_layers``, ...) or narrower layers; None leaves a size as it is.

    The size of a head stays, and how many query heads share one of K and V.

    Raises:
        ValueError: a ``hidden`` that is no multiple of the size of a head, or no layers.
    """
    changes: dict[str, Any] = {name: value for name, value in layers.items() if value is not None}
    for name, value in changes.items():
        at_least(0 if name == "self_layers" else 1, **{name: value})
    if "vision_layers" in changes:
        changes["vision_global_layers"] = min(case.vision_global_layers, changes["vision_layers"])
    if hidden is not None:
        head_dim = case.layers.head_dim
        heads, rest = divmod(hidden, head_dim)
        if rest or heads < 1:
            raise ValueError(f"--hidden: got {hidden}; expected a multiple of {head_dim}, a head")
        shared = case.heads // case.kv_heads
        kv_heads = heads // shared if heads % shared == 0 else heads
        mlp = max(case.mlp * hidden // case.hidden, 1)
        changes |= {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "mlp": mlp}
        if case.state_heads > 0:
            of_keys = max(case.state_heads * hidden // case.hidden, 1)
            of_values = case.state_values // case.state_heads * of_keys
            changes |= {"state_heads": of_keys, "state_values": of_values}
    return replace(case, **changes)


def case_of(checkpoint: str, *, trust_remote_code: bool = False) -> Case:
    """The sizes of a checkpoint, by its config (folder or hub name); all of it trains.

    Raises:
        ValueError: it cannot be read, is of another family, or has nothing to compare.
    """
    if checkpoint in FAMILIES:
        _check_cross(checkpoint, checkpoint)
        raise ValueError(
            f"--model: got {checkpoint!r}, a family without models of random weights: their code "
            "comes with checkpoints; expected folder or hub name of one"
        )
    try:
        config = read_config(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model: got {checkpoint!r}, which cannot be read ({error}); expected "
            f"{', '.join(random_models())}, or folder or hub name of a checkpoint"
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"--model: got {checkpoint!r}, a model of type {config.model_type!r}; expected one of "
            f"type {', '.join(map(repr, FAMILIES))}; {FAMILIES.advice(config.model_type)}"
        )
    _check_cross(checkpoint, config.model_type)
    case = Case.of(FAMILIES.named(config.model_type).size(config), config.model_type)
    return replace(case, trust_remote_code=trust_remote_code)


def _check_cross(name: str, model_type: str) -> None:
    family = FAMILIES.named(model_type)
    if "cross" not in family.patterns and not family.has("random_frames"):
        raise ValueError(
            f"--model: got {name!r}, of a family whose images are tokens of the text; expected a "
            "model with cross-attention, whose methods are compared"
        )


def build_model(
    case: Case, *, checkpoint: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """The model, on the device that tensors are made on; only what the case trains has gradients.

    Without a checkpoint its weights are drawn in bf16, with open gates: the same every time on one
    kind of device.
    """
    family = case.contract()
    model: nn.Module
    if checkpoint is not None:
        trusts = {"trust_remote_code": True} if case.trust_remote_code else {}
        model = family.load(checkpoint, dtype, **trusts)
    else:
        torch.manual_seed(0)
        model = family.build(case.config(), gate=1.0, dtype=torch.bfloat16).to(dtype)
    trained = _trained(model, case)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _trained(model: nn.Module, case: Case) -> set[str]:
    """The parameters that a case trains, by name."""
    family = case.contract()
    tower = {id(parameter) for parameter in family.vision_tower(model).parameters()}
    layers = [layer.name for layer in family.attention_layers(model) if layer.kind == case.attends]
    inside = tuple(f"{name}." for name in layers)
    around = tuple(f"{name.rpartition('.')[0]}." for name in layers)

    def trains(name: str, parameter: nn.Parameter) -> bool:
        if part_of(name, family.regions()) == "vision":
            return case.features == "tower" or (
                case.features == "trained" and id(parameter) not in tower
            )
        if case.trains == "kv":
            return name.startswith(inside) and any(part in name for part in _KEYS_AND_VALUES)
        return case.trains == "all" or name.startswith(around)

    return {name for name, parameter in model.named_parameters() if trains(name, parameter)}


def part_of(name: str, regions: Regions) -> str | None:
    """The part of a step that a module or parameter belongs to: the innermost module's with one."""
    while name:
        for pattern, part in regions.items():
            if re.fullmatch(pattern, name):
                return part
        name = name.rpartition(".")[0]
    return None


def make_batch(
    case: Case,
    *,
    frames: Sequence[int],
    total: int,
    dtype: torch.dtype = torch.bfloat16,
    config: Any = None,
) -> dict[str, Tensor]:
    """One sample of random text and frames; every token sees all frames.

    Of ``total`` frames those are there that ``shard_batch(..., frames="local")`` is to get; a frame
    is the same whoever makes it. ``config`` is the case's where it is not given.
    """
    config = case.config() if config is None else config
    batch = case.contract().random_frames(
        config, text_tokens=case.text_tokens, total=total, frames=frames, seed=0
    )
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.items()}


def ds_config(
    setting: Setting,
    case: Case,
    *,
    ranks: int,
    schedule: str | None = None,
    dtype: str = "bfloat16",
    zero_stage: int = 2,
    text_method: str = "ulysses",
) -> dict[str, Any]:
    """The ds_config that trains a case on ``ranks`` ranks, all of the job, that share one sample.

    ``setting`` and ``schedule`` (of lvx; None is the default) are the cross-attention's,
    ``text_method`` the text's. ``dtype`` is ``"bfloat16"`` or ``"float32"``.
    """
    match = case.contract().patterns
    rule = {"match": match[case.attends], **setting.rule()}
    if schedule is not None:
        rule["schedule"] = schedule
    rules: list[dict[str, Any]] = [{"match": match["local"], "method": "none"}, rule]
    if case.self_layers > 0 and ranks > 1:
        rules.append({"match": match["self"], "method": text_method})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage},
        "ds_lvx": {"sequence_parallel_size": ranks, "layers": rules},
    }
    if zero_stage in (1, 2):
        buckets = ("reduce_bucket_size", "allgather_bucket_size")
        config["zero_optimization"] |= dict.fromkeys(buckets, _BUCKET_ELEMENTS)
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if setting.checkpointing:
        config["activation_checkpointing"] = {}
    LVXConfig.from_ds_config(config)
    return config
