"""Qwen-VL from a checkpoint's folder: its table of tokens, text and pixels, and code of its own."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ds_lvx.compare.case import case_of
from ds_lvx.data.batch import FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.qwen_vl.processor import Processor
from ds_lvx.models.registry import FAMILIES
from ds_lvx.plan import models as planned
from ds_lvx.training.asking import Prompts
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import write_config
from tests.launch.test_generate import run
from tests.models import qwen_vl_double
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, whole_batches, write_samples
from tests.models.qwen_vl_case import PLACES, SIDE, tiny_model
from tests.ranks import run_ranks

CODE = "modeling_qwen"
WORDS = (b" r", b"ab", b"abb")
TABLE = [*(bytes([n]) for n in range(256)), *WORDS]
START = len(TABLE) + 3 + 205 + 6
VISUAL = {
    "image_size": SIDE,
    "patch_size": 14,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 1.5,
    "output_dim": 32,
    "image_start_id": START,
}


def write_checkpoint(folder: Path, *, queries: int = PLACES) -> Path:
    """Files as a checkpoint has them, and two samples."""
    settings = {"vocab_size": START + 3, "max_position_embeddings": 512, "seq_length": 512}
    model = tiny_model(**settings, visual={**VISUAL, "n_queries": queries})
    model.save_pretrained(folder)
    (folder / f"{CODE}.py").write_text(Path(qwen_vl_double.__file__).read_text())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"{CODE}.QWenConfig",
        "AutoModelForCausalLM": f"{CODE}.QWenLMHeadModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = (f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(TABLE))
    (folder / "qwen.tiktoken").write_text("".join(rows))
    return write_samples(folder, answer="It is green.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen"))


def source_of(folder: Path) -> Source:
    return Source.of(str(folder), trust_remote_code=True)


def test_text_is_what_the_model_s_code_writes(folder: Path) -> None:
    source = source_of(folder)
    source.check_tokenizer()
    tokenizer = source.processor.tokenizer
    assert tokenizer("a rabbit")["input_ids"] == [97, 256, 258, 105, 116]
    assert tokenizer("abb")["input_ids"] == [258]
    _, second = whole_batches(folder, frames=2, trust_remote_code=True)
    images = [f"Picture {n}: <img>{'<imgpad>' * PLACES}</img>\n" for n in (1, 2, 3)]
    assert tokenizer.decode(second["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nLook{''.join(images)}<|im_end|>\n"
        "<|im_start|>assistant\nIt is green.<|im_end|>\n"
    )
    learnt = second["labels"][second["labels"] != -100]
    assert tokenizer.decode(learnt) == "It is green.<|im_end|>"
    assert second["images_per_sample"].tolist() == [3]
    with pytest.raises(ValueError, match=rf"<img> is {START}, and a model for which it is 7"):
        Processor.of(str(folder), side=SIDE, places=PLACES, start=7)


def test_pixels_are_resized_whole_and_normalised(folder: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels = source_of(folder).processor.pixels(Image.fromarray(values))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (torch.from_numpy(values) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(pixels, expected.permute(2, 0, 1))


def test_a_comparison_trains_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="4 rows an image; expected 256"):
        case_of(str(folder), trust_remote_code=True)
    whole = write_checkpoint(tmp_path / "whole", queries=256)
    plan = planned.model(str(whole))
    assert (plan.cross.count, plan.cross.mlp, plan.frame_tokens, plan.tower.mlp) == (2, 24, 256, 24)
    case = replace(case_of(str(whole), trust_remote_code=True), text_tokens=8)
    model, layout = compared(case, frames=2, method="lvx", checkpoint=str(whole))
    assert layout.text.kv_lengths == (2 * 258 + 8,)
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}
    assert model.transformer.visual.attn_pool.query.grad.abs().max() > 0


def ds_config_of(tmp_path: Path, *, stage: int) -> dict[str, Any]:
    """A config whose rules are for this model's layers."""
    config: dict[str, Any]
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=stage)).read_text())
    patterns = FAMILIES.named("qwen").patterns
    config["ds_lvx"]["layers"] = [
        {"match": patterns["local"], "method": "none"},
        {"match": patterns["self"], "method": "ulysses"},
    ]
    return config


def loaded(folder: Path, batch: dict[str, Any]) -> Any:
    """A model that has the images of a batch, whatever the text names, and what it gets of it."""
    model = source_of(folder).load(torch.float32)
    visual, pixels = model.transformer.visual, batch.pop("pixel_values")
    visual.encode = lambda _: visual(pixels)
    return model, {key: value for key, value in batch.items() if "images" not in key}


@pytest.mark.slow
def test_generate_asks_a_checkpoint_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "ds.json", tmp_path / "answers.jsonl"
    config.write_text(json.dumps(ds_config_of(tmp_path, stage=0)))
    data = folder / "train.jsonl"
    words = ["--model", folder, "--trust_remote_code", "--deepspeed_config", config, "--data", data]
    words += ["--frames", 3, "--max_new_tokens", 4, "--output", out, "--traceback"]
    assert run_ranks(run, 2, *map(str, words)) == [0, 0]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    source = source_of(folder)
    encoder = TextEncoder(source.processor, 512, family=source.family)
    prompts = Prompts(encoder, FrameRate(count=3), owned=range)
    for asked, record in zip(read_conversations(data), records, strict=True):
        model, batch = loaded(folder, dict(prompts.batch([asked]).inputs))
        ids = batch["input_ids"]
        for _ in range(4):  # which end no answer
            with torch.no_grad():
                logits = model.eval()(ids).logits[:, -1:]
            ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)
        new = ids[0, -4:].tolist()
        assert record["answer"] == encoder.tokenizer.decode(new, skip_special_tokens=True)
        assert record["new_tokens"] == 4


@pytest.mark.slow
def test_finetune_trains_a_checkpoint_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    loss = first_loss(
        folder, tmp_path, ds_config_of(tmp_path, stage=3), "--trust_remote_code", frames=3
    )
    start = []
    for batch in whole_batches(folder, frames=3, trust_remote_code=True):
        model, inputs = loaded(folder, batch)
        # The double finds the path of an image by its end.
        start.append(model.train()(**inputs).loss.item())
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = source_of(tmp_path / "out" / "model")
    assert trained.processor.image_token_id == START + 2
    before, after = (each.load(torch.float32).state_dict() for each in (source_of(folder), trained))
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
