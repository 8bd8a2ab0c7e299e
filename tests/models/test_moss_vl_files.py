"""MOSS-VL from a checkpoint's folder: its own code, its text with times, its pixels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
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
from ds_lvx.data.frames import choose, probe
from ds_lvx.data.text import TextEncoder
from ds_lvx.models.moss_vl.checkpoint import restore_frequencies
from ds_lvx.models.moss_vl.grid import Grid
from ds_lvx.training.model import Source
from tests.launch.finetune_runs import write_config
from tests.models import moss_vl_double, moss_vl_double_places, moss_vl_double_vision
from tests.models.compare_case import compared, parts_of
from tests.models.files_case import first_loss, write_samples
from tests.models.mllama_case import reference_steps
from tests.models.moss_vl_case import tiny_model

SPECIAL = (
    "vision_start",
    "vision_end",
    "image_pad",
    "time_start",
    "time_end",
    "im_start",
    "im_end",
)
SETTINGS = {
    "size": {"longest_edge": 4096, "shortest_edge": 64},
    "patch_size": 4,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
CODE = "modeling_moss_vl"


def write_code(folder: Path) -> None:
    """The double as the one file of code that a checkpoint brings."""
    modules = (moss_vl_double_vision, moss_vl_double_places, moss_vl_double)
    first, *others = (Path(each.__file__).read_text() for each in modules)
    own = r"from (tests\.\S+|__future__) import (\(.*?\)|[^(]*?)\n"
    parts = [first, *(re.sub(own, "", each, flags=re.DOTALL) for each in others)]
    (folder / f"{CODE}.py").write_text("\n".join(parts))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"{CODE}.MossVLConfig",
        "AutoModelForCausalLM": f"{CODE}.MossVLForConditionalGeneration",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint, and two samples."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_max_pixels": 2304}))
    model = tiny_model(image=fast.convert_tokens_to_ids("<|image_pad|>"), vocab_size=len(fast))
    model._tied_weights_keys = {}
    model.save_pretrained(folder)
    write_code(folder)
    return write_samples(folder, answer="It is green.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moss"))


def whole_batches(folder: Path, *, frames: int) -> list[dict[str, Any]]:
    """Every sample with all its frames, as one process takes it."""
    source = Source.of(str(folder), trust_remote_code=True)
    encoder = TextEncoder(source.processor, 4096, family=source.family)
    maker = BatchMaker(encoder, FrameRate(count=frames), owned=range)
    batches = []
    for conversation in read_conversations(folder / "train.jsonl"):
        batch: dict[str, Any] = dict(maker.batch([conversation]).inputs)
        ids, total = batch["input_ids"], len(batch["grid_thw"])
        seen = (ids == source.processor.image_token_id).cumsum(1)[..., None]
        batch["cross_attention_mask"] = (torch.arange(total) >= seen)[:, None]
        batches.append({**batch, "media_nums_per_sample": [total]})
    return batches


def test_text_has_a_time_for_each_frame_and_frames_share_their_pixels(folder: Path) -> None:
    first, second = whole_batches(folder, frames=3)
    written = Source.of(str(folder), trust_remote_code=True).processor.tokenizer.decode(
        second["input_ids"][0]
    )
    film = probe(str(folder / "a.mp4"))
    times = [film.seconds(index) for index in choose(film, count=3)]
    assert len({f"{time:.1f}" for time in times}) == 3
    frames = [f"<|time_start|>{t:.1f} seconds<|time_end|><|image_pad|>" for t in times]
    assert written == (
        f"<|im_start|>user\nLook<|image_pad|><|vision_start|>{''.join(frames)}<|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\nIt is green.<|im_end|>\n"
    )
    learnt = second["labels"][second["labels"] != -100]
    assert len(learnt) == len("It is green.") + 1
    # Three frames of 64 x 48 pixels may have 768 each, four 576.
    assert first["grid_thw"].tolist() == [[1, 6, 8]] * 3
    assert second["grid_thw"].tolist() == [[1, 4, 6]] * 4


def test_a_row_of_pixels_is_a_patch(folder: Path) -> None:
    processor = Source.of(str(folder), trust_remote_code=True).processor
    values = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
    rows, grid = processor.patches(Image.fromarray(values), frames=1, dtype=torch.float32)
    assert grid == [1, 4, 6]
    expected = []
    for block_row, block_column in np.ndindex(2, 3):
        for row, column in np.ndindex(2, 2):
            y, x = (2 * block_row + row) * 4, (2 * block_column + column) * 4
            patch = torch.from_numpy(values[y : y + 4, x : x + 4]).permute(2, 0, 1)
            expected.append((patch / 255 - 0.5).flatten() / 0.5)
    torch.testing.assert_close(rows, torch.stack(expected))
    assert Grid.of_rows([(0, *grid)], 2).tokens.tolist() == [7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bf16", "close"), [(False, 1e-5), pytest.param(True, 0.1, marks=pytest.mark.exhaustive)]
)
def test_finetune_trains_a_checkpoint_with_code_of_its_own(
    bf16: bool, close: float, folder: Path, tmp_path: Path
) -> None:
    precision = {"bf16": {"enabled": bf16}}
    config = json.loads(Path(write_config(tmp_path / "ds.json", stage=3, **precision)).read_text())
    config["ds_lvx"]["layers"][0]["match"] = "*visual*"
    loss = first_loss(folder, tmp_path, config, "--trust_remote_code", frames=3)
    batches = whole_batches(folder, frames=3)
    source = Source.of(str(folder), trust_remote_code=True)
    start = [reference_steps([[batch]], source.load(torch.float32))["losses"] for batch in batches]
    assert loss in [pytest.approx(each[0][0], abs=close) for each in start]
    trained = Source.of(str(tmp_path / "out" / "model"), trust_remote_code=True)
    assert trained.processor.image_token_id == source.processor.image_token_id
    before, after = (each.load(torch.float32).state_dict() for each in (source, trained))
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_a_loaded_model_computes_what_the_saved_one_did(folder: Path) -> None:
    """transformers leaves buffers that no checkpoint holds uninitialised."""
    (batch, _) = whole_batches(folder, frames=3)
    source = Source.of(str(folder), trust_remote_code=True)
    tokens = len(source.processor.tokenizer)
    saved = tiny_model(image=source.processor.image_token_id, vocab_size=tokens)
    loaded = source.load(torch.float32)
    torch.testing.assert_close(loaded(**batch).logits, saved(**batch).logits)
    for name in (
        "model.language_model.rotary_emb.inv_freq",
        "model.visual.rotary_pos_emb.inv_freq",
    ):
        buffers = dict(loaded.named_buffers())
        torch.testing.assert_close(buffers[name], dict(saved.named_buffers())[name])
        buffers[name].fill_(7.0)
    restore_frequencies(loaded)
    torch.testing.assert_close(loaded(**batch).logits, saved(**batch).logits)


def test_code_runs_only_where_the_user_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"comes with the checkpoint; .*pass --trust_remote_code"):
        Source.of(str(folder))


def test_code_for_another_transformers_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    code = (folder / f"{CODE}.py").read_text()
    (tmp_path / f"{CODE}.py").write_text(code.replace("create_causal_mask", "mask_of_then", 1))
    source = Source.of(str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"does not run on transformers 5\..*mask_of_then.*4\.57"):
        source.family.load(str(tmp_path), torch.float32, trust_remote_code=True)


def test_there_is_no_tiny_one(folder: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"'moss_vl' \(MossVL\) has no tiny\(\)"):
        Source.of("tiny:moss_vl")


def test_a_comparison_trains_a_checkpoint(folder: Path) -> None:
    """On one rank: its frames have the tokens that the report says."""
    case = replace(case_of(str(folder), trust_remote_code=True), image_size=32)
    model, layout = compared(case, frames=3, method="lvx", recompute=True, checkpoint=str(folder))
    assert layout.kv_lengths == (3 * case.frame_tokens,)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert parts_of(model, case) == {
        "cross_attention",
        "text",
        "vision",
    }
    with pytest.raises(ValueError, match="'moss_vl', a family without models of random"):
        case_of("moss_vl")


def test_frames_of_packed_samples_share_their_own_samples_pixels(folder: Path) -> None:
    source = Source.of(str(folder), trust_remote_code=True)
    encoder = TextEncoder(source.processor, 4096, family=source.family)
    samples = read_conversations(folder / "train.jsonl")
    alone = [batch["grid_thw"].tolist() for batch in whole_batches(folder, frames=3)]
    for mine in (range(7), range(2, 5)):
        maker = BatchMaker(encoder, FrameRate(count=3), owned=lambda _, m=mine: m, pack=4096)
        made = maker.batch(samples).inputs
        assert made["media_nums_per_sample"].tolist() == [len(mine)]
        assert made["grid_thw"].tolist() == [*alone[0], *alone[1]][mine.start : mine.stop]
