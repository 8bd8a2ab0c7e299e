"""mPLUG-Owl3 from a checkpoint's folder: its own code, its text, its pixels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_lvx.compare.case import case_of
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import read_conversations
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.models.mplugowl3.processor import media_text
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import write_config
from tests.models import mplugowl3_double
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, whole_batches, write_samples
from tests.models.mllama_case import reference_steps
from tests.models.mplugowl3_case import SIZE, tiny_model

SPECIAL = ("image", "start_video_frame", "end_video_frame", "im_start", "im_end", "endoftext")
CODE = "modeling_mplugowl3"


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint, and two samples."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    model = tiny_model(vocab_size=len(fast))
    for module in model.modules():
        if hasattr(module, "_tied_weights_keys"):
            module._tied_weights_keys = {}
    model.save_pretrained(folder)
    (folder / f"{CODE}.py").write_text(Path(mplugowl3_double.__file__).read_text())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"{CODE}.mPLUGOwl3Config",
        "AutoModelForCausalLM": f"{CODE}.mPLUGOwl3Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return write_samples(folder, answer="It is green.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mplug"))


def source_of(folder: Path) -> Source:
    return Source.of(str(folder), trust_remote_code=True)


def for_the_model(batch: dict[str, Any]) -> dict[str, Any]:
    """Without what is ours."""
    return {key: value for key, value in batch.items() if key != "images_per_sample"}


def test_text_and_offsets_are_those_of_the_model_s_processor(folder: Path) -> None:
    first, second = whole_batches(folder, frames=3, trust_remote_code=True)
    processor = source_of(folder).processor
    ids = second["input_ids"][0]
    frames = f"<|start_video_frame|>{'<|image|>' * 3}<|end_video_frame|>"
    assert processor.tokenizer.decode(ids) == (
        "<|im_start|>system\n<|im_end|>"
        f"\n<|im_start|>user\nLook<|image|>{frames}<|im_end|>"
        "\n<|im_start|>assistant\nIt is green.<|im_end|><|endoftext|>"
    )
    learnt = second["labels"][second["labels"] != -100]
    assert processor.tokenizer.decode(learnt) == "It is green.<|im_end|>"
    (places,) = second["media_offset"].tolist()
    assert places == [n for n, each in enumerate(ids) if each == processor.image_token_id]
    assert first["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert second["images_per_sample"].tolist() == [4]


def test_a_tokenizer_without_tokens_for_a_video_has_its_images_alone() -> None:
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: {"<|image|>": 0})
    assert media_text(tokenizer, [0.0, 1.0]) == "<|image|><|image|>"
    assert media_text(tokenizer, None) == "<|image|>"


def test_pixels_are_resized_whole_and_normalised(folder: Path) -> None:
    processor = source_of(folder).processor
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels = processor.pixels(Image.fromarray(values), dtype=torch.float32)
    expected = (torch.from_numpy(values).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixels, expected)
    tall = processor.pixels(Image.new("RGB", (7, 30), "red"), dtype=torch.bfloat16)
    assert tall.shape == (3, SIZE, SIZE)
    assert tall.dtype == torch.bfloat16


def test_samples_of_unequal_frames_share_a_batch(folder: Path) -> None:
    """The frames that a rank holds, of the sample with fewer of them too."""
    source = source_of(folder)
    encoder = TextEncoder(source.processor, 512, family=source.family)
    conversations = read_conversations(folder / "train.jsonl")
    parts = [
        BatchMaker(encoder, FrameRate(count=3), owned=lambda count, cut=cut: range(count)[cut])
        for cut in (slice(0, 2), slice(2, 4))
    ]
    batches = [maker.batch([*conversations]).inputs for maker in parts]
    assert [each["images_per_sample"].tolist() for each in batches] == [[2, 2], [1, 2]]
    offsets = batches[0]["media_offset"]
    assert offsets.shape == (2, 4)
    assert offsets[0, 3] == -1


def test_a_loaded_model_computes_what_the_saved_one_did(folder: Path) -> None:
    """transformers leaves buffers that no checkpoint holds uninitialised."""
    (batch, _) = whole_batches(folder, frames=3, trust_remote_code=True)
    source = source_of(folder)
    saved = tiny_model(vocab_size=len(source.processor.tokenizer))
    loaded = source.load(torch.float32)
    torch.testing.assert_close(
        loaded(**for_the_model(batch)).logits, saved(**for_the_model(batch)).logits
    )
    loaded.vision_model.position_ids.fill_(1)
    assert not loaded(**for_the_model(batch)).logits.allclose(saved(**for_the_model(batch)).logits)


def test_code_for_another_transformers_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    code = (folder / f"{CODE}.py").read_text()
    (tmp_path / f"{CODE}.py").write_text(code.replace("PreTrainedModel", "ModelOfThen", 1))
    with pytest.raises(ValueError, match=r"does not run on transformers 5\..*ModelOfThen.*ported"):
        source_of(folder).family.load(str(tmp_path), torch.float32, trust_remote_code=True)


def test_a_comparison_trains_a_checkpoint(folder: Path) -> None:
    """On one rank: its frames have the tokens that the report says."""
    case = case_of(str(folder), trust_remote_code=True)
    model, layout = compared(case, frames=3, method="lvx", recompute=True, checkpoint=str(folder))
    assert layout.kv_lengths == (3 * case.frame_tokens,)
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all("encoder.layers.2." in name for name in silent)  # which the model does not use
    assert parts_of(model, case) == {"cross_attention", "text", "vision"}
    with pytest.raises(ValueError, match="'mplugowl3', a family without models of random"):
        case_of("mplugowl3")


@pytest.mark.slow
def test_finetune_trains_a_checkpoint_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=3)).read_text())
    patterns = FAMILIES.named("mplugowl3").patterns
    for rule, kind in zip(config["ds_lvx"]["layers"], ("local", "cross", "self"), strict=True):
        rule["match"] = patterns[kind]
    loss = first_loss(folder, tmp_path, config, "--trust_remote_code", frames=3)
    source = source_of(folder)
    start = [
        reference_steps([[for_the_model(batch)]], source.load(torch.float32))["losses"][0][0]
        for batch in whole_batches(folder, frames=3, trust_remote_code=True)
    ]
    assert loss in [pytest.approx(each, abs=1e-5) for each in start]
    trained = source_of(tmp_path / "out" / "model")
    assert trained.processor.image_token_id == source.processor.image_token_id
    before, after = (each.load(torch.float32).state_dict() for each in (source, trained))
    unused = "vision_model.encoder.layers.2."
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith(unused), name
