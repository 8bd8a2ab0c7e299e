"""`ds-lvx merge` folds an adapter into its base: the same logits, and a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from ds_lvx import cli
from tests.launch.checkpoint_folder import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of it that says something."""
    folder = tmp_path_factory.mktemp("merge")
    write_checkpoint(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 12)[None]).logits


def test_a_merged_model_says_what_base_and_adapter_say(folder: Path) -> None:
    words = ["merge", "--adapter", str(folder / "adapter"), "--output", str(folder / "merged")]
    assert cli.main(words) == 0
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, folder / "adapter"))
    assert float((expected - before).abs().max()) > 1e-3
    merged = AutoModelForImageTextToText.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert AutoProcessor.from_pretrained(folder / "merged").tokenizer is not None
    assert cli.main(words) == 2  # it is there now


def test_what_is_no_adapter_and_what_names_no_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "out")]
    assert cli.main(["merge", "--adapter", str(folder / "base"), *out]) == 2
    assert "expected the folder of a LoRA adapter" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert cli.main(["merge", "--adapter", str(tmp_path), *out]) == 2
    assert "which names no base; name it: --model" in capsys.readouterr().err
