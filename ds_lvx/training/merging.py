"""``ds-lvx merge``: a LoRA adapter folded into its base, a whole model as any other."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ds_lvx.data.extras import need
from ds_lvx.training import disk
from ds_lvx.training.folder import complete
from ds_lvx.training.model import Source

CONFIG = "adapter_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds-lvx merge``."""
    add = parser.add_argument
    add("--adapter", required=True, help="folder of the adapter: OUTPUT_DIR/model of a LoRA run")
    add("--output", required=True, help="a new folder for the merged model")
    add("--model", help="folder or hub name of its base (default: the one the adapter names)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the base")


def run(options: argparse.Namespace) -> int:
    """Merge, and write the model with its processor; 0.

    Raises:
        ValueError: no adapter, no base, a base of other shapes, or a folder that holds something.
        OSError: it cannot be written; says which file, and what room there is.
    """
    need("peft", "lora", why="--adapter")
    output, adapter = Path(options.output), Path(options.adapter)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: got {output}, which is there; expected a new folder")
    name = base_of(adapter) if options.model is None else options.model
    source = Source.of(name, trust_remote_code=options.trust_remote_code)
    if source.is_packed:
        raise ValueError(
            f"--model: got {name}, whose weights are quantized: merged into them, an adapter would "
            "be rounded; expected the checkpoint that they were made of; name it: --model"
        )
    model = _merged(source, adapter)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk.explained(partial, sum(weight.nbytes for weight in model.state_dict().values())):
        model.save_pretrained(partial)
        complete(partial, source)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    print(f"saved {output}: {name} with {adapter}")
    return 0


def base_of(adapter: Path, *, option: str = "--adapter") -> str:
    """The model that an adapter names as its base.

    Args:
        adapter: its folder.
        option: that names the folder.

    Raises:
        ValueError: the folder is none of an adapter, or names no base.
    """
    path = adapter / CONFIG
    try:
        name = json.loads(path.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{option}: got {adapter}, whose {CONFIG} cannot be read ({error}); expected the "
            "folder of a LoRA adapter, OUTPUT_DIR/model of a run with --lora_r"
        ) from None
    if not name:
        other = "; name it: --model" + (
            "" if option == "--adapter" else f" BASE --adapter {adapter}"
        )
        raise ValueError(f"{option}: got {path}, which names no base{other}")
    return str(name)


def _merged(source: Source, adapter: Path) -> Any:
    from peft import PeftModel

    dtype = getattr(source.config, "dtype", None)
    base = source.load(torch.float32 if dtype is None else dtype)
    try:
        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--adapter: got {adapter}, which does not fit {source.name} ({reason}); expected the "
            "base that it was trained on; name it: --model"
        ) from error
