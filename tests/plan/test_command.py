"""``ds-lvx plan`` as its users call it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from ds_lvx.cli import main
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import from_card
from ds_lvx.plan.memory import footprint
from ds_lvx.plan.models import known, model
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.search import plan

LLAMA = ("plan", "--model", "Llama-3.2-11B-Vision", "--text", "384", "--card", "H100")


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*LLAMA, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_a_frame_that_no_rank_can_hold_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 96}
    text |= {"num_attention_heads": 4, "intermediate_size": 64}
    vision = {"num_hidden_layers": 2, "hidden_size": 1024, "num_attention_heads": 16}
    vision |= {"intermediate_size": 64, "image_size": 56_000, "patch_size": 14}
    config = {"model_type": "openflamingo", "text_config": text, "vision_config": vision}
    config |= {"latents": 4, "dim_head": 8, "cross_attn_every_n_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("plan", "--model", str(tmp_path), "--gpus", "64", "--card", "H100", "--frames", "3")
    assert re.search(
        r"What would fit: smaller frames: one alone, which no ranks share, needs [\d.]+ GiB in",
        failure(capsys, *words),
    )


def test_text_has_the_answer_and_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--frames", "120", "--gpus", "16"]) == 0
    text = capsys.readouterr().out
    for words in (
        "768,480 visual tokens",
        "Best: lvx gather on groups of",
        "sequence parallel",
        '"sequence_parallel_size": ',
        '{"method": "lvx", "schedule": "gather", "recompute_kv": true}',
        "cross-attention, network",
        "vision",
        "why it stops",
        "Predicted, nothing was run",
        CARDS["H100"].source,
    ):
        assert words in text


def test_visual_tokens_may_stand_among_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "plan",
        "--model",
        "Qwen2.5-VL-7B",
        "--text",
        "512",
        "--frames",
        "100",
        "--card",
        "H100",
    )
    assert main([*words, "--gpus", "8", "--group", "8"]) == 0
    text = capsys.readouterr().out
    assert "12,800 visual tokens" in text
    assert "by method of the self-attention" in text
    assert re.search(r'8; self-attention {"method": "\w+"[^;]*}\n', text)
    scenario = Scenario(model("Qwen2.5-VL-7B"), text_tokens=512, frames=100)
    shape = scenario.cross_shape(8, "ring")
    assert shape.q_lengths == shape.kv_lengths == (1664,) * 8
    many = footprint(replace(scenario, frames=200), gpus=8, ranks=8, way="ring")
    few = footprint(scenario, gpus=8, ranks=8, way="ring")
    assert many.text == pytest.approx(few.text * (512 + 25_600) / (512 + 12_800), rel=0.01)


def section(title: str) -> str:
    """Of docs/models.md."""
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    return document.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_numbers_for_an_hour_of_video_are_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = section("MOSS-VL")
    commands = re.findall(r"^ds-lvx (plan .*--group 8)$", document, re.MULTILINE)
    rows = re.findall(r"^\| [\d,]+ \| .* \|$", document, re.MULTILINE)
    assert len(commands) == len(rows) == 2
    for command, row in zip(commands, rows, strict=True):
        text, frames, visual, alone, memory, sends, ring, step = (
            cell.strip() for cell in row.strip("|").split("|")
        )
        words = command.split()
        assert main(words) == 0
        out = capsys.readouterr().out
        assert f"{text} text tokens, {frames} frames = {visual} visual tokens" in out
        gather, of_ring, ulysses = (
            re.findall(rf"^  {method}  .*", out, re.MULTILINE)[0]
            for method in ("lvx gather", "ring", "ulysses")
        )
        for cell in (f"{float(memory.split()[0]):g} GiB", sends, step):
            assert cell in gather, (row, gather)
        assert ring in of_ring, (row, of_ring)
        needs = f"needs {alone.partition(':')[0]} a rank and 73.6 GiB may be filled"
        assert needs in failure(capsys, *words[:-1], "1")
    assert re.findall(r"sends less than `lvx` \((.*?)\)", document)[0] in ulysses


@pytest.mark.parametrize(
    ("title", "size", "method"),
    [
        ("Llama-3.2-Vision", "2,048 text tokens, 400 frames = 2,561,600 visual", "lvx gather"),
        ("idefics", "2,048 text tokens, 900 frames = 57,600 visual tokens", "lvx gather"),
        ("OpenFlamingo", "2,048 text tokens, 900 frames = 57,600 visual tokens", "lvx gather"),
        ("T5Gemma 2", "512 text tokens, 450 frames = 115,200 visual tokens", "lvx gather"),
        ("mPLUG-Owl3", "4,096 text tokens, 3,600 frames = 2,624,400 visual tokens", "lvx gather"),
        ("BLIP-2 and its like", "256 text tokens, 56 frames = 1,792 visual tokens", "ulysses"),
        ("Video-LLaMA", "2,048 text tokens, 900 frames a sample", "ulysses"),
        ("Qwen-VL", "192 text tokens, 31 frames = 7,936 visual tokens", "ulysses"),
        ("Qwen2.5-VL", "2,048 text tokens, 900 frames = 115,200 visual tokens", "ulysses"),
        ("Qwen3-VL", "10,240 text tokens, 1,800 frames = 176,400 visual tokens", "ulysses"),
        ("Gemma 3", "1,024 text tokens, 450 frames = 115,200 visual tokens", "ulysses"),
        ("InternVL", "1,024 text tokens, 120 frames = 30,720 visual tokens", "ulysses"),
        ("LLaVA-OneVision", "1,024 text tokens, 150 frames = 29,400 visual tokens", "ulysses"),
    ],
)
def test_the_numbers_of_one_hour_are_the_command_s(
    title: str, size: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = section(title)
    (command,) = re.findall(r"^ds-lvx (plan .*--group 8)$", document, re.MULTILINE)
    alone, memory, sends, ring, step = (
        cell.strip()
        for cell in document.partition("|---|\n")[2].splitlines()[0].strip("|").split("|")
    )
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert size in out
    row, of_ring = (
        re.findall(rf"^  {name}  .*", out, re.MULTILINE)[0] for name in (method, "ring")
    )
    assert all(cell in row for cell in (memory, sends, step)), row
    assert ring in of_ring, of_ring
    one = [*command.split()[:-1], "1"]
    needs, _, fits = alone.partition(":")
    if fits:
        assert f"needs {needs} a rank and 73.6 GiB may be filled" in failure(capsys, *one)
    else:
        assert main([*one, "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["steps"]
        assert f"{found['memory']['peak'] / 2**30:.1f} GiB" == needs


def test_the_numbers_for_visual_tokens_among_the_text_are_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/concatenated.md: each row is what the command prints for its model and frames."""
    document = (Path(__file__).parents[2] / "docs" / "concatenated.md").read_text()
    document = document.partition("\n## On eight GPUs\n")[2].partition("\n## ")[0]
    (command,) = re.findall(r"^ds-lvx (plan .*--group) 8", document, re.MULTILINE)
    rows = document.partition("|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(rows) == 4 * 2
    for row in rows:
        cells = (cell.strip() for cell in row.strip("|").split("|"))
        name, frames, tokens, alone, own, peer, towers, step = cells
        words = command.replace("Qwen2.5-VL-7B", name).replace("180", frames.replace(",", ""))
        assert main([*words.split(), "8"]) == 0
        out = capsys.readouterr().out
        assert f"{frames} frames = {tokens} visual tokens" in out
        (line,) = re.findall(r"^  ulysses  .*", out, re.MULTILINE)[:1]
        assert own in line, (row, line)
        assert step in line, (row, line)
        assert f"{peer} where embeddings are gathered" in out, (row, out)
        assert f"{towers.partition(':')[0]} where every rank encodes" in out, (row, out)
        _, _, fits = alone.partition(":")
        needs = alone.partition(":")[0]
        if fits:
            assert f"needs {needs} a rank" in failure(capsys, *words.split(), "1")
        else:
            assert main([*words.split(), "1", "--json"]) == 0
            (found,) = json.loads(capsys.readouterr().out)["steps"]
            assert f"{found['memory']['peak'] / 2**30:.1f} GiB" == needs


def test_json_has_every_method_and_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "--frames", "120", "--gpus", "16")
    assert found["kind"] == "predicted"
    methods = {(s["method"], s["schedule"]) for s in found["steps"] if s["ranks"] == 8}
    assert methods == {("lvx", "gather"), ("lvx", "ring"), ("ulysses", None), ("ring", None)}
    for each in found["steps"]:
        assert sum(each["parts"].values()) == pytest.approx(each["seconds"])
        assert each["memory"]["peak"] > 0
    at_8 = {s["method"]: s for s in found["steps"] if s["ranks"] == 8 and s["schedule"] != "ring"}
    # Ring sends K and V of 16,000 tokens where lvx sends 48 queries.
    assert at_8["ring"]["bytes_sent"] > 100 * at_8["lvx"]["bytes_sent"]
    assert at_8["lvx"]["cross_seconds"] < at_8["ring"]["cross_seconds"]


def test_thousands_of_gpus_and_a_hundred_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "--visual-tokens", "100M", "--gpus", "4096")
    assert found["job"]["visual_tokens"] >= 10**8
    assert {s["ranks"] for s in found["steps"]} == {2**power for power in range(13)}
    assert found["best"]["method"] == "lvx"
    stops = {stop["name"]: stop for stop in found["stops"]}
    assert stops["ulysses"]["ends_at"] == 32
    assert stops["ulysses"]["fits_from"] is None
    assert stops["ulysses"]["reason"] == "memory; ulysses: 32 heads do not reach 64 ranks"
    assert "latency" in stops["lvx gather"]["reason"]
    assert stops["lvx gather"]["fits_from"] > 32


def test_more_gpus_in_a_group_take_less_memory() -> None:
    scenario = Scenario(model("Llama-3.2-11B-Vision"), text_tokens=384, frames=1024)
    peaks = [
        footprint(scenario, gpus=64, ranks=ranks, way="lvx gather").peak
        for ranks in (8, 16, 32, 64)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_zero_stages_and_training_less_take_less_memory() -> None:
    scenario = Scenario(model("Llama-3.2-11B-Vision"), text_tokens=384, frames=64)

    def peak(**settings: object) -> int:
        changed = replace(scenario, **settings)
        return footprint(changed, gpus=16, ranks=16, way="lvx gather").peak

    peaks = [peak(zero_stage=stage) for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peak(lora_r=8) < peak(trains="cross") < peak()
    packed = [peak(zero_stage=stage, lora_r=8, load_in_4bit=True) for stage in (2, 3)]
    assert packed[0] < peak(zero_stage=2, lora_r=8)
    # However many share it then, each has read the whole.
    assert packed[1] > peak(lora_r=8)
    assert peak(recompute=False, checkpointing=False) > peak()
    # Of 16 bytes a weight, stage 1 shares Adam's 12, 2 the gradient's 2, and 3 the weight's.
    shared = scenario.model.parameters * 15 / 16
    saved = [before - after for before, after in pairwise(peaks)]
    saved[2] += footprint(scenario, gpus=16, ranks=16, way="lvx gather").whole
    assert saved == pytest.approx([12 * shared, 2 * shared, 2 * shared], rel=1e-6)


def test_a_plan_that_fits_nothing_says_by_how_much_and_what_would_fit() -> None:
    scenario = Scenario(model("Llama-3.2-11B-Vision"), text_tokens=4096, frames=2000)
    cluster = from_card(CARDS["A100-40"], gpus=8)
    with pytest.raises(ValueError, match="GiB too much") as error:
        plan(scenario, cluster)
    text = str(error.value)
    gpus = int(text.partition(" GPUs in one group")[0].rpartition(" ")[2])
    assert plan(scenario, cluster.with_gpus(gpus)).best.ranks > 8
    frames = text.partition(" of the 2000 frames")[0].rpartition(" ")[2]
    fewer = Scenario(scenario.model, text_tokens=4096, frames=int(frames))
    assert plan(fewer, cluster).best.ranks <= 8
    with pytest.raises(ValueError, match="GiB too much"):
        plan(Scenario(scenario.model, text_tokens=4096, frames=int(frames) + 8), cluster)


@pytest.mark.parametrize("each", known(), ids=lambda each: each.name)
def test_every_model_can_be_planned(each: object) -> None:
    scenario = Scenario(each, text_tokens=2048, frames=256)
    found = plan(scenario, from_card(CARDS["H200"], gpus=128))
    assert found.best.seconds > 0


def test_lora_takes_what_its_frozen_base_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--frames", "16", "--gpus", "8", "--group", "8", "--text", "64K")
    whole, lora, packed = (
        next(s for s in record(capsys, *words, *more)["steps"] if s["method"] == "lvx")["parts"]
        for more in ((), ("--lora_r", "8"), ("--lora_r", "8", "--load_in_4bit"))
    )
    # The products for weights' gradients are gone: of 65,536 / 8 tokens, without K's and V's.
    attention, mlp = 2 * 4096 * 4096, 3 * 4096 * 14_336
    keys = 2 * 4096 * 1024
    products = 40 * (attention + mlp) + 32 * keys + 128_256 * 4096
    seconds = 2 * products * 8192 / (0.7 * CARDS["H100"].matrix_flops)
    assert whole["text layers"] - lora["text layers"] == pytest.approx(seconds)
    # Forward and again; of the features and of the weights there are no gradients.
    part = "projection of K and V"
    assert lora[part] == pytest.approx(2 / 4 * whole[part])
    assert lora["vision"] < 0.3 * whole["vision"]
    assert lora["optimizer"] < 2e-3 * whole["optimizer"]
    # Read in 4 bits and written in 16, in each of three passes.
    nbytes = 40 * (attention + keys + mlp) * (2 + 1 / 2 + 1 / 64 + 4 / (64 * 256))
    written = nbytes / (0.85 * CARDS["H100"].memory_bytes_per_s)
    assert packed == {**lora, "weights in 4 bits": pytest.approx(3 * written)}
    assert main([*LLAMA, *words, "--lora_r", "8", "--load_in_4bit"]) == 0
    assert "LoRA of rank 8 trains, its base in 4 bits" in capsys.readouterr().out
    assert main([*LLAMA, *words, "--freeze_vision"]) == 0
    assert "all weights but the tower's train" in capsys.readouterr().out


def test_where_nothing_fits_lora_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--frames", "16", "--gpus", "2", "--card")
    text = failure(capsys, *LLAMA[:-2], *few, "H100")
    assert text.endswith("--train cross; --lora_r 8; --lora_r 8 --load_in_4bit\n")
    # A mixture's base is read whole, with all experts in 16 bits.
    mixture = ("plan", "--model", "Qwen3-VL-30B-A3B", "--text", "2048", *few, "A100-40")
    text = failure(capsys, *mixture, "--lora_r", "8", "--load_in_4bit")
    assert text.endswith(
        "needs 56.6 GiB a rank and 36.8 GiB may be filled: 19.8 GiB too much. "
        "What would fit: no --load_in_4bit\n"
    )
    assert main([*mixture, "--lora_r", "8", "--json"]) == 0


def test_a_group_may_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "--frames", "120", "--gpus", "16", "--group", "8")
    assert {step["ranks"] for step in found["steps"]} == {8}
    assert "expected one of [1, 2, 4, 8, 16]" in failure(
        capsys, *LLAMA, "--frames", "120", "--gpus", "16", "--group", "3"
    )


def test_links_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--frames", "120", "--gpus", "16", "--across", "200mbit", "--across-latency", "1ms")
    slow, fast = record(capsys, *words), record(capsys, *words[:4])
    across = slow["cluster"]["across"]["shift"]
    assert (across["bytes_per_s"], across["latency_s"]) == (25e6, 1e-3)

    def ring(found: dict) -> float:
        wanted = (s for s in found["steps"] if s["method"] == "ring" and s["ranks"] == 16)
        return next(wanted)["cross_seconds"]

    assert ring(slow) > 100 * ring(fast)


def test_bad_input_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (("plan", "--card", "H100"), "--model: got none"),
        (("plan", "--model", "GPT-7", "--card", "H100"), "mPLUG-Owl3-7B"),
        (("plan", "--model", "idefics-9b", "--card", "K80"), "'B200'"),
        (("plan", "--model", "idefics-9b"), "--card: got neither"),
        ((*LLAMA, "--across", "25"), "--across: got '25', which has no unit"),
        ((*LLAMA, "--within-latency", "5"), "--within-latency: got '5'"),
        ((*LLAMA, "--gpus", "0"), "--gpus: got 0"),
        ((*LLAMA, "--zero", "4"), "zero: got 4"),
        ((*LLAMA, "--lora_r", "-1"), "lora_r: got -1"),
        ((*LLAMA, "--load_in_4bit"), "load_in_4bit: got no LoRA; expected its rank beside it"),
        ((*LLAMA, "--lora_r", "8", "--train", "cross"), "train: got 'cross' beside LoRA"),
        ((*LLAMA, "--lora_r", "8", "--generate", "9"), "--lora_r: got it with --generate"),
        ((*LLAMA, "--frames", "none"), "--frames: got 'none'"),
        (("plan", "--model", "idefics-9b", "--profile", "none.json"), "does not exist"),
    ):
        text = failure(capsys, *words)
        assert expected in text, words
        assert text.count("\n") == 1


def test_the_plot_is_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    assert main([*LLAMA, "--frames", "120", "--gpus", "16", "--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
