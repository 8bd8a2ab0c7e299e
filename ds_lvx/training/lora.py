"""What LoRA trains: the modules that get its matrices, and those that train whole beside them.

Names mean what they mean to peft: a name is a module's own, whole or from a dot to its end; a
regular expression is for the whole name; ``all-linear`` is every linear layer but the head. What
peft leaves to its user is refused or left out here: names that are no module's, which it passes
over; a weight that two modules share, of which it would train one; what the run leaves as it is
(``--freeze_vision``, or a family that freezes parts of its own); a projection inside
``nn.MultiheadAttention``, which is never called, so that its matrices would learn nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ds_lvx.models.precision import is_packed

if TYPE_CHECKING:
    from torch import nn

    from ds_lvx.models.contract import Family

ALL_LINEAR = "all-linear"
_NAMES = re.compile(r"[\w.]+(,[\w.]+)*")
_TARGETS, _SAVED = "--lora_target_modules", "--lora_modules_to_save"
_PACKED = "--load_in_4bit"
_MOST_NAMED = 40


def check_words(options: Any) -> None:
    """Look at the words of the command line alone.

    Raises:
        ValueError: targets, or 4 bits, without LoRA; a regular expression that is none, or not
            by itself.
    """
    for option, given in (
        (_TARGETS, options.lora_target_modules is not None),
        (_SAVED, options.lora_modules_to_save is not None),
        (_PACKED, options.load_in_4bit),
    ):
        if given and options.lora_r == 0:
            raise ValueError(f"{option}: got no LoRA; expected its rank beside them: --lora_r 8")
    targets_of(options.lora_target_modules or ())
    names_of(options.lora_modules_to_save or (), _SAVED)


def targets_of(words: Sequence[str]) -> str | list[str]:
    """What peft takes as ``target_modules``: names, a regular expression, or `ALL_LINEAR`.

    Args:
        words: of the command line; several names in one may have commas between them.

    Raises:
        ValueError: a regular expression that is none, or not by itself.
    """
    if len(words) != 1 or (words[0] != ALL_LINEAR and _NAMES.fullmatch(words[0])):
        return names_of(words, _TARGETS)
    try:
        re.compile(words[0])
    except re.error as error:
        raise ValueError(
            f"{_TARGETS}: got {words[0]!r}, which is no regular expression ({error}); expected "
            f"names, one regular expression, or {ALL_LINEAR}; correct it"
        ) from None
    return words[0]


def names_of(words: Sequence[str], option: str) -> list[str]:
    """The names of some words.

    Raises:
        ValueError: one is no name.
    """
    wrong = [word for word in words if not _NAMES.fullmatch(word)]
    if wrong:
        alone = f", or by itself a regular expression or {ALL_LINEAR}" if option == _TARGETS else ""
        raise ValueError(
            f"{option}: got {wrong[0]!r}; expected names of modules{alone}; correct it"
        )
    return [name for word in words for name in word.split(",")]


def with_lora(model: nn.Module, options: Any, family: Family) -> nn.Module:
    """peft's model around ``model``, of which LoRA trains, and what is asked for beside it.

    Args:
        model: of the family, whole or partitioned by ZeRO-3; what is frozen in it stays so.
        options: ``seed`` and ``lora_*``.
        family: of the model; its `lora_targets` are taken where the options name none.

    Raises:
        ValueError: names that no module has, or that cannot be trained so; lists what there is.
            The same on every rank.

    Collectives: under ZeRO-3, gathers of the modules that train whole, over all ranks.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    modules = dict(model.named_modules())
    named = options.lora_target_modules
    targets = family.lora_targets if named is None else targets_of(named)
    saved = _saved(modules, options, family.attention_layers(family.find(model)))
    excluded = _excluded(modules)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha or 2 * options.lora_r,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        modules_to_save=saved or None,
    )
    chosen = _chosen(modules, targets, {*saved, *excluded})
    if named is not None and targets != ALL_LINEAR:
        _check_targets(modules, targets, chosen, excluded)
    if any(_within(name, excluded) for name in _matched(modules, targets)):
        config.exclude_modules = rf"({'|'.join(map(re.escape, excluded))})(\..*)?"
    _check_whole(modules, chosen)
    _check_shared(modules, [*chosen, *saved])
    # Loading draws random numbers, and how many depends on the ZeRO stage.
    torch.manual_seed(options.seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # a module of a kind that it has no matrices for
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{_TARGETS}: got {_words(targets)}, which peft refuses ({reason}); expected names of "
            f"layers that have weights of their own, of them {_listed(_linear(modules))}; correct "
            "them"
        ) from error


# --------------------------------------------------------------------------------------------
# Names and modules


def _is(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _within(name: str, roots: Collection[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _matched(modules: Mapping[str, Any], targets: str | Sequence[str]) -> list[str]:
    """The modules that targets are the names of, as peft finds them."""
    if targets == ALL_LINEAR:
        return _linear(modules)
    if isinstance(targets, str):
        return [name for name in modules if re.fullmatch(targets, name)]
    return [name for name in modules if any(_is(name, wanted) for wanted in targets)]


def _chosen(
    modules: Mapping[str, Any], targets: str | Sequence[str], left_out: Collection[str]
) -> list[str]:
    return [name for name in _matched(modules, targets) if not _within(name, left_out)]


def _linear(modules: Mapping[str, Any]) -> list[str]:
    """All linear layers but the head, as peft has them for `ALL_LINEAR`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    ask = getattr(modules[""], "get_output_embeddings", None)
    head = None if ask is None else ask()
    kinds = (nn.Linear, Conv1D)
    return [name for name, each in modules.items() if isinstance(each, kinds) and each is not head]


def _excluded(modules: Mapping[str, Any]) -> list[str]:
    """Modules in which there is no LoRA: what is frozen, and what is used but never called."""
    from torch import nn

    left_out: list[str] = []
    for name, module in modules.items():
        if _within(name, left_out):
            continue
        # What is packed never trains, with LoRA on it or not: the weights around it tell.
        owners = [part for part in module.modules() if not _holds_packed(part)]
        weights = [weight for part in owners for weight in part.parameters(recurse=False)]
        if weights and not any(weight.requires_grad for weight in weights):
            left_out.append(name)
        elif isinstance(module, nn.MultiheadAttention):
            left_out += [f"{name}.{child}" for child, _ in module.named_children()]
    return left_out


def _holds_packed(module: Any) -> bool:
    return any(is_packed(weight) for weight in module.parameters(recurse=False))


def _saved(modules: Mapping[str, Any], options: Any, attention: Iterable[Any]) -> list[str]:
    """The whole names of the modules that train whole: peft's own search takes ``head`` for the
    end of ``lm_head``.

    Raises:
        ValueError: no module has such a name, or it cannot train whole.
    """
    from torch import nn

    names: list[str] = []
    for wanted in names_of(options.lora_modules_to_save or (), _SAVED):
        found = [name for name in modules if name and _is(name, wanted)]
        if not found:
            there = [n for n, each in modules.items() if n and any(True for _ in each.parameters())]
            raise ValueError(
                f"{_SAVED}: got {wanted!r}, which is the name of no module; expected names, or "
                f"their ends, of modules with weights: {_listed(there)}; correct it"
            )
        names += [name for name in found if name not in names]
    layers = {id(layer.module) for layer in attention}
    lists = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    for name in names:
        inner, weights = modules[name].modules(), [*modules[name].parameters()]
        why = None
        if isinstance(modules[name], lists):
            why = "a list of modules, which is never called"
        elif not weights:
            why = "without weights"
        elif any(id(each) in layers for each in inner):
            why = "with attention in it, which can have LoRA"
        elif any(is_packed(weight) for weight in weights):
            why = "whose weights are quantized, which can have LoRA"
        elif not all(weight.requires_grad for weight in weights):
            why = "that the run leaves as it is (--freeze_vision, or the family itself)"
        elif any(name != other and _within(name, [other]) for other in names):
            why = "inside another of them"
        if why is not None:
            raise ValueError(
                f"{_SAVED}: got {name}, a {type(modules[name]).__name__} {why}; expected modules "
                "with weights that train whole; take it out"
            )
    return names


# --------------------------------------------------------------------------------------------
# What is refused


def _check_targets(
    modules: Mapping[str, Any],
    targets: str | Sequence[str],
    chosen: Sequence[str],
    excluded: Sequence[str],
) -> None:
    """Raise a ValueError for a name or an expression by which nothing gets LoRA."""
    missed = [] if isinstance(targets, str) else [t for t in targets if not _matched(modules, [t])]
    if chosen and not missed:
        return
    got = repr(missed[0]) if missed else _words(targets)
    what = "which is the name of no module"
    if not missed and _matched(modules, targets):
        what = "which is only in what has no LoRA"
        if excluded:
            what += f" ({', '.join(excluded)})"
    raise ValueError(
        f"{_TARGETS}: got {got}, {what}; expected names of layers, or their ends, or {ALL_LINEAR}; "
        f"linear layers are {_listed(_linear(modules))}; correct it"
    )


def _check_whole(modules: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a ValueError for a layer that peft would take for one of its own weight alone."""
    from torch import nn

    for name in names:
        module = modules[name]
        inner = [child for child, each in module.named_children() if [*each.parameters()]]
        if isinstance(module, (nn.Linear, nn.Embedding)) and inner:
            raise ValueError(
                f"{_TARGETS}: got {name}, a {type(module).__name__} with further weights in "
                f"{', '.join(inner)}, for which LoRA has no matrices; expected layers of one "
                f"weight; train it whole ({_SAVED}), or leave it out"
            )


def _check_shared(modules: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a ValueError for a module that shares a weight with one that is not its child.

    peft would train one of the two, and where the model is saved merged, they are one again.
    """
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in names:
        for parameter in modules[name].parameters():
            others = [o for o in owners.get(id(parameter), []) if not _within(o, [name])]
            if others:
                raise ValueError(
                    f"got {name} for LoRA or to train whole, whose weight is that of {others[0]}, "
                    "too; expected modules with weights of their own; leave it out, or train "
                    "without --lora_r"
                )


def _listed(names: Iterable[str]) -> str:
    """The ends of names, each once."""
    ends: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        # A number says nothing by itself.
        start = next((n for n in range(len(parts) - 1, 0, -1) if not parts[n].isdigit()), 0)
        ends[".".join(parts[start:])] = None
    shown = sorted(ends)
    more = [f"and {len(shown) - _MOST_NAMED} more"] if len(shown) > _MOST_NAMED else []
    return ", ".join([*shown[:_MOST_NAMED], *more])


def _words(targets: str | Sequence[str]) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(targets)
