"""`merge_attention` against one softmax over all keys in float64: out, lse and all gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ds_lvx
from ds_lvx import Visibility
from ds_lvx.attention.oracle import attention_oracle
from tests.attention.cases import Problem, largest_error
from tests.ranks import run_ranks

SPLITS = [(30,), (11, 19), (7, 0, 23), (0, 0, 30)]
PADDING = 3  # text tokens at the left that nobody sees, and that see nothing


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("weights", [(1.0, 0.7), (1.0, 0.0), (0.0, 0.7)])
def test_parts_of_a_softmax_make_the_whole(
    sizes: tuple[int, ...], weights: tuple[float, float]
) -> None:
    """Any number of parts, some without a key, some rows that no part sees."""
    of_out, of_lse = weights
    problem = Problem((12,), (30,), visibility="frames", dtype=torch.float64)
    problem = replace(problem, out_weight=of_out, lse_weight=of_lse)
    rule, tensors = problem.whole_visibility(), problem.tensors()
    q, k, v = (tensors[name].clone().requires_grad_() for name in "qkv")
    assert rule is not None
    keys = [tensor.split(sizes, dim=1) for tensor in (k, v, rule.kv_pos)]
    parts = [
        attention_oracle(q, k_, v_, visibility=Visibility(rule.q_start, rule.q_end, position))
        for k_, v_, position in zip(*keys, strict=True)
    ]
    out, lse = ds_lvx.merge_attention(parts)
    assert (lse == -torch.inf).any()
    with torch.no_grad():
        assert all(map(torch.equal, ds_lvx.merge_attention(parts), (out, lse)))
    problem.loss(out, lse, tensors["dout"], tensors["dlse"]).backward()
    result = {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    errors = largest_error(result, problem.oracle())  # type: ignore[arg-type]
    assert max(errors.values()) < 1e-12, errors


def test_gradients_are_those_of_finite_differences() -> None:
    outs = [torch.randn(2, 3, 2, 4, dtype=torch.float64) for _ in range(3)]
    lses = [torch.randn(2, 2, 3, dtype=torch.float64) * 3 for _ in range(3)]
    lses[0][0], lses[1][:, 1] = -torch.inf, -torch.inf
    inputs = [tensor.requires_grad_() for tensor in (*outs, *lses)]

    def merged(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ds_lvx.merge_attention(list(zip(tensors[:3], tensors[3:], strict=True)))

    assert torch.autograd.gradcheck(merged, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_parts_merge_to_an_empty_one(dtype: torch.dtype) -> None:
    """Whatever gradient arrives at its lse, which is -inf."""
    out = torch.zeros(1, 2, 3, 4, dtype=dtype, requires_grad=True)
    lse = torch.full((1, 3, 2), -torch.inf, requires_grad=True)
    merged, total = ds_lvx.merge_attention([(out, lse), (out, lse)])
    assert (merged.dtype, total.dtype) == (dtype, torch.float32)
    assert merged.eq(0).all()
    assert total.eq(-torch.inf).all()
    (merged.sum() + total.square().sum()).backward()
    assert out.grad is not None
    assert lse.grad is not None
    assert out.grad.eq(0).all()
    assert lse.grad.eq(0).all()


def test_only_what_wants_a_gradient_gets_one() -> None:
    """Beside a part that is frozen; and a part far below the other underflows to nothing."""
    out = torch.randn(1, 2, 1, 4, requires_grad=True)
    lse = torch.zeros(1, 1, 2)
    frozen = torch.randn(1, 2, 1, 4), torch.full((1, 1, 2), -1000.0)
    merged, total = ds_lvx.merge_attention(((out, lse), frozen))
    assert torch.equal(merged, out)
    merged.sum().backward()
    assert total.requires_grad
    assert torch.equal(out.grad, torch.ones_like(out))  # type: ignore[arg-type]
    with torch.no_grad():
        assert not ds_lvx.merge_attention([frozen])[0].requires_grad


@dataclass(frozen=True)
class Hyper:
    """One softmax over visual keys and causal text, as mPLUG-Owl3 has it, on some ranks.

    ``way``: lvx's schedule beside ring attention over sharded text; ``replicated`` is beside an
    attention over the whole text that every rank runs by itself.
    """

    way: str
    dtype: torch.dtype = torch.float32
    text: tuple[int, ...] = (9, 5)
    visual: tuple[int, ...] = (20, 41)
    padding: int = PADDING
    lse_weight: float = 0.7
    checkpointed: bool = False

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The whole text's and the visual tensors, and the loss's weights."""
        generator = torch.Generator().manual_seed(1)
        text, visual = sum(self.text), sum(self.visual)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        made = {"q": draw(2, text, 4, 16)}
        made |= {name: draw(2, text, 2, 16) for name in ("k", "v")}
        made |= {name: draw(2, visual, 2, 16) for name in ("visual_k", "visual_v")}
        dlse = draw(2, 4, text).float() * self.lse_weight
        return made | {"dout": draw(2, text, 4, 16), "dlse": dlse}

    @property
    def rule(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Start and end of every query, positions of the text's keys and of the visual ones."""
        row = torch.arange(sum(self.text), dtype=torch.int32)
        image = torch.arange(sum(self.visual), dtype=torch.int32) // 8
        position = row.masked_fill(row < self.padding, -1)
        parts = torch.zeros_like(row), row + 1, position, self.padding + 1 + image
        start, end, text, visual = (part.repeat(2, 1) for part in parts)
        return start, end, text, visual

    def leaves(self, rank: int) -> dict[str, Tensor]:
        """This rank's share; the whole text where it is replicated."""
        lengths = dict.fromkeys(("q", "k", "v", "dout", "dlse"), self.text)
        if self.way == "replicated":
            lengths = {name: (0,) * rank + (sum(self.text),) for name in lengths}
        lengths |= dict.fromkeys(("visual_k", "visual_v"), self.visual)
        cut = {
            name: self.tensors[name]
            .split(lengths[name], dim=2 if name == "dlse" else 1)[rank]
            .clone()
            for name in lengths
        }
        return {name: t.requires_grad_(not name.startswith("d")) for name, t in cut.items()}

    def visibilities(self, rank: int) -> tuple[Visibility, Visibility]:
        """Of this rank's queries: over its visual keys, and over its text."""
        start, end, text, visual = self.rule
        if self.way != "replicated":
            start, end, text = (t.split(self.text, dim=1)[rank] for t in (start, end, text))
        here = visual.split(self.visual, dim=1)[rank]
        return Visibility(start, end, here), Visibility(start, end, text)


def run_hyper(cases: list[Hyper]) -> list[dict[str, Any]]:
    """This rank's out, lse and gradients of each case, and the bytes that its forward sent."""
    return [_run_hyper(case, torch.distributed.get_rank()) for case in cases]


def _run_hyper(case: Hyper, rank: int) -> dict[str, Any]:
    leaves, (of_visual, of_text) = case.leaves(rank), case.visibilities(rank)

    def attend(q: Tensor, k: Tensor, v: Tensor, *visual: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            ds_lvx.lv_xattn(q, *visual, visibility=of_visual, schedule=case.way, return_lse=True)
        ]
        if case.way == "replicated":
            own, lse = attention_oracle(q, k, v, visibility=of_text)
            parts.append((own.to(q.dtype), lse.to(parts[0][1].dtype)))
        else:
            parts.append(ds_lvx.ring_attention(q, k, v, visibility=of_text, return_lse=True))
        return ds_lvx.merge_attention(parts)

    inputs = [leaves[name] for name in ("q", "k", "v", "visual_k", "visual_v")]
    with ds_lvx.traffic() as sent:
        if case.checkpointed:
            out, lse = ds_lvx.checkpointing(checkpoint)(attend, *inputs, use_reentrant=False)
        else:
            out, lse = attend(*inputs)
        Problem.loss(out, lse, leaves["dout"], leaves["dlse"]).backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"out": out.detach(), "lse": lse.detach(), "bytes": sent.bytes_sent, **gradients}


def together(case: Hyper, answers: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the ranks found, whole; every rank must have found the same where it is replicated."""
    whole = {}
    for name in answers[0].keys() - {"bytes"}:
        found = [answer[name] for answer in answers]
        if case.way == "replicated" and "visual" not in name:
            for other in found[1:]:
                torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)
            whole[name] = found[0]
        else:
            whole[name] = torch.cat(found, dim=2 if name == "lse" else 1)
    return whole


def one_softmax(case: Hyper) -> dict[str, Tensor]:
    """The same in one process: one attention over visual and text keys, in float64."""
    start, end, text, visual = case.rule
    names = ("q", "k", "v", "visual_k", "visual_v")
    leaves = {name: case.tensors[name].double().requires_grad_() for name in names}
    out, lse = attention_oracle(
        leaves["q"],
        torch.cat((leaves["visual_k"], leaves["k"]), dim=1),
        torch.cat((leaves["visual_v"], leaves["v"]), dim=1),
        visibility=Visibility(start, end, torch.cat((visual, text), dim=1)),
    )
    Problem.loss(out, lse, case.tensors["dout"], case.tensors["dlse"]).backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), "lse": lse.detach(), **gradients}  # type: ignore[dict-item]


def pytorchs(case: Hyper) -> dict[str, Tensor]:
    """The same by PyTorch's own attention in the case's dtype, which has no lse."""
    start, end, text, visual = case.rule
    leaves = {name: case.tensors[name].clone().requires_grad_() for name in case.tensors}
    q = leaves["q"].transpose(1, 2)
    k, v = (
        torch.cat((leaves[f"visual_{n}"], leaves[n]), dim=1).transpose(1, 2) for n in ("k", "v")
    )
    position = torch.cat((visual, text), dim=1)[:, None, None]
    sees = (position >= start[:, None, :, None]) & (position < end[:, None, :, None])
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(q, k, v, attn_mask=sees, enable_gqa=True).transpose(1, 2)
    out.backward(case.tensors["dout"])
    names = ("q", "k", "v", "visual_k", "visual_v")
    return {"out": out.detach()} | {f"d{name}": leaves[name].grad for name in names}  # type: ignore[dict-item]


WAYS = ("gather", "ring", "replicated")


def test_sharded_visual_keys_and_causal_text_are_one_softmax() -> None:
    """Two ranks; rows that see nothing at all, text alone, or text and images."""
    cases = [Hyper(way) for way in WAYS]
    cases += [Hyper("gather", dtype=torch.float64), Hyper("ring", text=(14, 0), visual=(0, 61))]
    cases += [replace(cases[0], checkpointed=True)]
    answers = run_ranks(run_hyper, 2, cases)
    for index, case in enumerate(cases):
        exact = one_softmax(case)
        assert (exact["lse"] == -torch.inf).sum() == 2 * 4 * PADDING
        errors = largest_error(together(case, [a[index] for a in answers]), exact)
        limit = 1e-12 if case.dtype == torch.float64 else 1e-5
        assert max(errors.values()) < limit, (case, errors)
    for answer in answers:  # a checkpointed layer sends nothing twice
        assert answer[-1]["bytes"] == answer[0]["bytes"]


def test_16_bits_err_at_most_twice_as_much_as_pytorch() -> None:
    """By root mean square: out is rounded twice, as a part and as the whole."""
    cases = [Hyper(way, torch.bfloat16, padding=0, lse_weight=0.0) for way in WAYS]
    answers = run_ranks(run_hyper, 2, cases)
    exact, own = one_softmax(cases[0]), pytorchs(cases[0])
    for index, case in enumerate(cases):
        found = together(case, [a[index] for a in answers])
        assert (found["out"].dtype, found["lse"].dtype) == (torch.bfloat16, torch.float32)
        for name, value in own.items():
            error, allowed = ((x - exact[name]).norm() for x in (found[name], value))
            assert error <= 2 * allowed, (case.way, name, error, allowed)


def wrong_parts() -> dict[str, Any]:
    """Parts that do not merge, by what the error says of them."""
    out, lse = torch.zeros(1, 5, 2, 8), torch.zeros(1, 2, 5)
    good = out, lse
    return {
        r"parts: got none; expected at least one; pass \[\(out, lse\), \.\.\.\]": [],
        r"parts: got Tensor; expected a list": out,
        r"parts\[0\]: got Tensor; expected a pair of tensors": good,
        r"parts\[1\]: got \(Tensor\); expected a pair": [good, (out,)],
        r"parts\[1\]: got \(Tensor, NoneType\)": [good, (out, None)],
        r"parts\[0\]: got out of shape \[5, 2, 8\]; expected \[batch, seqlen_q": [(out[0], lse)],
        r"parts\[0\]: got out torch.int64; expected one of torch.float32": [(out.long(), lse)],
        r"parts\[1\]: got out \[1, 4, 2, 8\].*expected \[1, 5, 2, 8\].*as in parts\[0\]": [
            good,
            (out[:, 1:], lse[..., 1:]),
        ],
        r"parts\[1\]: got out .*bfloat16 on cpu; expected .*float32": [good, (out.bfloat16(), lse)],
        r"parts\[1\]: got out .* on meta; expected .* on cpu": [good, (out.to("meta"), lse)],
        r"parts\[0\]: got lse \[1, 5, 2\].*seqlen_q\] = \[1, 2, 5\] torch.float32": [
            (out, lse.transpose(1, 2))
        ],
        r"parts\[0\]: got lse .*bfloat16.*expected .*float32 on cpu; pass lse as": [
            (out.bfloat16(), lse.bfloat16())
        ],
        r"parts\[1\]: got lse .*float32.*expected .*float64": [
            (out.double(), lse.double()),
            (out.double(), lse),
        ],
        r"parts\[0\]: got lse .*on meta.* on cpu": [(out, lse.to("meta"))],
    }


@pytest.mark.parametrize("message", wrong_parts())
def test_parts_that_do_not_merge(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds_lvx.merge_attention(wrong_parts()[message])
