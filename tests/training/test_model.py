"""What is wrong with a checkpoint, said before its weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from ds_lvx.cli import main
from ds_lvx.data.text import TextEncoder
from ds_lvx.training.model import Source
from tests.launch.checkpoint_folder import write_checkpoint


def test_an_adapter_is_named_and_merges_as_the_document_says(tmp_path: Path) -> None:
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    write_checkpoint(Path(base))
    model = AutoModelForImageTextToText.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    for folder in (adapter, base):
        if folder == base:  # transformers would load both, and train neither as asked
            (Path(base) / "adapter_config.json").write_text(
                json.dumps({"base_model_name_or_path": base})
            )
        with pytest.raises(ValueError, match=f"--model: got {folder}, a LoRA adapter of {base}"):
            Source.of(folder)
    (Path(base) / "adapter_config.json").unlink()

    document = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text()
    (line,) = re.findall(r"ds-lvx merge (--adapter runs/lora/model .*)", document)
    for name, folder in (("lora/model", adapter), ("lora/merged", merged)):
        assert f"runs/{name}" in line
        line = line.replace(f"runs/{name}", folder)
    assert main(["merge", *line.split()]) == 0
    assert Source.of(merged).family.model_type == "mllama"
    assert not (Path(merged) / "adapter_config.json").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_has_outputs(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    Source.of(str(tmp_path)).check_tokenizer()
    Source.of("tiny").check_tokenizer()
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.tokenizer.add_tokens(["<one>", "<two>"])
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 tokens more than the model has outputs .*<one>"):
        Source.of(str(tmp_path)).check_tokenizer()


def test_a_processor_of_another_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_token_index"] += 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected the processor of the same model"):
        Source.of(str(tmp_path)).check_tokenizer()
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    with pytest.raises(ValueError, match=r"without .*image_token, .*the processor of a .mllama"):
        TextEncoder(tokenizer, 99, family=Source.of("tiny").family)


@pytest.mark.parametrize("config", ["{}", "{", '{"model_type": "nothing-like-it"}'])
def test_a_config_of_no_model(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    for name in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=f"--model: got '{name}', which cannot be read"):
            Source.of(name)


def test_a_folder_that_lacks_files_says_which_belong_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mllama")
    (tmp_path / "mllama" / "preprocessor_config.json").unlink()
    tiny = Source.of("tiny:qwen2_5_vl")
    tiny.config.save_pretrained(tmp_path / "qwen")
    tiny.processor.save_pretrained(tmp_path / "qwen")
    assert Source.of(str(tmp_path / "qwen")).family.model_type == "qwen2_5_vl"
    (tmp_path / "qwen" / "preprocessor_config.json").unlink()
    for name, found in (("mllama", ""), ("qwen", "neither preprocessor_config.json nor processor")):
        with pytest.raises(ValueError, match=rf"{found}.*expected a whole .*copy what is missing"):
            Source.of(str(tmp_path / name))
