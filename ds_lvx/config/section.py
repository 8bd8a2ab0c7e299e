"""The `ds_lvx` section of a DeepSpeed config: which attention method runs in which layer.

A mistake in the section never gets as far as a model: whatever is wrong raises here, with the path
of the key (`ds_lvx.layers[1].method`), what it holds and the nearest thing that would be right.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ds_lvx.config.combinations import missing_combinations, subgroups_problem
from ds_lvx.config.ds_config import SECTION, DSConfig, read_ds_config, source_name
from ds_lvx.config.layer_rule import WORDS, LayerRule
from ds_lvx.config.words import closest, in_ranks, key_path, nearest, shown

TextOrder: TypeAlias = Literal["auto", "zigzag", "contiguous"]
FlashAttention: TypeAlias = Literal["builtin", "FA3", "FA4"]
_WORDS: dict[str, tuple[str, ...]] = {
    **WORDS,
    "flash_attention": get_args(FlashAttention),
    "text_order": get_args(TextOrder),
}


class LVXConfig(BaseModel):
    """The `ds_lvx` section of a ds_config: group size and one rule for each kind of layer."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    sequence_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share one sample, in ranks; it has to divide the number of all ranks."""

    layers: list[LayerRule] = Field(default_factory=list)
    """Rules in order of precedence: the first whose pattern matches a layer decides for it."""

    loss_tiles: int = Field(default=1, ge=1)
    """Pieces of a rank's text of which logits and loss are computed one after the other, so that
    the logits of all its tokens never exist at once; 1: all of them, as the model does it."""

    text_order: TextOrder = "auto"
    """Which tokens of a causal text a rank holds: `contiguous`, a run of neighbours; `zigzag`, an
    early and a late piece, so that ring and lvx have as much to do on every rank; or `auto`,
    zigzag where one of them or a hybrid runs in the text's layers."""

    share_prefixes: bool = False
    """Rows of a batch that begin alike, such as completions of one prompt, become one row, whose
    text and images run once; results are the same."""

    flash_attention: FlashAttention = "builtin"
    """Which FlashAttention is behind PyTorch's operators: its own, or version 3 or 4 where it is
    installed and the GPU can run it."""

    @model_validator(mode="after")
    def _refuse_missing_combinations(self) -> "LVXConfig":
        """Raise NotImplementedError, which pydantic lets through, for what does not exist."""
        problems = [
            f"{SECTION}.layers[{index}].{problem}"
            for index, rule in enumerate(self.layers)
            for problem in missing_combinations(rule)
        ]
        if problems:
            raise NotImplementedError("\n".join(problems))
        return self

    @classmethod
    def from_ds_config(cls, path_or_dict: DSConfig) -> "LVXConfig":
        """Read the `ds_lvx` section of a ds_config.

        Args:
            path_or_dict: path of a JSON file, the base64 text that DeepSpeed takes in its place,
                or the config itself, which is left as it is.

        Returns:
            The checked section. An empty one (`"ds_lvx": {}`) means one rank a sample, no rule.

        Raises:
            ValueError: the file cannot be read, has no `ds_lvx` section, or the section holds
                something that is not valid. All mistakes of the section are listed at once.
            NotImplementedError: a combination of values that this version does not have.
        """
        ds_config = read_ds_config(path_or_dict)
        source = source_name(path_or_dict)
        if SECTION not in ds_config:
            raise ValueError(f"{source}: {_no_section(ds_config)}")
        section = ds_config[SECTION]
        if not isinstance(section, Mapping):
            raise ValueError(
                f"{source}: {SECTION}: got {shown(section)}, expected an object such as "
                '{"sequence_parallel_size": 2, "layers": []}'
            )
        try:
            found = cls.model_validate(dict(section))
            found._check_subgroups(source)
            return found
        except ValidationError as error:
            lines = (f"{source}: {_explain(details)}" for details in error.errors())
            raise ValueError("\n".join(lines)) from None
        except NotImplementedError as error:
            lines = (f"{source}: {line}" for line in str(error).splitlines())
            raise NotImplementedError("\n".join(lines)) from None

    def _check_subgroups(self, source: str) -> None:
        """Raise ValueError where a hybrid's subgroups are missing or do not divide the group."""
        size = self.sequence_parallel_size
        lines = [
            f"{source}: {SECTION}.layers[{index}].ulysses: {problem}"
            for index, rule in enumerate(self.layers)
            if rule.method == "hybrid" and (problem := subgroups_problem(rule.ulysses, size))
        ]
        if lines:
            raise ValueError("\n".join(lines))

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError unless `sequence_parallel_size` divides `world_size` (in ranks)."""
        size = self.sequence_parallel_size
        if world_size % size == 0:
            return
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"{SECTION}.sequence_parallel_size: got {size}, which does not divide the "
            f"{in_ranks(world_size)} that were started; set it to one of "
            f"{', '.join(map(str, divisors))}, or start a multiple of {size} ranks"
        )

    def resolve(self, layer_names: Sequence[str]) -> dict[str, LayerRule | None]:
        """Decide for each attention layer which rule it follows.

        Args:
            layer_names: qualified names of the model's attention layers, as
                `model.named_modules()` gives them.

        Returns:
            Name -> the first rule whose pattern matches it, or None, in the order given.

        Raises:
            ValueError: a rule matches no layer. A rule that matches layers of which none is left
                for it does nothing; that is a UserWarning, since a last rule that catches the
                rest may be meant so.
        """
        unmatched = [
            f"{SECTION}.layers[{index}].match: {_nothing_matches(rule.match, layer_names)}"
            for index, rule in enumerate(self.layers)
            if not any(fnmatchcase(name, rule.match) for name in layer_names)
        ]
        if unmatched:
            raise ValueError("\n".join(unmatched))
        chosen = {name: self._first_match(name) for name in layer_names}
        used = set(chosen.values())
        for index in range(len(self.layers)):
            if index not in used:
                self._warn_shadowed(index)
        return {n: None if index is None else self.layers[index] for n, index in chosen.items()}

    def _first_match(self, name: str) -> int | None:
        hits = (i for i, rule in enumerate(self.layers) if fnmatchcase(name, rule.match))
        return next(hits, None)

    def _warn_shadowed(self, index: int) -> None:
        warnings.warn(
            f"{SECTION}.layers[{index}] ({self.layers[index].match!r}) decides for no layer: an "
            "earlier rule takes every layer that it matches. The first match wins: put the more "
            "special pattern first, or remove the rule.",
            stacklevel=3,
        )


def summarise_names(names: Iterable[str]) -> list[str]:
    """Collapse names that differ in numbers only: `model.layers.{0..2,4}.self_attn`.

    Returns one line a group, in order of first appearance. With several numbers in a name each
    position is collapsed by itself.
    """
    groups: dict[tuple[str, ...], list[set[int]]] = {}
    for name in names:
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", name)
        columns = groups.setdefault(tuple(parts[::2]), [set() for _ in parts[1::2]])
        for column, number in zip(columns, parts[1::2], strict=True):
            column.add(int(number))
    return [
        "".join(text for pair in zip(key, [*map(_runs, columns), ""], strict=True) for text in pair)
        for key, columns in groups.items()
    ]


def starred(name: str) -> str:
    """A name with a star in place of each number: `model.layers.*.self_attn`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def pattern_for(names: Sequence[str], others: Iterable[str]) -> str:
    """The shortest pattern that people write for these names, and that matches none of ``others``.

    Where there is none for all of them, one for the first; where that has none, its own name.
    """
    others = list(others)
    apart = [p for p in _patterns(names[0]) if not any(fnmatchcase(o, p) for o in others)]
    fits = (p for p in apart if all(fnmatchcase(name, p) for name in names))
    return next(fits, apart[0] if apart else starred(names[0]))


def _patterns(name: str) -> list[str]:
    """What people write for a name, by its last part and by one before it."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    last = parts.pop() if parts else "*"
    inner = [f"*{part}*" if len(part) > 2 else f"*.{part}.*" for part in parts]
    written = [f"*.{last}", *inner, *(f"{part}.{last}" for part in inner)]
    return [pattern for pattern in written if fnmatchcase(name, pattern)]


# Words for error messages


def _explain(details: ErrorDetails) -> str:
    """Turn one of pydantic's findings into: key path, got, expected, what to do."""
    loc, kind, got = details["loc"], details["type"], shown(details["input"])
    path = f"{SECTION}.{key_path(loc)}"
    known = list((LayerRule if "layers" in loc[:-1] else LVXConfig).model_fields)
    if kind == "extra_forbidden":
        hint = _did_you_mean(str(loc[-1]), known)
        return f"{path}: unknown key{hint}; the keys are {_list(known)}"
    if kind == "missing":
        return f"{path}: missing; every rule needs it, {_EXAMPLES[str(loc[-1])]}"
    if kind in ("literal_error", "string_type") and str(loc[-1]) in _WORDS:
        words = list(_WORDS[str(loc[-1])])
        word = details["input"]
        hint = _did_you_mean(word, words) if isinstance(word, str) else ""
        return f"{path}: got {got}{hint}, expected one of {_list(words)}"
    return f"{path}: got {got}, expected {_EXPECTED.get(kind, details['msg'])}"


_EXAMPLES = {
    "match": 'a pattern such as "match": "*.cross_attn"',
    "method": 'for example "method": "lvx"',
}
_EXPECTED = {
    "int_type": "an integer",
    "greater_than_equal": "1 or more",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": 'a pattern such as "*.cross_attn"',
    "list_type": "an array of rules",
    "model_type": 'a rule such as {"match": "*.cross_attn", "method": "lvx"}',
}


def _list(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _did_you_mean(word: str, known: list[str]) -> str:
    found = nearest(word, known)
    return "" if found is None else f' (did you mean "{found}"?)'


def _no_section(ds_config: Mapping[str, Any]) -> str:
    hint = (
        'add one, for example "ds_lvx": {"sequence_parallel_size": 2, "layers": [{"match": '
        '"*.cross_attn", "method": "lvx"}]}, or "ds_lvx": {} for one rank a sample'
    )
    found = nearest(SECTION, [key for key in ds_config if isinstance(key, str)])
    if found is not None:
        return f'no "{SECTION}" section; did you mean it by "{found}"? If not, {hint}'
    return f'no "{SECTION}" section; {hint}'


def _nothing_matches(pattern: str, names: Sequence[str]) -> str:
    start = f'got "{pattern}", which matches no attention layer'
    if not names:
        return f"{start}: the model has none; remove the rule"
    close = closest(pattern, summarise_names(names))
    proposal = _propose_pattern(pattern, names)
    hint = "" if proposal is None else f' (did you mean "{proposal}"?)'
    return f"{start}{hint}; the nearest layers are {', '.join(close)}"


def _propose_pattern(pattern: str, names: Sequence[str]) -> str | None:
    """Of the patterns people write for these names, the one most like `pattern`."""
    proposals = dict.fromkeys(p for n in names for p in (starred(n), *_patterns(n)))
    return nearest(pattern, proposals, cutoff=0.4)


def _runs(numbers: set[int]) -> str:
    """Write numbers as `7`, `{0..39}` or `{3,8,13}`, and many runs with an ellipsis."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs]
    if len(numbers) == 1:
        return words[0]
    if len(words) > 8:
        words = [*words[:3], "...", words[-1]]
    return "{" + ",".join(words) + "}"
