"""What the documents name exists: files, headings, modules, options, and the stair of imports."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import ds_lvx
from ds_lvx import cli
from ds_lvx.config.registry import KERNELS, METHODS, SCHEDULES
from ds_lvx.models.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ds_lvx"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("ds_configs/*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
LINK = re.compile(r"\[([^][]*)\]\(([^)#\s]*)(?:#([^)\s]*))?\)")

# Files that a reader is told to write, or that a run leaves.
WRITTEN = {
    *("ask.py", "attention_example.py", "check.py", "example.py", "make_clip.py", "script.py"),
    "train.py",
    *("nano_family.py", "nano_nvlm.py", "NAME.py", "NAME_case.py"),
    *("ds_configs/mine.json", "ds_configs/....json", "docs/benchmarks/kernels.json"),
}
# Options of other programs.
FOREIGN = {
    *("--container-env", "--container-mount-home"),
    *("--gpu-bind", "--gpus-per-node", "--gpus-per-task", "--nodes", "--requeue"),
    "--signal",
    *("--ipc", "--shm-size"),
    *("--hostfile", "--master_addr", "--master_port", "--no_ssh", "--node_rank", "--num_gpus"),
    *("--logdir", "--help", "--kill-on-bad-exit", "--nproc_per_node", "--ntasks-per-node"),
}


def each_document() -> Iterator[tuple[str, Path, str]]:
    for path in DOCUMENTS:
        yield path.relative_to(ROOT).as_posix(), path, path.read_text()


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub's links name them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def test_links_lead_to_files_and_headings_that_exist() -> None:
    for name, path, text in each_document():
        for _, target, anchor in LINK.findall(without_code(text)):
            if "://" in target:
                continue
            there = path.parent / target if target else path
            assert there.exists(), (name, target)
            assert not anchor or anchor in anchors(there), (name, target, anchor)


def test_a_link_that_names_a_file_leads_to_that_file() -> None:
    for name, _, text in each_document():
        for words, target, _ in LINK.findall(text):
            if target.endswith(".py") and words.endswith(".py"):
                assert target.endswith(words.replace("\\", "")), (name, words, target)


def test_files_that_are_named_exist() -> None:
    known = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name, _, text in each_document():
        named = re.findall(r"(?<![\w./-])(?:ds_lvx|launch|ds_configs|docs)/[\w./*-]*\w", text)
        for file in {each for each in named if "*" not in each} - WRITTEN:
            assert (ROOT / file).exists(), (name, file)
        for file in set(re.findall(r"[\w./-]*\b(\w+\.py)\b", text)) - WRITTEN:
            # The contributors' page makes up names of tests.
            assert file in known or name == "CONTRIBUTING.md", (name, file)


def rows_of_contributing() -> list[str]:
    """The files in the table of where to go for what."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| to add | touch |")[2]
    return re.findall(r"`([\w/.]+\.py)`", table.partition("\n\n")[0])


def test_the_files_to_touch_exist() -> None:
    rows = [file for file in rows_of_contributing() if "NAME" not in file]
    assert len(rows) > 10
    for file in rows:
        assert (PACKAGE / file).is_file(), file


def test_what_can_be_chosen_has_its_row() -> None:
    """Families by their ``model_type``; methods, schedules and kernels where their keys are."""
    rows = {
        "docs/models.md": BUILT_IN,
        "docs/configuration.md": (*BUILT_IN, *METHODS, *SCHEDULES, *KERNELS),
        "docs/how-it-works.md": SCHEDULES,
        "docs/kernels.md": KERNELS,
    }
    for name, words in rows.items():
        text = (ROOT / name).read_text()
        table = re.sub(r"[`|,]", " ", "\n".join(re.findall(r"^(?:\||#|- `).*", text, re.MULTILINE)))
        missing = {*words} - {word.strip('"') for word in table.split()}
        assert missing == set(), (name, missing)


def exists(dotted: str) -> bool:
    """Whether a name such as ``ds_lvx.models.contract.Family`` leads to a module or what it has."""
    place, rest = PACKAGE, dotted.split(".")[1:]
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place = place / rest.pop(0)
    if not rest:
        return True
    if place == PACKAGE:  # a public name, or a key of the config's section
        return rest[0] in {*ds_lvx.__all__, *ds_lvx.LVXConfig.model_fields}
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    defined = rf'^\s*(def|class) {rest[0]}\b|\b{rest[0]}\b\s*[:=]|"{rest[0]}"'
    return re.search(defined, source.read_text(), re.MULTILINE) is not None


def test_modules_and_names_exist() -> None:
    assert not any(map(exists, ("ds_lvx.comm", "ds_lvx.plan.job.Job", "ds_lvx.cache.writes")))
    for name, _, text in each_document():
        if name == "CHANGELOG.md":  # it names what is gone
            continue
        for dotted in set(re.findall(r"(?<![\w.])ds_lvx(?:\.\w+)+", text)):
            assert exists(dotted), (name, dotted)


def options() -> set[str]:
    """Of every command and script."""
    found = set()
    for module, _ in cli.COMMANDS.values():
        parser = argparse.ArgumentParser()
        import_module(module).add_arguments(parser)
        found |= set(parser._option_string_actions)
    parsers = [PACKAGE / "training" / name for name in ("arguments.py", "options.py", "asking.py")]
    parsers += [
        PACKAGE / "models" / name / "convert.py" for name in ("openflamingo", "video_llama")
    ]
    scripts = [*(ROOT / "launch").rglob("*.*"), *parsers]
    for script in (path for path in scripts if path.suffix in (".py", ".sh")):
        code = script.read_text()
        found |= set(re.findall(r"(?<!-)--[a-z][\w-]*", code))
        if 'f"--{' in code:  # those of a loop, by their names
            found |= {f"--{word}" for word in re.findall(r'"([a-z]\w*)": "', code)}
    return found


def test_options_exist() -> None:
    known = options() | FOREIGN
    for name, _, text in each_document():
        for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)):
            assert option in known, (name, option)


# --------------------------------------------------------------------------------------------
# Imports


def stair() -> dict[str, int]:
    """Rooms of the package by their step, from the top, as CONTRIBUTING.md has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```\n(  cli\n.*?)```", text, re.DOTALL)
    assert block is not None
    steps = [line.split(",") for line in block[1].strip().splitlines()]
    return {room.strip(): step for step, rooms in enumerate(steps) for room in rooms}


def imports(path: Path) -> Iterator[str]:
    """What a file imports of the package, wherever in it, by its whole name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("ds_lvx."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_the_stair() -> None:
    step, files = stair(), [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]
    files += [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    up = set()
    for path in files:
        file = path.relative_to(PACKAGE)
        room = file.parts[0].removesuffix(".py")
        for other in {name.split(".")[1] for name in imports(path)}:
            if step[other] < step[room]:
                up.add((file.as_posix(), other))
    assert up == {("attention/auto.py", "plan")}
    assert set(step) == {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files}


def test_imports_go_in_no_circle() -> None:
    """Not within a function or for types alone, either: of two files one is to be read first."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    TopologicalSorter(
        {
            name: {each if each in files else each.rpartition(".")[0] for each in imports(path)}
            for name, path in files.items()
        }
    ).prepare()  # raises a CycleError that names the files
