"""The formulas of what travels, against the documents and by hand."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.config.registry import METHODS, SCHEDULES
from ds_lvx.plan.walks import WAYS
from tests.sent import Sent, bytes_sent

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    "README.md": {"`lvx`": "lvx gather", "`ulysses`": "ulysses", "`ring`": "ring"},
    "docs/how-it-works.md": {
        "lvx": "lvx gather",
        "ring attention": "ring",
        "ulysses": "ulysses",
        "replicated": "lvx replicated",
    },
}


def value(formula: str, **numbers: int) -> float:
    """What a document's formula comes to: ``(n-1) s H (2 D e + 4)``."""
    tokens = re.findall(r"[0-9]+|[A-Za-z]|[-+/()]", formula)
    code = [tokens[0]]
    for before, token in pairwise(tokens):
        side_by_side = (before.isalnum() or before == ")") and (token.isalnum() or token == "(")
        code += ["*", token] if side_by_side else [token]
    return float(eval(" ".join(code), numbers))


def formulas(document: str, row: str) -> tuple[str, str]:
    """Forward's and backward's, from the table of a document."""
    for line in (ROOT / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1] == row and "(n-1)" in line:
            forward, backward = (re.match(r"`(.+?)`|the same", cell) for cell in cells[-3:-1])
            assert forward is not None, line
            assert backward is not None, line
            return forward[1], backward[1] or forward[1]
    raise AssertionError(f"{document} has no row of {row}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_documents_have_these_formulas(document: str) -> None:
    n, s, t, heads, kv_heads, head_dim, e = 4, 48, 96_000, 32, 8, 128, 2
    shape = AttentionShape(1, (s,) * n, (t,) * n, heads, kv_heads, head_dim, e)
    numbers = {"n": n, "s": s, "S": s, "t": t, "H": heads, "K": kv_heads, "D": head_dim, "e": e}
    for row, way in DOCUMENTS[document].items():
        sent = bytes_sent(shape, way)
        written = [value(formula, **numbers) for formula in formulas(document, row)]
        assert written == pytest.approx([sent.forward, sent.backward]), row


def test_few_queries_that_every_rank_holds_go_as_one_message() -> None:
    n, heads, head_dim = 4, 32, 128
    shape = AttentionShape(1, (1,) * n, (96_000,) * n, heads, 8, head_dim)
    sent = bytes_sent(shape, "lvx replicated")
    numbers = {"n": n, "S": 1, "H": heads, "D": head_dim}
    row = formulas("docs/how-it-works.md", "replicated, few queries")
    assert [value(each, **numbers) for each in row] == pytest.approx([sent.forward, sent.backward])


def test_every_schedule_and_method_has_its_time_and_its_bytes() -> None:
    """Else ``auto`` stops everywhere, which asks all of them."""
    methods = {name for name, entry in METHODS.items() if not entry.subgroups}
    every = {f"lvx {name}" for name in SCHEDULES} | methods - {"lvx"}
    assert every == WAYS.keys()
    shape = AttentionShape(1, (8, 8), (40, 40), 4, 4, 16)
    assert all(bytes_sent(shape, way).forward > 0 for way in every - {"none"})
    with pytest.raises(ValueError, match=r"got 'lvx other'; .* a row in WAYS of ds_lvx/plan/walks"):
        bytes_sent(shape, "lvx other")


def test_unequal_shards_send_as_much_together() -> None:
    even = AttentionShape(2, (8,) * 3, (40,) * 3, 6, 3, 16, 4)
    uneven = AttentionShape(2, (3, 21, 0), (20, 0, 100), 6, 3, 16, 4)
    for way in ("lvx ring", "lvx gather", "ring"):
        sums = [
            [sum(each) for each in zip(*(parts(s, way, rank) for rank in range(3)), strict=True)]
            for s in (even, uneven)
        ]
        assert sums[0] == sums[1], way
    # q of the ranks behind goes on, never that of the rank ahead; parts of all others go home.
    q, lse = 2 * 6 * 16 * 4, 2 * 6 * 4
    assert parts(uneven, "lvx ring", 0)[0] == 3 * q + 21 * (q + lse)
    assert parts(uneven, "lvx gather", 0)[0] == 2 * 3 * q + 21 * (q + lse)


def parts(shape: AttentionShape, way: str, rank: int) -> tuple[float, float]:
    sent = bytes_sent(shape, way, rank=rank)
    return sent.forward, sent.backward


def test_the_rule_goes_once_from_a_bare_operator_alone() -> None:
    bare = AttentionShape(2, (5, 7), (30, 20), 4, 4, 16, visibility=True)
    rules = {
        "lvx gather": [8 * 2 * 5, 8 * 2 * 7],
        "lvx ring": [8 * 2 * 5, 8 * 2 * 7],
        "lvx replicated": [0, 0],
        "ring": [4 * 2 * 30, 4 * 2 * 20],
        "ulysses": [2 * (8 * 5 + 4 * 30), 2 * (8 * 7 + 4 * 20)],
    }
    for way, expected in rules.items():
        assert [bytes_sent(bare, way, rank=rank).rule for rank in range(2)] == expected, way
    patched = AttentionShape(2, (5, 7), (30, 20), 4, 4, 16)
    assert all(bytes_sent(patched, way).rule == 0 for way in rules)


def test_ulysses_pads_shards_and_heads() -> None:
    """Three ranks, two heads of K for four of q: each twice, and two of zeros, for both."""
    shape = AttentionShape(1, (8, 2, 2), (40, 1, 1), 4, 2, 16, 4)
    each = 2 / 3 * (2 * 8 * 6 + 2 * 40 * 6) * 16 * 4
    assert bytes_sent(shape, "ulysses") == Sent(0, pytest.approx(each), pytest.approx(each))


def test_parts_in_bf16_have_a_factor_a_row() -> None:
    shape = AttentionShape(2, (5, 7), (30, 20), 4, 4, 16)
    plain, scaled = (bytes_sent(shape, "lvx ring", factors=factors) for factors in (False, True))
    assert scaled == plain._replace(
        forward=plain.forward + 7 * 2 * 4, backward=plain.backward + 7 * 2 * 4
    )


def test_one_rank_and_a_call_without_backward_send_less() -> None:
    alone = AttentionShape(1, (5,), (30,), 4, 4, 16, visibility=True)
    assert bytes_sent(alone, "lvx gather") == Sent(0, 0, 0)
    forward = AttentionShape(1, (5, 5), (30, 30), 4, 4, 16, backward=False)
    assert bytes_sent(forward, "ring").backward == 0 < bytes_sent(forward, "ring").forward
