"""What the planner says of generation, against numbers that are counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ds_lvx.cli import main
from ds_lvx.plan.cluster import Cluster, Device, KernelTime, Link
from ds_lvx.plan.generation import best, generation, generations
from ds_lvx.plan.models import model
from ds_lvx.plan.scenario import Scenario

# An 11B model: 32 layers of text, 8 of cross-attention, 8 heads of K and V of 128, 6404 tokens a
# frame. 16 frames are 102,464 visual tokens.
SCENARIO = Scenario(model("Llama-3.2-11B-Vision"), text_tokens=100, frames=16, zero_stage=0)
LAYER = 4096 * 4096 * 2 + 3 * 4096 * 14_336
KERNEL = KernelTime(call_s=0.0, pair_s=0.0, key_s=1e-12, row_s=0.0)
DEVICE = Device(
    name="cpu",
    memory_bytes=64 * 2**30,
    whole=KERNEL,
    partial=KERNEL,
    backward=KERNEL,
    matmul_flops=1e15,
    stream_bytes_per_s=1e15,
    operation_s=0.0,
    call_s=0.0,
    weights_bytes_per_s=1e12,
    layer_s=1e-4,
    token_s=1e-3,
)
LINK = Link.of(1e9, 1e-3)
CLUSTER = Cluster(DEVICE, 4, 1, LINK, LINK, "made up")


def test_a_token_by_part() -> None:
    found = generation(SCENARIO, CLUSTER, ranks=4, new_tokens=20)
    weights = 32 * (LAYER + 2 * 4096 * 1024) + 8 * LAYER + 128_256 * 4096
    text = 110 * 2 * 32 * 1024  # half of the answer is there
    assert found.token["weights and text"] == pytest.approx(2 * (weights + text) / 1e12)
    assert found.token["host"] == pytest.approx(1e-3 + 40 * 1e-4)
    # Four frames, each number of K and V once; what is merged is next to nothing.
    assert found.token["visual keys"] == pytest.approx(8 * 4 * 6404 * 1024 * 1e-12, rel=1e-3)
    # To three others: lse and out of 32 heads in fp32. A hop of an all-gather has a fifth of the
    # latency.
    message = 3 * (32 * 4 + 32 * 128 * 4)
    assert found.token["network"] == pytest.approx(8 * (message / 1e9 + 3 * 2e-4))
    assert found.bytes_sent == 8 * message + 3 * 16
    assert found.tokens_per_s == pytest.approx(1 / sum(found.token.values()))
    assert found.seconds == pytest.approx(found.prompt_s + 19 * found.token_s)


def test_one_rank_sends_nothing_and_a_gpu_hides_its_host() -> None:
    alone = generation(SCENARIO, CLUSTER, ranks=1, new_tokens=20)
    assert alone.bytes_sent == alone.token["network"] == alone.prompt["network"] == 0
    on_gpu = replace(CLUSTER, device=replace(DEVICE, name="H100"))
    found = generation(SCENARIO, on_gpu, ranks=1, new_tokens=20)
    assert sum(alone.token.values()) - alone.token["host"] > alone.token["host"]
    assert found.token["host"] == 0


def test_what_the_host_takes_and_new_memory() -> None:
    device = replace(DEVICE, call_s=7e-4, cross_layer_s=5e-4, begin_s=3e-2, new_byte_s=1e-9)
    before, found = (
        generation(SCENARIO, replace(CLUSTER, device=each), ranks=4, new_tokens=20)
        for each in (DEVICE, device)
    )
    # What a call takes is in the time of its layer.
    assert found.token["visual keys"] == pytest.approx(8 * 4 * 6404 * 1024 * 1e-12)
    assert found.token["host"] == pytest.approx(1e-3 + 32 * 1e-4 + 8 * 5e-4)
    assert found.prompt["host"] == pytest.approx(found.token["host"] + 3e-2)
    assert found.token["network"] == pytest.approx(before.token["network"])
    assert found.prompt["visual keys"] == pytest.approx(before.prompt["visual keys"])
    # K and V in bf16, and three tensors as large as K in fp32; the features, twice.
    tokens = 4 * 6404
    new = 8 * tokens * 1024 * (2 * 2 + 3 * 4) * 1e-9
    projection = (each.prompt["projection of K and V"] for each in (found, before))
    assert next(projection) - next(projection) == pytest.approx(new)
    vision = (each.prompt["vision"] for each in (found, before))
    assert next(vision) - next(vision) == pytest.approx(2 * tokens * 4096 * 2 * 1e-9)


def test_memory() -> None:
    found = generation(SCENARIO, CLUSTER, ranks=4, new_tokens=20).held
    tokens = 4 * 6404
    assert found.weights == 2 * SCENARIO.model.parameters
    assert found.keys == 8 * tokens * 2 * 1024 * 2
    assert found.text == 120 * 32 * 2 * 1024 * 2
    assert found.peak == found.weights + max(found.prompt, found.keys + found.text)
    # Without a tower: the features, K and V of seven layers, K of the eighth in its norm.
    narrow = replace(SCENARIO.model, tower=replace(SCENARIO.model.tower, hidden=1))
    prompt = generation(
        replace(SCENARIO, model=narrow), CLUSTER, ranks=4, new_tokens=20
    ).held.prompt
    visual = tokens * (2 * 4096 + 7 * 2 * 1024 * 2 + 1024 * (2 + 8))
    assert prompt == visual + found.text + 34 * 100 * 4096


def test_a_prompt_that_is_split_over_ranks() -> None:
    """4,096 tokens of text: each of four ranks runs 1,024 of them."""
    long = replace(SCENARIO, text_tokens=4096)
    one, found = (generation(long, CLUSTER, ranks=ranks, new_tokens=20) for ranks in (1, 4))
    below = generation(replace(long, text_tokens=2047), CLUSTER, ranks=4, new_tokens=20)
    weights = 32 * (LAYER + 2 * 4096 * 1024) + 8 * LAYER
    head = 2 * 128_256 * 4096
    # Ulysses: of the 8 heads of K and V two on each of four ranks, over all tokens.
    for each, tokens, numbers in (
        (one, 4096, 1024 * 4096),
        (found, 1024, 256 * 4096),
        (below, 2047, 1024 * 2047),
    ):
        expected = (2 * weights * tokens + head) / 1e15 + 32 * numbers * 1e-12
        assert each.prompt["text"] == pytest.approx(expected, rel=1e-3)
    a_token = 32 * 2 * 1024 * 2
    # Whole, they are gathered: 512 MiB. So are the last logits, and cross-attention sends q and
    # its part of out and lse.
    gathered = 3 * (1024 * a_token + 2 * 128_256) / 1e9
    assert found.held.text == one.held.text == (4096 + 20) * a_token
    assert found.prompt["network"] > gathered
    # K and V of this rank's part, and the queries of all with their out, more than a layer takes.
    narrow = replace(long, model=replace(long.model, tower=replace(long.model.tower, hidden=1)))
    prompt = generation(narrow, CLUSTER, ranks=4, new_tokens=20).held.prompt
    visual = 4 * 6404 * (2 * 4096 + 7 * 2 * 1024 * 2 + 1024 * (2 + 8))
    assert prompt == visual + 1024 * a_token + 34 * 1024 * 4096
    # Tokens go on as before.
    assert found.bytes_sent == below.bytes_sent


def test_keys_of_a_text_that_stay_on_their_ranks() -> None:
    """Of more than 32,768 tokens K and V take more than 4 GiB."""
    at, above = (
        generation(replace(SCENARIO, text_tokens=tokens), CLUSTER, ranks=4, new_tokens=20)
        for tokens in (32_768, 32_772)
    )
    a_token, message = 32 * 2 * 1024 * 2, 3 * (32 * 4 + 32 * 128 * 4)
    assert at.held.text == (32_768 + 20) * a_token
    assert above.held.text == (8193 + 20) * a_token
    # Each layer of the text has a message, too, and a rank reads its part of K and V.
    assert above.bytes_sent - at.bytes_sent == 32 * message
    waiting = above.token["network"] - at.token["network"]
    assert waiting == pytest.approx(32 * (message / 1e9 + 3 * 2e-4))
    read = at.token["weights and text"] - above.token["weights and text"]
    assert read == pytest.approx((32_768 - 8193) * a_token / 1e12, rel=1e-3)
    assert above.prompt["network"] < at.prompt["network"]
    # The host knows such a layer by what one of cross-attention takes, where it is measured.
    device = replace(DEVICE, cross_layer_s=5e-4)
    found = generation(
        replace(SCENARIO, text_tokens=32_772),
        replace(CLUSTER, device=device),
        ranks=4,
        new_tokens=20,
    )
    assert found.token["host"] == pytest.approx(1e-3 + 40 * 5e-4)


def test_a_prompt_that_stays_on_its_ranks() -> None:
    """Qwen2.5-VL: 28 layers, 4 heads of keys of 128; 128 tokens a frame, among the text's."""
    among = Scenario(model("Qwen2.5-VL-7B"), text_tokens=100, frames=3, zero_stage=0)
    found = generation(among, CLUSTER, ranks=4, new_tokens=20)
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944) + 152_064 * 3584
    a_token = 28 * 2 * 512 * 2
    assert found.token["weights and text"] == pytest.approx((2 * weights + 10 * a_token) / 1e12)
    assert found.token["visual keys"] == pytest.approx(28 * 128 * 512 * 1e-12, rel=1e-2)
    message = 3 * (28 * 4 + 28 * 128 * 4)
    assert found.bytes_sent == 28 * message + 3 * 16
    # A frame is more than a quarter of all 484 tokens: the rank that has it has no text.
    assert (found.held.keys, found.held.text) == (128 * a_token, 20 * a_token)
    alone = generation(among, CLUSTER, ranks=1, new_tokens=20)
    assert (alone.held.keys, alone.bytes_sent) == (484 * a_token, 0)
    assert alone.prompt["text"] > 3 * found.prompt["text"]


def test_an_encoder_and_adapters() -> None:
    """T5Gemma 2's decoder has text of its own, the answer; Qwen-VL's text is on every rank."""
    asked = Scenario(model("t5gemma-2-270m"), text_tokens=100, frames=4, zero_stage=0)
    found = generation(asked, CLUSTER, ranks=4, new_tokens=20)
    a_token = 18 * 2 * 256 * 2
    assert (found.held.keys, found.held.text) == (281 * a_token, 20 * a_token)
    assert found.prompt["encoder"] > 0
    few = replace(asked, model=model("Qwen/Qwen-VL"))
    one, four = (generation(few, CLUSTER, ranks=ranks, new_tokens=20) for ranks in (1, 4))
    a_token = 32 * 2 * 4096 * 2
    assert (four.held.keys, four.held.text) == (0, (100 + 4 * 256 + 20) * a_token)
    assert four.bytes_sent == four.token["visual keys"] == 0
    assert four.token == one.token
    assert four.prompt["vision"] < one.prompt["vision"]
    assert four.prompt["text"] == one.prompt["text"]


def test_weights_that_zero_3_shares_are_gathered_for_each_token() -> None:
    whole, shared = (
        generation(replace(SCENARIO, zero_stage=stage), CLUSTER, ranks=2, new_tokens=20)
        for stage in (2, 3)
    )
    assert (whole.held.weights, whole.held.gathered) == (2 * SCENARIO.model.parameters, 0)
    assert "ZeRO, network" not in {*whole.token, *whole.prompt}
    # All four GPUs have a share. A billion are gathered ahead, and then the rest of a table.
    assert shared.held.weights == -(-2 * SCENARIO.model.parameters // 4)
    assert shared.held.gathered == 2 * (10**9 + 128_256 * 4096)
    rest = whole.held.peak - whole.held.weights
    assert shared.held.peak == shared.held.weights + shared.held.gathered + rest
    # What a token goes through: each layer, and both tables; K and V of images are there.
    weights = 32 * (LAYER + 2 * 4096 * 1024) + 8 * LAYER + 2 * 128_256 * 4096
    assert shared.bytes_sent - whole.bytes_sent == pytest.approx(3 * 2 * weights / 4)
    moved = 3 * 2 * weights / 4 / 1e9 - sum(whole.token.values()) + whole.token["host"]
    assert shared.token["ZeRO, network"] == pytest.approx(moved + 42 * 3 * 2e-4)
    assert shared.token["weights and text"] == whole.token["weights and text"]
    assert shared.prompt["ZeRO, network"] > shared.token["ZeRO, network"]
    alone = replace(CLUSTER, gpus=1, gpus_per_node=1)
    one = generation(replace(SCENARIO, zero_stage=3), alone, ranks=1, new_tokens=20)
    assert (one.held.weights, one.held.gathered) == (2 * SCENARIO.model.parameters, 0)


def test_every_group_is_looked_at_and_the_quickest_that_fits_is_best() -> None:
    found = generations(SCENARIO, CLUSTER, new_tokens=20)
    assert [each.ranks for each in found] == [1, 2, 4]
    small = replace(CLUSTER, device=replace(DEVICE, memory_bytes=found[0].held.peak - 1))
    some = generations(SCENARIO, small, new_tokens=20)
    assert [each.fits for each in some] == [False, True, True]
    taken = best(some)
    assert taken is not None
    assert taken.tokens_per_s == max(each.tokens_per_s for each in some[1:])
    assert best(some[:1]) is None


def test_the_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--generate", "64", "--model", "Llama-3.2-11B-Vision", "--text", "100"]
    words += ["--frames", "16", "--gpus", "4", "--card", "H100"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("generates 64 tokens", "102,464 visual tokens", "Most tokens a second", "host"):
        assert part in text
    assert main([*words, "--json", "--group", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    (only,) = record["generations"]
    assert only == record["best"]
    assert only["memory"]["keys"] == 8 * 8 * 6404 * 2 * 1024 * 2
    assert main([*words, "--group", "3"]) == 2
    assert "expected one of [1, 2, 4]" in capsys.readouterr().err
    stages = {}
    for stage in ("2", "3"):
        assert main([*words, "--json", "--group", "2", "--zero", stage]) == 0
        stages[stage] = json.loads(capsys.readouterr().out)["best"]["memory"]["weights"]
    assert stages["2"] == only["memory"]["weights"] == pytest.approx(4 * stages["3"])


@pytest.mark.parametrize(
    "option", ["--recompute", "--no-checkpointing", "--train=cross", "--loss-tiles=1"]
)
def test_options_of_training_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--generate", "64", "--model", "Llama-3.2-11B-Vision", "--card", "H100"]
    assert main([*words, option]) == 2
    name = option.removeprefix("--no-").removeprefix("--").partition("=")[0]
    assert f"--{name}: got it with --generate, which trains nothing" in capsys.readouterr().err
