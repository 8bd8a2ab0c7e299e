"""The ds_config as a whole: reading it, and refusing what spoils sequence-parallel training."""

import base64
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from deepspeed.runtime.zero.config import get_zero_config
from pydantic import ValidationError

from ds_lvx.config.settings import ask_deepspeed, check_values
from ds_lvx.config.words import key_path, nearest, shown

SECTION = "ds_lvx"

_SCALARS = (str, int, float, type(None))  # a bool is an int
_OF_ONE_RANK = (
    *("tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler"),
    *("steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown"),
)

DSConfig: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]


def read_ds_config(path_or_dict: DSConfig) -> dict[str, Any]:
    """Read a whole ds_config, as strict JSON.

    DeepSpeed itself reads Hjson, in which a forgotten quote or comma is silently part of a string;
    Hugging Face reads JSON. A file that this function takes means the same to all three.

    Args:
        path_or_dict: path of a JSON file, base64 text of one, or the config, of which a shallow
            copy is returned.

    Raises:
        ValueError: no such file, no JSON (with line and column), a key that occurs twice, or
            something else than an object.
    """
    if isinstance(path_or_dict, Mapping):
        return dict(path_or_dict)
    if not isinstance(path_or_dict, str | os.PathLike):
        raise ValueError(
            f"ds_config: got {shown(path_or_dict)}, expected the path of a JSON file or a dict"
        )
    path = os.fspath(path_or_dict)
    text = _read_text(path) if os.path.exists(path) else _decode_base64(path)
    if text is None:
        raise ValueError(_no_file(path))
    return _parse_object(text, source_name(path))


def by_path(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a ds_config that all ranks must share, by the path of their key.

    Not among them: folders and files, which may be a node's own, and what only logs.
    """
    return {
        key_path(loc): value if isinstance(value, _SCALARS) else type(value).__name__
        for loc, value in _walk(dict(ds_config), ())
        if not (isinstance(value, dict | list) and value)
        and loc
        and loc[0] not in _OF_ONE_RANK
        and not str(loc[-1]).endswith(("path", "dir", "prefix"))
    }


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage (0 to 3) that DeepSpeed will read from `ds_config`.

    Raises:
        ValueError: DeepSpeed does not accept the `zero_optimization` section.
    """
    return int(_zero_config(ds_config).stage)


def check_ds_config(ds_config: Mapping[str, Any], sequence_parallel_size: int) -> None:
    """Refuse settings outside our section under which training does not start, or goes wrong.

    First values that nobody fills in or that are of the wrong kind; then what DeepSpeed takes
    without a word though it spoils the gradients of sequence-parallel training; then what DeepSpeed
    refuses itself, but only once there is a model.

    Args:
        ds_config: the whole config.
        sequence_parallel_size: that of its `ds_lvx` section, in ranks.

    Raises:
        ValueError: names each offending key and what to do.
        NotImplementedError: tensor parallelism beside sequence parallelism.
    """
    check_values(ds_config)
    size = sequence_parallel_size
    problems = []
    theirs = ds_config.get("sequence_parallel_size", size)
    if theirs != size:
        problems.append(
            f"sequence_parallel_size: got {shown(theirs)} at the top level of the ds_config, but "
            f"{SECTION}.sequence_parallel_size is {size}; remove the top-level key"
        )
    if size > 1:
        problems += _mesh_problems(ds_config) + _reduction_problems(ds_config)
    if problems:
        raise ValueError("\n".join(problems))
    autotp_size = ds_config.get("tensor_parallel", {}).get("autotp_size", 0)
    if size > 1 and autotp_size > 1:
        raise NotImplementedError(
            f"tensor_parallel.autotp_size: got {autotp_size}, but tensor and sequence parallelism "
            f"do not work together; remove it, or set {SECTION}.sequence_parallel_size to 1"
        )
    _zero_config(ds_config)
    ask_deepspeed(ds_config)


def _mesh_problems(ds_config: Mapping[str, Any]) -> list[str]:
    """Keys that make DeepSpeed build a device mesh, over which ZeRO reduces the wrong ranks."""
    return [
        f"{key}: got {shown(ds_config[key])}, but the process groups come from "
        f"{SECTION}.sequence_parallel_size, and with a mesh beside them the ranks' gradients "
        "differ silently; remove the key"
        for key in ("data_parallel_size", "mesh_param")
        if key in ds_config
    ]


def _reduction_problems(ds_config: Mapping[str, Any]) -> list[str]:
    zero = _zero_config(ds_config)
    stage = int(zero.stage)
    factor = ds_config.get("gradient_predivide_factor", 1.0)
    problems = []
    if stage == 3 and not zero.reduce_scatter:
        problems.append(
            "zero_optimization.reduce_scatter: got false, but then stage 3 sums the gradients of "
            "some parameters over the sequence-parallel ranks and averages those of others, by "
            "their size; remove the key or set it to true"
        )
    if stage > 0 and factor != 1.0:
        problems.append(
            f"gradient_predivide_factor: got {shown(factor)}, which DeepSpeed refuses at stage "
            f"{stage}, or with reduce_scatter false takes to decide whether gradients are averaged "
            "over the sequence-parallel ranks; remove the key"
        )
    return problems


def _zero_config(ds_config: Mapping[str, Any]) -> Any:
    section = ds_config.get("zero_optimization", {})
    if not isinstance(section, Mapping | bool):
        raise ValueError(f"zero_optimization: got {shown(section)}, expected an object")
    try:
        return get_zero_config(dict(ds_config))
    except ValidationError as error:
        raise ValueError(
            "\n".join(
                f"zero_optimization.{key_path(details['loc'])}: got {shown(details['input'])}; "
                f"DeepSpeed says: {details['msg']}"
                for details in error.errors()
            )
        ) from None


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); expected the path of a JSON file"
        ) from error


def _decode_base64(text: str) -> str | None:
    """Return the JSON text inside, or None if `text` is rather the name of a file."""
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8")
    except ValueError:
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse_object(text: str, source: str) -> dict[str, Any]:
    duplicates: list[tuple[dict[str, Any], str]] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            duplicates.extend((built, key) for key in built if keys.count(key) > 1)
        return built

    try:
        parsed = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}. JSON has no "
            "comments and no comma after the last item."
        ) from None
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        raise ValueError(f"{source}: not a config ({error}); expected a JSON object") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source}: got {shown(parsed)}, expected a JSON object")
    if duplicates:
        lines = (
            f"{source}: {key_path((*loc, key))}: the key occurs twice; keep one"
            for loc, value in _walk(parsed, ())
            for owner, key in duplicates
            if owner is value
        )
        raise ValueError("\n".join(lines))
    return parsed


def _walk(value: Any, loc: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every object and array of a parsed JSON text, with the keys that lead to it."""
    yield loc, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, (*loc, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*loc, index))


# Words for error messages


def source_name(path_or_dict: DSConfig) -> str:
    """Name of the file, or `ds_config` for what has none."""
    if isinstance(path_or_dict, Mapping) or not os.path.exists(path_or_dict):
        return "ds_config"
    return os.fspath(path_or_dict)


def _no_file(path: str) -> str:
    folder = os.path.dirname(path)
    # Whoever gives a config as base64 does not want all of it in the message.
    name = path if len(path) <= 200 else f"{path[:196]} ..."
    message = f"ds_config: no such file: {name}"
    if os.path.isdir(folder or "."):
        found = nearest(os.path.basename(path), sorted(os.listdir(folder or ".")))
        if found is not None:
            return f"{message}; did you mean {os.path.join(folder, found)}?"
        return f"{message}; expected the path of a JSON file"
    return f"{message}; there is no folder {folder} either"
