"""Which method runs in which attention layer of a model, and what is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import nn

from ds_lvx.attention.auto import Cluster, Wanted, explain
from ds_lvx.attention.projection import Turns
from ds_lvx.attention.recompute import STREAMED_TOKENS
from ds_lvx.attention.shape import Hybrid
from ds_lvx.config import LayerRule, LVXConfig, pattern_for, starred, summarise_names
from ds_lvx.config.registry import AUTO
from ds_lvx.config.words import shown

Kind: TypeAlias = Literal["self", "cross", "local", "recurrent"]
"""Text to text, text to images, an encoder's layer that never leaves its rank, or one that carries
a state along the text."""

_WHAT = {
    "self": "looks at the whole text, and the text is sharded",
    "cross": "looks at all images, and the images are sharded",
}
_PROPOSAL = {"self": "ulysses", "cross": "lvx"}
_REPLICATED = ("lvx", "replicated")
_Problem: TypeAlias = tuple[type[Exception], str, str]
"""What is refused: the error's kind, what was got, and what to do, which says `_PATTERN` where it
proposes one for the layers."""
_PATTERN = "PATTERN"


@dataclass(frozen=True)
class Layer:
    """An attention module as its family describes it.

    Attributes:
        name: the qualified name inside the model, without wrappers such as peft's.
        kind: what it attends to.
        module: the attention module itself.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: of both.
        features_dim: width of what K and V are projected from.
        replicated: every rank has all of its queries, and does the same with what it returns: it
            runs by lvx's schedule ``replicated``, and a rule has nothing to choose but a kernel.
    """

    name: str
    kind: Kind
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    features_dim: int
    replicated: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """How one attention layer runs; the fields are those of `LayerRule`."""

    name: str
    kind: Kind
    method: str
    schedule: str
    kernel: str
    recompute_kv: bool
    features: str = "keep"
    kv_chunk_tokens: int | None = None
    ulysses: int | None = None
    across: str = AUTO

    @cached_property
    def names(self) -> str:
        """Of all layers of its kind, with a star for their number."""
        return starred(self.name)

    @cached_property
    def turns(self) -> Turns:
        """The layer's own, where it projects K and V again."""
        return Turns()

    @cached_property
    def hybrid(self) -> Hybrid | None:
        """The subgroups, where that is the method."""
        if self.ulysses is None:
            return None
        default = "lvx" if self.kind == "cross" else "ring"
        return Hybrid(self.ulysses, default if self.across == AUTO else self.across)

    def chunk_tokens(self) -> int | None:
        """Visual tokens whose K and V exist at a time; None for all."""
        if self.kv_chunk_tokens is None and self.features == "offload":
            return STREAMED_TOKENS  # on a CPU, too, where nothing has to be streamed
        return self.kv_chunk_tokens

    @cached_property
    def wanted(self) -> Wanted:
        """What the planner is to choose, and from what."""
        chunked = self.chunk_tokens() is not None
        return Wanted(self.method, self.schedule, self.recompute_kv, chunked, self.hybrid)

    def record(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self)


def make_plans(layers: Sequence[Layer], config: LVXConfig, *, sp_size: int) -> list[LayerPlan]:
    """Decide for every attention layer how it runs.

    Raises:
        ValueError: a rule matches no layer, a layer over sharded tokens has no method, or a
            method cannot split its heads.
        NotImplementedError: a combination that does not exist.
    """
    rules = config.resolve([layer.name for layer in layers])
    plans = [_plan(layer, rules) for layer in layers]
    if missing := _without_method(plans, sp_size):
        raise ValueError("\n".join(missing))
    names: dict[_Problem, list[str]] = {}
    for layer, plan in zip(layers, plans, strict=True):
        if problem := _problem(layer, plan, sp_size):
            names.setdefault(problem, []).append(plan.name)
    if kept := _mixed_features(plans):
        names[_MIXED] = kept
    for kind in dict.fromkeys(kind for kind, _, _ in names):
        raise kind(
            "\n".join(
                f"ds_lvx.layers: got {got} for {', '.join(summarise_names(found))}, "
                + why.replace(_PATTERN, pattern_for(found, _others(layers, found)))
                for (this, got, why), found in names.items()
                if this is kind
            )
        )
    return plans


def _others(layers: Sequence[Layer], names: Sequence[str]) -> list[str]:
    return [layer.name for layer in layers if layer.name not in names]


def _plan(layer: Layer, rules: Mapping[str, LayerRule | None]) -> LayerPlan:
    rule = rules[layer.name]
    if layer.replicated and (rule is None or _allows_replicated(rule)):
        kernel = AUTO if rule is None else rule.kernel
        return LayerPlan(layer.name, layer.kind, *_REPLICATED, kernel, False)
    if layer.kind == "recurrent" and (rule is None or rule.method in (AUTO, "none")):
        return LayerPlan(layer.name, layer.kind, "ulysses", "auto", "auto", False)
    # An image is encoded on the rank that holds it: there is nothing to choose.
    if rule is None or (layer.kind == "local" and rule.method == "auto"):
        return LayerPlan(layer.name, layer.kind, "none", "auto", "auto", False)
    return LayerPlan(
        layer.name,
        layer.kind,
        rule.method,
        rule.schedule,
        rule.kernel,
        rule.recompute_kv,
        rule.features,
        rule.kv_chunk_tokens,
        rule.ulysses,
        rule.across,
    )


def _allows_replicated(rule: LayerRule) -> bool:
    """Whether a rule leaves lvx's schedule ``replicated`` to a layer that has to run by it."""
    open_method = rule.method in (AUTO, "none")
    named = rule.method == _REPLICATED[0] and rule.schedule in (AUTO, _REPLICATED[1])
    return (open_method or named) and not rule.recompute_kv


def _without_method(plans: Sequence[LayerPlan], sp_size: int) -> list[str]:
    if sp_size == 1:
        return []
    lines = []
    for kind in ("self", "cross"):
        names = [p.name for p in plans if p.kind == kind and p.method == "none"]
        for name in summarise_names(names):
            pattern = pattern_for(names, (p.name for p in plans if p.kind != kind))
            lines.append(
                f"ds_lvx.layers: {name} has no method (or none), but it {_WHAT[kind]} over "
                f'{sp_size} ranks; add {{"match": "{pattern}", "method": "{_PROPOSAL[kind]}"}}'
            )
    return lines


def _problem(layer: Layer, plan: LayerPlan, sp_size: int) -> _Problem | None:
    if layer.kind == "local" and plan.method != "none":
        return (
            NotImplementedError,
            f'method "{plan.method}"',
            "but an image is encoded on the rank that holds it; put a rule such as "
            f'{{"match": "{_PATTERN}", "method": "none"}} first',
        )
    if layer.replicated:
        if (plan.method, plan.schedule, plan.recompute_kv) == (*_REPLICATED, False):
            return None
        return (
            NotImplementedError,
            f'method "{plan.method}", schedule "{plan.schedule}", recompute_kv {plan.recompute_kv}',
            "whose queries every rank has; expected no rule for it, or "
            '{"method": "lvx", "schedule": "replicated"}',
        )
    if layer.kind == "recurrent" and (plan.method != "ulysses" or plan.kernel != AUTO):
        return (
            NotImplementedError,
            f'method "{plan.method}", kernel "{plan.kernel}"',
            "which carries a state from token to token by a kernel of its own; expected no rule "
            'for it, or {"method": "ulysses"}: give the rule for attention a pattern that matches '
            "those layers only",
        )
    split = sp_size if plan.method == "ulysses" else plan.ulysses or 1
    if layer.num_heads < split:
        key = "sequence_parallel_size" if plan.ulysses is None else "ulysses"
        instead = "" if layer.kind == "recurrent" else "lvx or ring, or "
        return (
            ValueError,
            f"ulysses on {split} ranks",
            f"attention with {layer.num_heads} heads; expected at least one head a rank: use "
            f"{instead}a smaller {key}",
        )
    if plan.hybrid is not None and plan.hybrid.across == "ring" and plan.schedule != AUTO:
        return (
            NotImplementedError,
            f'schedule "{plan.schedule}"',
            'where a hybrid\'s across is ring, which has no schedules; use across "lvx", or remove '
            "schedule",
        )
    for key in ("features", "kv_chunk_tokens"):
        value = getattr(plan, key)
        if layer.kind in ("self", "recurrent") and value not in ("keep", None):
            return (
                NotImplementedError,
                f"{key} {shown(value)}",
                "which attends to text; it is for cross-attention to visual features: give its "
                "rule a pattern that matches those layers only",
            )
    if plan.schedule == "replicated" and sp_size > 1:
        return (
            NotImplementedError,
            'schedule "replicated"',
            "which needs the same queries on every rank, but the text is sharded; use "
            '"ring", "gather" or "auto" there',
        )
    return None


_MIXED: _Problem = (
    NotImplementedError,
    'features "keep"',
    'beside "offload" for other cross-attention layers; all of them share the same features: '
    "offload them in every rule for cross-attention, or in none",
)


def _mixed_features(plans: Sequence[LayerPlan]) -> list[str]:
    """Layers share one tensor of features: it is on the host for all of them, or for none.

    Returns those that keep it on the device beside others that do not.
    """
    cross = [p for p in plans if p.kind == "cross"]
    kept = [p.name for p in cross if p.features == "keep"]
    return kept if len(kept) < len(cross) else []


def table(plans: Sequence[LayerPlan]) -> str:
    """One line for each kind of layer: name, method, schedule, kernel, recomputation."""
    header = ("layer", "method", "schedule", "kernel", "recompute_kv")
    groups: dict[tuple[str, ...], list[str]] = {}
    for plan in plans:
        hybrid = plan.hybrid
        method = plan.method if hybrid is None else hybrid.name
        schedule = plan.schedule if method.endswith("lvx") else "-"
        own = plan.method == "none" or plan.kind == "recurrent"
        kernel = "-" if own else plan.kernel
        settings = (method, schedule, kernel, _recomputation(plan))
        groups.setdefault(settings, []).append(plan.name)
    rows: list[tuple[str, ...]] = [header]
    for columns, names in groups.items():
        rows += [(name, *columns) for name in summarise_names(names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


_EXAMPLES = {
    "cross": ((256, 1_000_000), (4_096, 100_000), (2_048, 2_048)),
    "self": ((1_024, 1_024), (16_384, 16_384)),
}
"""Text tokens, and tokens that they attend to, at which `explain_auto` says what it would take."""


def explain_auto(
    layers: Sequence[Layer], plans: Sequence[LayerPlan], cluster: Cluster, *, sp_size: int
) -> list[str]:
    """What ``auto`` would take in a group of ``sp_size`` ranks: a line for each kind of layer."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for layer, plan in zip(layers, plans, strict=True):
        if plan.wanted.is_open and layer.kind != "local":
            heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
            kinds.setdefault((plan.wanted, layer.kind, heads), []).append(layer.name)
    lines = []
    for (wanted, kind, heads), names in kinds.items():
        sizes = _EXAMPLES[kind]
        words = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
        example = explain(wanted, cluster, heads=words, ranks=sp_size, sizes=sizes)
        lines += [
            f"auto, {name}, by the lengths of each batch: {example}"
            for name in summarise_names(names)
        ]
    if lines:
        lines.append(f"auto: predicted from {cluster.source}")
    return lines


def _recomputation(plan: LayerPlan) -> str:
    if not plan.recompute_kv:
        return "no"
    words = ["yes"]
    if plan.features == "offload":
        words.append("features on the host")
    if plan.kv_chunk_tokens is not None:
        words.append(f"{plan.kv_chunk_tokens} tokens at a time")
    return ", ".join(words)
