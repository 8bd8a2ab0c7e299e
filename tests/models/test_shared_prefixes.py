"""Rows that begin alike are one row, and every result is that of rows by themselves."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ds_lvx import gather_sequence, mean_loss
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.models import patch_model
from ds_lvx.models.concatenated.batch import Sequences
from ds_lvx.models.concatenated.prefixes import share
from ds_lvx.models.prefixes import alike
from ds_lvx.models.text import Text
from ds_lvx.sharding import shard_batch
from tests.models import moss_vl_case, qwen2_5_vl_case
from tests.models.concatenated_case import METHODS, rules
from tests.models.mllama_case import sharded_steps
from tests.ranks import run_ranks

Batch = dict[str, Any]
FAMILIES = (
    *("qwen2_5_vl", "gemma3", "gemma4", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v"),
    *("glm4v_moe", "internvl", "llava_onevision", "smolvlm", "video_llama_3", "qwen3_5"),
    "qwen3_5_moe",
)
BESIDE = ("mllama", "moss_vl", "idefics", "mplugowl3")
"""Models whose images stand beside the text."""
PROMPTS = ("left_padded", "one_image", "one_video")
_OF_TOKENS = ("cross_attention_mask", "image_attention_mask")
"""What a processor says of each token; what is said behind a prompt sees what its end does."""
SAID = (3, 1, 5)  # tokens of the completions of each prompt
_CASES = {"qwen3_vl_moe": "qwen3_vl", "glm4v_moe": "glm4v"}


def prompts(family: str, name: str) -> Batch:
    made: Batch = getattr(import_module(f"tests.models.{_CASES.get(family, family)}_case"), name)()
    return made


def answered(batch: Batch, said: tuple[int, ...] = SAID, *, labels: bool = True) -> Batch:
    """A batch of prompts, each with some completions, which are learnt; padded on the right."""
    rows, length = batch["input_ids"].shape
    copies, longest = len(said), max(said)
    many = {
        key: torch.cat([value] * copies) if isinstance(value, Tensor) else value * copies
        for key, value in batch.items()
    }
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(said).repeat_interleave(rows)[:, None]
    there = torch.arange(longest) < lengths
    tokens = torch.randint(3, 30, there.shape, generator=generator).masked_fill(~there, 0)
    mask = many.get("attention_mask", torch.ones(rows * copies, length, dtype=torch.int64))
    many["attention_mask"] = torch.cat((mask, there.long()), dim=1)
    unlearnt = torch.full((rows * copies, length), -100)
    many["labels"] = torch.cat((unlearnt, tokens.masked_fill(~there, -100)), dim=1)
    many["input_ids"] = torch.cat((many["input_ids"], tokens), dim=1)
    for key, value in many.items():
        if isinstance(value, Tensor) and value.shape == (rows * copies, length):
            many[key] = torch.cat((value, torch.zeros_like(tokens)), dim=1)
        elif key in _OF_TOKENS:
            dim = value.shape.index(length)
            last = value.narrow(dim, length - 1, 1)
            many[key] = torch.cat((value, *[last] * longest), dim=dim)
    if not labels:
        del many["labels"]
    return many


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """One that a trainer makes of the logits of the completions."""
    there = batch["labels"][:, 1:] != -100
    weights = torch.linspace(-0.1, 0.1, logits.shape[-1])
    return (logits[:, :-1][there].log_softmax(-1) * weights).sum() / there.sum()


def step(family: str, batch: Batch, *, ranks: int, method: str, **text: Any) -> dict[str, Any]:
    """Both losses and their gradients: run it on every rank."""
    case = import_module(f"tests.models.{family}_case")
    model = case.tiny_model(**text)
    if family in BESIDE:
        # Of mPLUG-Owl3's hyper layers.
        methods = METHODS if family != "mplugowl3" else ("lvx", "ring")
        other = methods[(METHODS.index(method) + 1) % len(methods)]
        cross = {"method": other, "recompute_kv": other == "lvx"}
        config = case.ds_config(stage=0, sp_size=ranks, cross=cross, self_attn=method)
    else:
        config = rules(family, method, ranks)
    config["ds_lvx"]["share_prefixes"] = True
    groups = SequenceParallelGroups(ranks)
    patch = patch_model(model, LVXConfig.from_ds_config(config), groups)
    shard = shard_batch(batch, model=model)
    out = model(**shard)
    logits = gather_sequence(out.logits, shard=shard)
    (out.loss + loss_of(logits, batch) / ranks).backward()
    grads = {
        name: groups.channel.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in model.named_parameters()
    }
    loss = mean_loss(out.loss)
    patch.unpatch()
    groups.close()
    return {
        "loss": loss,
        "logits": logits.detach(),
        "grads": grads,
        "rows": len(shard["input_ids"]),
        "tokens": shard["ds_lvx"].text_lengths,
    }


def alone(family: str, batch: Batch, **text: Any) -> dict[str, Any]:
    case = import_module(f"tests.models.{family}_case")
    model = case.tiny_model(**text)
    own = getattr(
        import_module(f"tests.models.{_CASES.get(family, family)}_case"), "for_one_process", dict
    )
    out = model(**own(batch))
    (out.loss + loss_of(out.logits, batch)).backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), "grads": grads}


def steps(jobs: list[tuple[Any, ...]], ranks: int) -> list[dict[str, Any]]:
    return [step(family, batch, ranks=ranks, method=method) for family, batch, method in jobs]


def check(jobs: list[tuple[Any, ...]], ranks: int, *, copies: int = len(SAID)) -> None:
    results = run_ranks(steps, ranks, jobs, ranks)
    for index, (family, batch, method) in enumerate(jobs):
        wanted = alone(family, batch)
        for result in results:
            found, what = result[index], f"{family}, {method}"
            there = batch["attention_mask"] != 0
            assert found["rows"] == len(batch["input_ids"]) // copies, what
            assert_close(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-5, msg=what)
            assert_close(found["logits"][there], wanted["logits"][there], rtol=2e-5, atol=2e-5)
            for name, grad in wanted["grads"].items():
                assert_close(found["grads"][name], grad, rtol=1e-4, atol=2e-5, msg=f"{what} {name}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_family(family: str, ranks: int) -> None:
    jobs = [
        (family, answered(prompts(family, name)), METHODS[(n + FAMILIES.index(family)) % 4])
        for n, name in enumerate(PROMPTS)
    ]
    check(jobs, ranks)


def beside(family: str) -> list[Batch]:
    """Prompts with images beside them; none ends with an image."""
    case = import_module(f"tests.models.{family}_case")
    if family == "mllama":
        one = case.make_batch([[2, 3, 7]], length=11, num_tiles=[[2, 1, 2]], seed=1)
        return [case.hard_batch(), one]
    if family == "mplugowl3":
        left = case.make_batch(["..i...i.i..", "i....."], left=True, seed=1)
        return [case.hard_batch(), left, case.one_image()]
    return [case.hard_batch(), case.left_padded(), case.one_image()]


@pytest.mark.parametrize("family", BESIDE)
@pytest.mark.parametrize("ranks", [1, 2])
def test_images_beside_the_text(family: str, ranks: int) -> None:
    jobs = [
        (family, answered(batch), METHODS[(n + BESIDE.index(family)) % 4])
        for n, batch in enumerate(beside(family))
    ]
    check(jobs, ranks)


def with_a_token_of_a_frame() -> Batch:
    """Two answers about the same two frames, the second of which has a token in one alone."""
    batch = moss_vl_case.make_batch([[3, (1, 2, 4), 6, (1, 4, 4), 3]] * 2)
    ids, frame = batch["input_ids"], moss_vl_case.IMAGE
    ids[1] = ids[0]
    ids[0, 10:] = torch.arange(20, 20 + ids.shape[1] - 10)
    batch["pixel_values"] = torch.cat([batch["pixel_values"].chunk(2)[0]] * 2)
    answers = (ids != frame) & (torch.arange(ids.shape[1]) >= 10)
    batch["labels"] = torch.where(answers, ids, -100)
    seen = (ids == frame).cumsum(dim=1)[..., None]
    batch["cross_attention_mask"] = (torch.arange(2) >= seen)[:, None]
    return batch


def test_a_frame_of_one_answer_keeps_rows_apart() -> None:
    check([("moss_vl", with_a_token_of_a_frame(), "lvx")], 1, copies=1)


def test_images_that_have_a_gradient_are_their_own_rows() -> None:
    def found(rows: Tensor) -> list[int]:
        return alike([(None, row) for row in rows])

    rows = torch.zeros(3, 4, requires_grad=True)
    assert found(rows) == [0, 1, 2]
    assert found(rows.detach()) == [0, 0, 0]
    assert found(rows[:1].expand(3, 4)) == [0, 0, 0]


def test_numbers_that_do_not_lie_side_by_side() -> None:
    rows = torch.zeros(4, 3, dtype=torch.int32).T
    assert alike([(None, row) for row in rows]) == [0, 0, 0]


def interleaved() -> Batch:
    """Completions with images of their own; those of one prompt are not side by side."""
    first, second = [4, (1, 2, 2), 3, (1, 1, 1), 2], [5, (1, 2, 3), 2, (1, 1, 1), 4]
    batch = qwen2_5_vl_case.make_batch([first, second] * 2)
    patches = (16 + 4, 24 + 4)  # of each row, of which the last four are the completion's
    for row, (prompt, own) in enumerate(zip((10, 13), patches, strict=True)):
        batch["input_ids"][row + 2, :prompt] = batch["input_ids"][row, :prompt]
        start = row * patches[0]
        pixels = batch["pixel_values"][start : start + own - 4]
        batch["pixel_values"][sum(patches) + start :][: own - 4] = pixels
        batch["labels"][row::2, :prompt] = -100
    return batch


def test_images_of_completions_of_prompts_in_turn() -> None:
    check([("qwen2_5_vl", interleaved(), "ring")], 2, copies=2)


def beside_another(shares: bool) -> dict[str, Any]:
    """Steps at ZeRO 3 in which one of two replicas has rows to share, or both have."""
    first = answered(prompts("qwen3_5", "left_padded"))
    second = {key: value[: len(value) // len(SAID)] for key, value in first.items()}
    third = answered(prompts("qwen3_5", "one_image"))
    config = rules("qwen3_5", "ring", 2, stage=3)
    config["ds_lvx"]["share_prefixes"] = shares
    model = import_module("tests.models.qwen3_5_case").tiny_model()
    return sharded_steps(config, [[first, second], [second, third]], model=model)


@pytest.mark.exhaustive
def test_a_replica_that_shares_nothing_beside_one_that_does() -> None:
    apart, shared = (run_ranks(beside_another, 4, shares)[0] for shares in (False, True))
    assert [len(each["logits"][0]) for each in (apart, shared)] == [9, 3]
    for key in ("losses", "grads", "weights"):
        assert_close(shared[key], apart[key], rtol=1e-4, atol=1e-5)


def test_a_row_of_padding_beside_them() -> None:
    """Layers that carry a state begin nothing there."""
    ids = torch.randint(3, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[1, :14] = ids[0, :14]
    there = torch.tensor([[1], [1], [0]]).expand(3, 20)
    labels = torch.where((there > 0) & (torch.arange(20) > 14), ids, -100)
    batch = {"input_ids": ids, "attention_mask": there, "labels": labels}
    (found,) = run_ranks(steps, 1, [("qwen3_5", batch, "ring")], 1)
    assert found[0]["rows"] == 2
    assert_close(found[0]["loss"], alone("qwen3_5", batch)["loss"], rtol=1e-5, atol=1e-5)


def mistakes() -> list[str]:
    """What every rank hears of rank 1's batch."""
    model, groups = qwen2_5_vl_case.tiny_model(), SequenceParallelGroups(2)
    config = rules("qwen2_5_vl", "ring", 2)
    config["ds_lvx"]["share_prefixes"] = True
    patch = patch_model(model, LVXConfig.from_ds_config(config), groups)
    made = (answered(prompts("qwen2_5_vl", "left_padded")) for _ in range(4))
    unknown, empty, other, text = made
    unknown["input_ids"][5, 21] = 1005
    empty = {key: empty[key][:, :0] for key in ("input_ids", "attention_mask", "labels")}
    if torch.distributed.get_rank() == 1:
        other["pixel_values"][-1] += 1
        text["input_ids"][5, 21] += 1
    heard = []
    for batch in (unknown, empty, other, text):
        with pytest.raises(ValueError) as error:
            shard_batch(batch, model=model)
        heard.append(str(error.value))
    patch.unpatch()
    groups.close()
    return heard


def test_what_is_wrong_is_said_of_rows_as_they_came() -> None:
    for token, length, pixels, text in run_ranks(mistakes, 2):
        assert "all ranks: got the token 1005 at place 21 of sample 5" in token
        assert "got input_ids (9, 0); expected at least one sample, and one token" in length
        assert "disagree on rows that begin alike, images included" in pixels
        assert "disagree on contents of the text" in text


def gathered_of_rows_as_they_came() -> str:
    case = import_module("tests.models.mllama_case")
    model, groups = case.tiny_model(), SequenceParallelGroups(1)
    config = case.ds_config(stage=0, sp_size=1, cross={"method": "lvx"}, self_attn="lvx")
    config["ds_lvx"]["share_prefixes"] = True
    patch = patch_model(model, LVXConfig.from_ds_config(config), groups)
    shard = shard_batch(answered(case.hard_batch()), model=model)
    rows, tokens = shard["input_ids"].shape
    with pytest.raises(ValueError) as error:
        gather_sequence(torch.zeros(rows * len(SAID), tokens), shard=shard)
    patch.unpatch()
    groups.close()
    return str(error.value)


def test_what_is_gathered_has_the_rows_of_the_shard() -> None:
    (heard,) = run_ranks(gathered_of_rows_as_they_came, 1)
    assert "got shape [6, 28] for a shard of [2, 28] tokens" in heard


def test_rows_of_a_prompt_find_each_other() -> None:
    """Although all begin alike, with other rows between, as chosen and rejected answers have it."""
    ids = torch.arange(3 * 20).view(3, 20).repeat(2, 1)
    ids[:, :5] = ids[0, :5]
    ids[3:, 15:] += 100
    ids[2, 5:] += 100
    none = torch.zeros(ids.shape).bool()
    text = Sequences.with_units(Text(ids, None, None, None), none, [])
    shared = share(text, {})
    assert shared.branches is not None
    first, second = shared.branches.unmerged.split(3)
    assert len(shared.input_ids) == 3
    assert (first == second).sum(dim=1).tolist() == [14, 14, 4]
