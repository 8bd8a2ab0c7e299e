"""The `ds_lvx` section: what it may hold, which rule decides, and that every mistake is named."""

import base64
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from ds_lvx.config import (
    LayerRule,
    LVXConfig,
    pattern_for,
    read_ds_config,
    summarise_names,
)

ROOT = Path(__file__).resolve().parents[2]
LONG_NAMES = [
    f"model.language_model.layers.{i}.{'cross' if i % 5 == 3 else 'self'}_attn" for i in range(40)
] + [f"model.vision_model.transformer.layers.{i}.self_attn" for i in range(32)]


HYBRID = {"match": "a", "method": "hybrid"}


def section(**keys: Any) -> dict[str, Any]:
    return {"train_batch_size": 1, "ds_lvx": keys}


def one_rule(**keys: Any) -> dict[str, Any]:
    return section(layers=[{"match": "*.cross_attn", "method": "lvx"}, keys])


def message_of(ds_config: Any, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        LVXConfig.from_ds_config(ds_config)
    assert type(caught.value) is error
    return str(caught.value)


# What is right


def test_defaults_and_full_rule() -> None:
    empty = LVXConfig.from_ds_config(section())
    assert (empty.sequence_parallel_size, empty.layers) == (1, [])
    rule = LVXConfig.from_ds_config(one_rule(match="a", method="ring")).layers[1]
    assert rule == LayerRule(
        match="a", method="ring", schedule="auto", recompute_kv=False, kernel="auto"
    )


def test_path_base64_and_dict_give_the_same(tmp_path: Path) -> None:
    ds_config = one_rule(
        match="b", method="lvx", schedule="gather", recompute_kv=True, kernel="native"
    )
    before = deepcopy(ds_config)
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(ds_config))
    encoded = base64.urlsafe_b64encode(file.read_bytes()).decode()
    expected = LVXConfig.from_ds_config(ds_config)
    assert expected.layers[1].schedule == "gather"
    for form in (file, str(file), encoded):
        assert LVXConfig.from_ds_config(form) == expected
    assert ds_config == before
    assert read_ds_config(file) == ds_config
    assert read_ds_config(ds_config) is not ds_config


# Mistakes in the section


@pytest.mark.parametrize(
    ("ds_config", "path", "got", "hint"),
    [
        (section(sequence_parallel_sise=2), "sequence_parallel_sise", "", "sequence_parallel_size"),
        (section(sequence_parallel_size=0), "sequence_parallel_size", "0", "1 or more"),
        (section(sequence_parallel_size=-2), "sequence_parallel_size", "-2", "1 or more"),
        (section(sequence_parallel_size="4"), "sequence_parallel_size", '"4"', "an integer"),
        (section(sequence_parallel_size=2.0), "sequence_parallel_size", "2.0", "an integer"),
        (section(sequence_parallel_size=True), "sequence_parallel_size", "true", "an integer"),
        (section(layers={"match": "a"}), "layers", '{"match": "a"}', "an array"),
        (section(layers=["lvx"]), "layers[0]", '"lvx"', '"match"'),
        (one_rule(method="lvx"), "layers[1].match", "", '"match": "*.cross_attn"'),
        (one_rule(match="a"), "layers[1].method", "", '"method": "lvx"'),
        (one_rule(match="", method="lvx"), "layers[1].match", '""', "pattern"),
        (one_rule(match=3, method="lvx"), "layers[1].match", "3", "a string"),
        (one_rule(match="a", method="lvxx"), "layers[1].method", '"lvxx"', '"lvx"'),
        (one_rule(match="a", method="Ulyses"), "layers[1].method", '"Ulyses"', '"ulysses"'),
        (one_rule(match="a", method=None), "layers[1].method", "null", '"none"'),
        (
            one_rule(match="a", method="lvx", schedule="gater"),
            "layers[1].schedule",
            '"gater"',
            '"gather"',
        ),
        (
            one_rule(match="a", method="lvx", kernel="natve"),
            "layers[1].kernel",
            '"natve"',
            '"native"',
        ),
        (
            one_rule(match="a", method="lvx", recompute_kv="true"),
            "layers[1].recompute_kv",
            '"true"',
            "true or false",
        ),
        (
            one_rule(match="a", method="lvx", recompute=True),
            "layers[1].recompute",
            "",
            '"recompute_kv"',
        ),
        (one_rule(match="a", method="hybrid"), "layers[1].ulysses", "missing", "one of 1"),
        (
            section(sequence_parallel_size=6, layers=[{**HYBRID, "ulysses": 4}]),
            "layers[0].ulysses",
            "4, which does not divide sequence_parallel_size 6",
            "1, 2, 3, 6",
        ),
        (one_rule(**HYBRID, ulysses=0), "layers[1].ulysses", "0", "1 or more"),
        (one_rule(**HYBRID, across="rng"), "layers[1].across", '"rng"', '"ring"'),
    ],
)
def test_mistake_names_key_value_and_remedy(
    ds_config: dict[str, Any], path: str, got: str, hint: str
) -> None:
    message = message_of(ds_config)
    assert message.startswith(f"ds_config: ds_lvx.{path}: ")
    assert "\n" not in message
    assert got in message
    assert hint in message


@pytest.mark.parametrize(
    "words",
    [("method", "lvxx", "lvx"), ("method", "autoo", "auto"), ("schedule", "rinf", "ring")],
)
def test_nearest_word_is_proposed(words: tuple[str, str, str]) -> None:
    key, typo, meant = words
    rule = {"match": "a", "method": "lvx"} | {key: typo}
    assert f'did you mean "{meant}"?' in message_of(one_rule(**rule))


def test_all_mistakes_are_listed_at_once() -> None:
    message = message_of(one_rule(mach="a", method="lvxx"))
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "ds_lvx.layers[1].match",
        "ds_lvx.layers[1].method",
        "ds_lvx.layers[1].mach",
    ]
    assert 'did you mean "match"?' in message


@pytest.mark.parametrize("bad", [None, [], "lvx", 2], ids=repr)
def test_section_must_be_an_object(bad: Any) -> None:
    message = message_of({"ds_lvx": bad})
    assert message.startswith(f"ds_config: ds_lvx: got {json.dumps(bad)}, expected an object")


def test_missing_section_says_what_to_add() -> None:
    message = message_of({"train_batch_size": 1})
    assert 'no "ds_lvx" section' in message
    example = re.search(r'"ds_lvx": \{"seq.*?\]\}', message)
    assert example is not None
    LVXConfig.from_ds_config(json.loads("{" + example[0] + "}"))


@pytest.mark.parametrize("typo", ["ds_lxv", "ds-lvx", "LVX"])
def test_misspelt_section_is_recognised(typo: str) -> None:
    assert f'did you mean it by "{typo}"?' in message_of({typo: {}, "optimizer": {}})


@pytest.mark.parametrize(
    ("rule", "key", "remedy"),
    [
        ({"method": "ring", "recompute_kv": True}, "recompute_kv", 'method "lvx"'),
        ({"method": "ulysses", "recompute_kv": True}, "recompute_kv", 'method "lvx"'),
        ({"method": "none", "recompute_kv": True}, "recompute_kv", 'method "lvx"'),
        ({"method": "ring", "schedule": "ring"}, "schedule", 'method "lvx"'),
        ({"method": "ulysses", "schedule": "gather"}, "schedule", 'method "lvx"'),
        ({"method": "none", "schedule": "replicated"}, "schedule", 'method "lvx"'),
        ({"method": "none", "kernel": "native"}, "kernel", "remove kernel"),
        ({"method": "ring", "ulysses": 2}, "ulysses", 'method "hybrid"'),
        ({"method": "lvx", "across": "ring"}, "across", "remove across"),
        ({"method": "hybrid", "recompute_kv": True}, "recompute_kv", 'method "lvx"'),
        (
            {"method": "hybrid", "across": "ring", "schedule": "gather"},
            "schedule",
            'across "lvx"',
        ),
        ({"method": "hybrid", "schedule": "replicated"}, "schedule", '"auto"'),
    ],
    ids=str,
)
def test_missing_combination_is_refused(rule: dict[str, Any], key: str, remedy: str) -> None:
    message = message_of(one_rule(match="a", **rule), NotImplementedError)
    assert message.startswith(f"ds_config: ds_lvx.layers[1].{key}: ")
    assert remedy in message
    with pytest.raises(NotImplementedError):
        LVXConfig(layers=[LayerRule(match="a", **rule)])


# Ranks


def test_size_must_divide_the_world() -> None:
    config = LVXConfig(sequence_parallel_size=4)
    for world_size in (4, 8, 12):
        config.check_world_size(world_size)
    with pytest.raises(ValueError, match=r"got 4, .* 6 ranks .* one of 1, 2, 3, 6, or") as caught:
        config.check_world_size(6)
    assert str(caught.value).startswith("ds_lvx.sequence_parallel_size: ")
    with pytest.raises(ValueError, match="one of 1, 2, or start a multiple of 4"):
        config.check_world_size(2)


# Layers


def test_first_match_wins_and_case_counts() -> None:
    config = LVXConfig(
        layers=[
            LayerRule(match="*.layers.3.*", method="ring"),
            LayerRule(match="*.[cC]ross_attn", method="lvx"),
        ]
    )
    names = ["m.layers.8.cross_attn", "m.layers.3.cross_attn", "m.layers.8.CROSS_ATTN"]
    resolved = config.resolve(names)
    assert list(resolved) == names
    assert [r and r.method for r in resolved.values()] == ["lvx", "ring", None]


@pytest.mark.parametrize(
    ("pattern", "proposal"),
    [
        ("*.crossattn", "*.cross_attn"),
        ("cross_attn", "*.cross_attn"),
        ("*vison_model*", "*vision_model*"),
        ("*languge_model*.self_attn", "*language_model*.self_attn"),
        ("language_model.layers.*.cross_attn", "model.language_model.layers.*.cross_attn"),
        ("*.SELF_ATTN", "*.self_attn"),
    ],
)
def test_rule_without_layer_is_a_mistake(pattern: str, proposal: str) -> None:
    config = LVXConfig(
        layers=[
            LayerRule(match="*vision_model*", method="none"),
            LayerRule(match=pattern, method="lvx"),
        ]
    )
    with pytest.raises(ValueError, match="matches no attention layer") as caught:
        config.resolve(LONG_NAMES)
    message = str(caught.value)
    assert message.startswith(f'ds_lvx.layers[1].match: got "{pattern}"')
    assert f'did you mean "{proposal}"?' in message
    assert "model.language_model.layers.{3,8,13,18,23,28,33,38}.cross_attn" in message
    corrected = LVXConfig(layers=[LayerRule(match=proposal, method="lvx")])
    assert any(corrected.resolve(LONG_NAMES).values())


def test_pattern_like_nothing_gets_no_proposal() -> None:
    config = LVXConfig(layers=[LayerRule(match="zzzz", method="lvx")])
    with pytest.raises(ValueError, match="the nearest layers are") as caught:
        config.resolve(LONG_NAMES)
    assert "did you mean" not in str(caught.value)
    with pytest.raises(ValueError, match="the model has none"):
        config.resolve([])


def test_rule_that_never_decides_is_a_warning() -> None:
    config = LVXConfig(
        layers=[
            LayerRule(match="*", method="ring"),
            LayerRule(match="*.cross_attn", method="lvx"),
        ]
    )
    with pytest.warns(UserWarning, match=r"ds_lvx\.layers\[1\] .* decides for no layer"):
        resolved = config.resolve(LONG_NAMES)
    assert {rule.method for rule in resolved.values() if rule is not None} == {"ring"}


def test_names_are_summarised() -> None:
    assert summarise_names(["a.0.b", "c", "a.2.b", "a.1.b", "a.4.b", "d.7", "e2.x"]) == [
        "a.{0..2,4}.b",
        "c",
        "d.7",
        "e2.x",
    ]
    assert summarise_names([f"x.{2 * i}.y.{i % 2}" for i in range(10)]) == [
        "x.{0,2,4,...,18}.y.{0..1}"
    ]


@pytest.mark.parametrize(
    ("names", "others", "pattern"),
    [
        (["m.visual.0.attn"], ["m.text.0.self_attn"], "*.attn"),
        (["m.vision.0.attn", "m.vision.1.attn"], ["m.text.0.attn"], "*vision*"),
        (["m.text.0.self"], ["m.vision.0.self", "m.text.0.cross"], "*text*.self"),
        (["t.h.0.attn"], ["t.visual.h0.attn"], "*.h.*"),
        (["m.vision.0.self", "m.resampler.0.0"], ["m.layers.0.self"], "*vision*"),
        (["m.0.self"], ["m.vision.0.self"], "m.*.self"),
        (["0.1"], [], "*.*"),
    ],
)
def test_a_pattern_matches_its_layers_and_no_others(
    names: list[str], others: list[str], pattern: str
) -> None:
    assert pattern_for(names, others) == pattern


# The reference


def test_every_key_is_documented() -> None:
    reference = (ROOT / "docs" / "configuration.md").read_text()
    for model in (LVXConfig, LayerRule):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            assert f"### `{name}`" in reference


def test_examples_in_the_reference_are_valid() -> None:
    reference = (ROOT / "docs" / "configuration.md").read_text()
    examples = re.findall(r"```json\n(.*?)```", reference, flags=re.DOTALL)
    assert examples
    for example in examples:
        config = LVXConfig.from_ds_config(json.loads(example))
        assert config.layers
        config.resolve(LONG_NAMES)
