"""What LoRA trains: the modules that peft alone would take, and words for those it would not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ds_lvx.models import FAMILIES
from ds_lvx.training.lora import ALL_LINEAR
from ds_lvx.training.model import Source, load_model
from ds_lvx.training.options import Options, parse

TINY = [name for name in FAMILIES if FAMILIES.named(name).has("tiny")]
GIVEN = ("--data", "none", "--deepspeed_config", "none", "--output_dir", "none", "--lora_r", "2")


def options(*words: str, name: str = "mllama") -> Options:
    return parse(["--model", f"tiny:{name}", *GIVEN, *words])


def loaded(*words: str, name: str = "mllama") -> nn.Module:
    given = options(*words, name=name)
    return load_model(given, {}, Source.of(given.model))


def by_peft(name: str = "mllama", **config: Any) -> nn.Module:
    source = Source.of(f"tiny:{name}")
    return get_peft_model(source.load(torch.float32), LoraConfig(r=2, **config))


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", TINY)
def test_all_linear_layers_are_those_of_peft_alone(name: str) -> None:
    found = trained(loaded("--lora_target_modules", ALL_LINEAR, name=name))
    expected = trained(by_peft(name, target_modules=ALL_LINEAR))
    assert found == [n for n in expected if ".out_proj." not in n or n in found]
    source = Source.of(f"tiny:{name}")
    attends = [n for n, m in source.load(torch.float32).named_modules() if is_attention(m)]
    left = {n.split(".lora_")[0] for n in expected} - {n.split(".lora_")[0] for n in found}
    assert left == {f"base_model.model.{n}.out_proj" for n in attends}


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


@pytest.mark.slow
def test_what_the_words_mean_is_what_they_mean_to_peft() -> None:
    language = r".*language_model.*\.(q_proj|fc\d|down_proj)"
    cases: list[tuple[Sequence[str], dict[str, Any]]] = [
        (["q_proj", "down_proj"], {"target_modules": ["q_proj", "down_proj"]}),
        (["q_proj,down_proj"], {"target_modules": ["q_proj", "down_proj"]}),
        (["cross_attn.k_proj"], {"target_modules": ["cross_attn.k_proj"]}),
        (["fc1"], {"target_modules": ["fc1"]}),
        (["lm_head"], {"target_modules": ["lm_head"]}),
        ([language], {"target_modules": language}),
    ]
    for words, config in cases:
        found = trained(loaded("--lora_target_modules", *words))
        assert found == trained(by_peft(**config)) != [], words
    targets = FAMILIES.named("mllama").lora_targets
    saved = ["--lora_modules_to_save", "multi_modal_projector", "cross_attn.q_norm"]
    config = {"target_modules": targets, "modules_to_save": saved[1:]}
    found = trained(loaded(*saved))
    assert found == trained(by_peft(**config))
    assert sum("modules_to_save" in name for name in found) == 2 + 2
    # What trains whole gets no LoRA.
    words = ["--lora_target_modules", ALL_LINEAR, "--lora_modules_to_save", "lm_head"]
    words += ["multi_modal_projector"]
    config = {"target_modules": ALL_LINEAR, "modules_to_save": words[3:]}
    assert trained(loaded(*words)) == trained(by_peft(**config))


def test_a_frozen_tower_has_no_lora_whatever_the_names() -> None:
    for words in ([ALL_LINEAR], ["q_proj", "fc1"], [r".*q_proj"]):
        everywhere = trained(loaded("--lora_target_modules", *words))
        found = trained(loaded("--freeze_vision", "--lora_target_modules", *words))
        assert found == [name for name in everywhere if ".vision_model." not in name] != everywhere
    # The defaults are outside of it, and nothing has to be left out.
    model: Any = loaded("--freeze_vision")
    found = trained(model)
    assert found == trained(loaded())
    assert len(found) == 2 * 4 * 4  # A and B of q, k, v, o in four layers of text
    assert all(".language_model." in name for name in found)
    assert model.peft_config["default"].exclude_modules is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["q_prj"], r"got 'q_prj', which is the name of no module; .*layers are .*\bq_proj\b"),
        (["q_proj", "fc9"], r"got 'fc9', which is the name of no module"),
        ([r".*\.qq"], r"got '.*qq', which is the name of no module.* correct it"),
        (["self_attn"], r"got self_attn, which peft refuses \(Target module .*of them .*fc1"),
        (["--freeze_vision", "fc1"], r"only in what has no LoRA \(model.vision_model\)"),
    ],
)
def test_targets_that_are_wrong(words: list[str], message: str) -> None:
    flags = [word for word in words if word.startswith("--")]
    with pytest.raises(ValueError, match=message):
        loaded(*flags, "--lora_target_modules", *words[len(flags) :])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["head"], r"got 'head', which is the name of no module; .*\blm_head\b"),
        (["language_model.layers"], r"ModuleList a list of modules"),
        (["language_model"], r"Model with attention in it"),
        (["--freeze_vision", "vision_model.patch_embedding"], r"that the run leaves as it is"),
        (["act_fn"], r"without weights"),
        (["layers.0.mlp", "layers.0.mlp.down_proj"], r"inside another of them"),
    ],
)
def test_modules_that_cannot_train_whole(words: list[str], message: str) -> None:
    flags = [word for word in words if word.startswith("--")]
    with pytest.raises(ValueError, match=rf"--lora_modules_to_save: .*{message}"):
        loaded(*flags, "--lora_modules_to_save", *words[len(flags) :])


def test_a_layer_with_further_weights_inside_is_refused() -> None:
    source = Source.of("tiny:idefics")
    source.config.additional_vocab_size = 2
    for name in ("embed_tokens", "lm_head"):
        given = options("--lora_target_modules", name, name="idefics")
        with pytest.raises(ValueError, match=rf"got .*{name}, a IdeficsDecoupled.* additional_"):
            load_model(given, {}, source)


def test_a_weight_that_the_head_shares_is_refused() -> None:
    source = Source.of("tiny:qwen2_5_vl")
    source.config.get_text_config().tie_word_embeddings = True
    source.config.tie_word_embeddings = True
    for words in (
        ["--lora_target_modules", "embed_tokens"],
        ["--lora_modules_to_save", "embed_tokens"],
        ["--lora_modules_to_save", "lm_head"],
    ):
        with pytest.raises(ValueError, match=r"whose weight is that of .*(lm_head|embed_tokens)"):
            load_model(options(*words), {}, source)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_target_modules", "q_proj", ".*v"], "got '.*v'; expected names of modules, or by"),
        (["--lora_target_modules", ALL_LINEAR, "q_proj"], f"got '{ALL_LINEAR}'; expected names"),
        (["--lora_target_modules", "(q_proj"], "which is no regular expression"),
        (["--lora_modules_to_save", "lm.*"], "got 'lm.*'; expected names of modules; correct it"),
        (["--lora_r", "0", "--lora_target_modules", "q_proj"], "got no LoRA; expected its rank"),
        (["--lora_r", "0", "--lora_modules_to_save", "lm_head"], "got no LoRA; expected its rank"),
    ],
)
def test_words_that_are_wrong_are_said_at_once(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(*words)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), capsys.readouterr().err)
