"""What lies in a checkpoint's folder beside config and weights, which training does not change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from ds_lvx.data.template import ChatTemplate
from ds_lvx.training.model import Source

_KINDS = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.spm", "*.py"),
    *("LICENSE*", "NOTICE*"),
)
_OF_THE_MODEL = ("config.json", "generation_config.json")
_NOT = ("*.index.json", "adapter_config.json")
_TEMPLATE = "chat_template.jinja"


def complete(folder: Path, source: Source, *, adapter: bool = False) -> None:
    """Add to a saved model what else its base has: tokenizer, processor, chat template, code,
    licence, as they are, so that whatever reads the base reads this, too.

    A base without a chat template gets the one that training wrote conversations by.

    Args:
        folder: with weights and config.
        source: the base. Of one with random weights the processor is written.
        adapter: the folder has an adapter alone: what belongs to the model itself stays out.

    Raises:
        OSError: files cannot be copied.
    """
    processor, base = source.processor, None if source.is_tiny else _base(source.name)
    if base is None:
        processor.save_pretrained(folder)
    else:
        for file in _beside(base):
            to = folder / file.relative_to(base)
            of_model = file.name in _OF_THE_MODEL or file.suffix == ".py"
            if of_model and (adapter or to.exists()):
                continue
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)
    has_own = processor.tokenizer.chat_template or (folder / "chat_template.json").exists()
    if not has_own and not (folder / _TEMPLATE).exists():
        (folder / _TEMPLATE).write_text(ChatTemplate.of(processor).text)


def _base(name: str) -> Path | None:
    """The folder of a checkpoint; of one on the hub its copy on this machine, as far as it goes."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[*_KINDS], ignore_patterns=[*_NOT]))
    except (OSError, ValueError):
        return None


def _beside(base: Path) -> Iterator[Path]:
    """Files of a checkpoint beside its weights; also of a tokenizer in a folder of its own."""
    inside = (path for path in sorted(base.iterdir()) if path.is_dir())
    parts = (path for path in inside if (path / "tokenizer_config.json").is_file())
    for folder in (base, *parts):
        for file in sorted(folder.iterdir()):
            wanted = any(fnmatch(file.name, kind) for kind in _KINDS)
            if wanted and file.is_file() and not any(fnmatch(file.name, kind) for kind in _NOT):
                yield file
