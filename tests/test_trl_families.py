"""TRL's ``DPOTrainer`` with idefics, and with visual tokens among the text's: Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_lvx.models import FAMILIES
from tests.models import idefics_case
from tests.models.concatenated_case import rules
from tests.ranks import run_ranks
from tests.test_trainer import config_of
from tests.test_trl_dpo import DPO, assert_same_preferences, prefer, rows, trl

pytestmark = pytest.mark.exhaustive
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CASES = [*product(("qwen2_5_vl", "idefics"), (2, 3), (False,)), ("qwen2_5_vl", 2, True)]


class Pictures(transformers.Qwen2_5_VLProcessor):
    """The processor without its part for videos, which wants torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return type(argument)


def qwen(folder: Path) -> dict[str, Any]:
    """TRL's own collator and processor."""
    mine = FAMILIES.named("qwen2_5_vl").tiny()[1]
    images = Qwen2VLImageProcessorPil(**mine.of_images)
    processor = Pictures(images, mine.tokenizer, None, chat_template=TEMPLATE)
    return {
        "model": transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder),
        "data_collator": trl.trainer.dpo_trainer.DataCollatorForVisionPreference(processor),
        "train_dataset": rows(),
        "eval_dataset": rows(),
        "processing_class": processor,
    }


def idefics(folder: Path) -> dict[str, Any]:
    """A collator of one's own: idefics's processor makes one sample of TRL's list of answers."""
    texts = rows().remove_columns("images")
    tokenizer = FAMILIES.named("qwen2_5_vl").tiny()[1].tokenizer  # of any model: to tell lengths
    tokenizer.chat_template = TEMPLATE
    return {
        "model": transformers.IdeficsForVisionText2Text.from_pretrained(folder),
        "data_collator": preferences,
        "train_dataset": texts,
        "eval_dataset": texts,
        "processing_class": tokenizer,
    }


def preferences(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Two images in the prompts of 7 tokens, and answers of unequal length behind them."""
    sizes = [len(each[key]) for key in ("chosen_ids", "rejected_ids") for each in examples]
    batch = idefics_case.make_batch(["..ii..." + "." * (1 + n % 9) for n in sizes], seed=sum(sizes))
    del batch["labels"]
    answers = batch["attention_mask"].index_fill(1, torch.arange(7), 0)
    return {**batch, "completion_mask": answers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("qwen2_5_vl", "idefics")}
    idefics_case.tiny_model().save_pretrained(made["idefics"])
    family = FAMILIES.named("qwen2_5_vl")
    torch.manual_seed(0)
    model = family.build(family.tiny()[0], gate=0.5, dtype=torch.float32)
    model.save_pretrained(made["qwen2_5_vl"])
    return made


@pytest.mark.parametrize(("name", "stage", "shares"), CASES)
def test_dpo_on_two_ranks_has_the_losses_of_one_process(
    name: str, stage: int, shares: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    make, folder = {"qwen2_5_vl": qwen, "idefics": idefics}[name], folders[name]
    own = rules("qwen2_5_vl", "ring", 2) if name == "qwen2_5_vl" else None
    config = {**config_of(stage), **({"ds_lvx": own["ds_lvx"]} if own else {})}
    config["ds_lvx"]["share_prefixes"] = shares
    if name == "idefics":
        patterns = FAMILIES.named(name).patterns
        for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
            rule["match"] = patterns[kind]
    alone = prefer(trl.DPOTrainer, tmp_path / "alone", folder, make=make)
    for found in run_ranks(prefer, 2, DPO, tmp_path, folder, config, make=make):
        assert_same_preferences(found, alone)
