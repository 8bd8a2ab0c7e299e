"""Fine-tuning in which samples on the same media share a row: the same losses, each frame once."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lvx.data.chat import Chats, read_conversations
from ds_lvx.data.order import SampleOrder
from ds_lvx.distributed.channel import Channel
from ds_lvx.models import FAMILIES
from ds_lvx.models.prefixes import TOGETHER
from ds_lvx.models.visual import PIXELS, unwritten
from ds_lvx.training.inputs import read_inputs
from ds_lvx.training.lengths import sample_media
from ds_lvx.training.options import parse
from tests.data.media import chat, write_image, write_jsonl, write_video
from tests.launch.finetune_runs import arguments, finetune, metrics
from tests.models.files_case import maker_of, write_tiny
from tests.ranks import run_ranks

NAMES = ("mllama", "moss_vl", "qwen2_5_vl", "qwen3_5")
FURTHER = ("idefics", "mplugowl3", "smolvlm", "gemma3")
WITH_CODE = ("moss_vl", "mplugowl3")
VIDEO, IMAGE = ("video", "a.mp4"), ("image", "a.png")


def questions() -> list[Any]:
    """Three on a video, with others between, two on an image, one on both, one on nothing. No
    token stands between an image and its question where a template writes none."""
    return [
        chat(VIDEO, ("text", "Who is it?"), answer="A big rabbit."),
        chat(IMAGE, ("text", "Which colour?"), answer="Blue, I think."),
        chat(("text", "What is two and two?"), answer="Four."),
        chat(VIDEO, ("text", "Does it sleep?"), answer="No."),
        chat(IMAGE, VIDEO, ("text", "Both?"), answer="Yes."),
        chat(IMAGE, ("text", "Is it red?"), answer="It is not."),
        chat(VIDEO, ("text", "What animal?"), answer="A rabbit, a big one."),
    ]


def prepared(folder: Path, name: str) -> Path:
    """A tiny model of a family, and the questions."""
    if name in WITH_CODE:
        folder.mkdir()
        import_module(f"tests.models.test_{name}_files").write_checkpoint(folder)
    else:
        write_tiny(folder, name)
    write_jsonl(folder / "train.jsonl", *questions())
    return folder


def config_of(path: Path, name: str, *, shares: bool, micro: int, stage: int) -> str:
    text = "lvx" if name == "mplugowl3" else "ulysses"  # its hyper layers
    methods = {"local": "none", "cross": "lvx", "self": text}
    patterns = FAMILIES.named(name).patterns
    layers = [{"match": pattern, "method": methods[kind]} for kind, pattern in patterns.items()]
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "ds_lvx": {"sequence_parallel_size": 2, "share_prefixes": shares, "layers": layers},
    }
    path.write_text(json.dumps(config))
    return str(path)


def trained(folder: Path, out: Path, name: str, *, shares: bool, stage: int) -> list[float]:
    """Losses of three steps on all of them."""
    out.mkdir()
    given = {
        "model": folder,
        "data": folder / "train.jsonl",
        "frames": 3,
        "deepspeed_config": config_of(
            out / "ds.json", name, shares=shares, micro=len(questions()), stage=stage
        ),
        "output_dir": out / "out",
        "learning_rate": 1e-3,
        "max_steps": 3,
        "lr_scheduler": "constant",
    }
    run_ranks(finetune, 2, *arguments(**given, trust_remote_code=name in WITH_CODE))
    return [row["loss"] for row in metrics(out / "out")[0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FURTHER)]
)
def test_losses_are_those_of_rows_of_their_own(name: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "model", name)
    stage = 3 if name in ("mllama", "qwen2_5_vl") else 2
    apart, shared = (
        trained(folder, tmp_path / str(shares), name, shares=shares, stage=stage)
        for shares in (False, True)
    )
    assert apart[2] < apart[0]
    assert shared == pytest.approx(apart, rel=2e-4)
    assert shared[0] == pytest.approx(apart[0], rel=2e-5)


@pytest.mark.parametrize("name", ["mllama", "qwen2_5_vl", "smolvlm"])
def test_a_frame_is_decoded_once(name: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "model", name)
    conversations = read_conversations(folder / "train.jsonl")
    apart, shared = (maker_of(folder, frames=3, shares=shares) for shares in (False, True))
    assert TOGETHER not in apart.batch(conversations).inputs
    inputs = shared.batch(conversations).inputs
    assert inputs[TOGETHER].tolist() == [0, 1, 2, 0, 4, 1, 0]
    assert 2 * shared.counter.frames == apart.counter.frames > 0  # of two films, and of four
    if name == "smolvlm":
        assert inputs[PIXELS].shape[0] == 3


def test_a_film_is_looked_at_once_whose_tokens_follow_from_its_frames(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "model", "video_llama_3")
    chats = read_conversations(folder / "train.jsonl")
    one, three = (maker_of(folder, frames=3, shares=True) for _ in range(2))
    one.batch([chats[0]])
    three.batch([chats[0], chats[3], chats[6]])
    assert three.counter.frames == one.counter.frames > 0


def test_each_sample_on_an_image_that_breaks_off_is_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "model", "mllama")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    chats = read_conversations(folder / "train.jsonl")
    failed = maker_of(folder, frames=3, shares=True, skip=True).batch(chats).failed
    assert sorted(failed) == [1, 4, 5]
    for number, words in failed.items():
        assert words.startswith(f"{chats[number].source}: ")
        assert words.count("train.jsonl:") == 1


def test_pixels_that_nobody_writes_take_no_memory() -> None:
    """Those of samples that have them from another."""
    before = resident_mib()
    pixels = unwritten((4, 1 << 26), torch.bfloat16)
    pixels[0, :9] = 1
    assert resident_mib() - before < 100
    assert pixels[:2, 7:10].tolist() == [[1, 1, 0], [0, 0, 0]]


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def test_samples_on_the_same_media_come_one_after_the_other(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    write_image(tmp_path / "a.png")
    chats = Chats(write_jsonl(tmp_path / "data.jsonl", *questions()))
    media = sample_media(chats, world=Channel(None))
    assert [media[n] == media[0] for n in range(7)] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert len({*media}) == 4
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_video(elsewhere / "a.mp4")
    write_image(elsewhere / "a.png")
    chats = Chats(tmp_path / "data.jsonl", media_root=elsewhere)
    assert sample_media(chats, world=Channel(None)) == media, "as another node may have them"
    for epoch in (0, 1):
        order = SampleOrder(7, 0, media=media)
        taken = [order.sample(place) for place in range(7 * epoch, 7 * epoch + 7)]
        assert sorted(taken) == [*range(7)]
        numbers = [media[sample] for sample in taken]
        starts = [n for n, number in enumerate(numbers) if n == 0 or number != numbers[n - 1]]
        assert len(starts) == 4, numbers


def test_many_samples_on_a_film_come_no_sooner_than_one() -> None:
    """Half of them on one, each of the others on its own."""
    order = SampleOrder(100, 0, media=[0] * 50 + [*range(1, 51)])
    epochs = [[order.sample(100 * epoch + place) for place in range(100)] for epoch in range(40)]
    begins = [next(place for place, n in enumerate(taken) if n < 50) for taken in epochs]
    assert 15 < sum(begins) / len(begins) < 35
    assert len({*begins}) > 20
    inside = [tuple(n for n in taken if n < 50) for taken in epochs]
    assert len({*inside}) == 40


@pytest.mark.parametrize(
    ("micro", "words", "message"),
    [
        (1, (), "train_micro_batch_size_per_gpu 1; expected 2 or more"),
        (2, ("--pack", "64"), "share_prefixes: got true and --pack; expected one of them"),
        (2, ("--group_by_length",), "and --group_by_length; expected one of them"),
    ],
)
def test_what_does_not_go_with_it(
    micro: int, words: Sequence[str], message: str, tmp_path: Path
) -> None:
    write_image(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4")
    data = write_jsonl(tmp_path / "data.jsonl", *questions())
    config = config_of(tmp_path / "ds.json", "mllama", shares=True, micro=micro, stage=2)
    given = {"model": "tiny", "data": data, "frames": 2, "deepspeed_config": config}
    given |= {"output_dir": tmp_path / "out", "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        read_inputs(parse([*arguments(**given), *words]), 2)


def test_a_model_that_shares_none(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "model", "openflamingo")
    config = config_of(tmp_path / "ds.json", "openflamingo", shares=True, micro=2, stage=2)
    given = {"model": folder, "data": folder / "train.jsonl", "frames": 2, "max_steps": 1}
    given |= {"deepspeed_config": config, "output_dir": tmp_path / "out"}
    with pytest.raises(NotImplementedError, match="for a model of type 'openflamingo'"):
        read_inputs(parse(arguments(**given)), 2)
