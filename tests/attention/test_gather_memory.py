"""What the gather schedule holds: gathered queries, and then one message and what answers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench_launches import made_up_ranks
from ds_lvx.attention.call import Call
from ds_lvx.attention.keys import Saved
from ds_lvx.attention.layout import Layout
from ds_lvx.attention.schedules import gather
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels.choice import kernel_for
from tests.plan.counting import LiveBytes

RANKS, QUERIES, HEADS, HEAD_DIM = 4, 64, 4, 32


class NoKeys:
    """Keys that nothing is computed for."""

    kv_heads = None

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.bytes_at_end = 0

    def prepare(self) -> None:
        return

    def attend(self, call: Call, q: Tensor, rule: Any, *, heads: Any = None) -> Any:
        return q.new_zeros(q.shape, dtype=torch.float32), q.new_zeros(1, HEADS, q.shape[1]).float()

    def gradients(self, call: Call, rows: Saved, rule: Any, *, heads: Any = None) -> Tensor:
        return torch.zeros(rows.q.shape, dtype=torch.float32)

    def finish(self) -> None:
        self.bytes_at_end = self._live.now


def test_only_one_message_waits_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0 of ranks that are not there; results are those of memory that nobody wrote."""
    found = []
    merged = gather._Part.merged
    numbers = QUERIES * HEADS * HEAD_DIM
    with made_up_ranks(RANKS), LiveBytes() as live:
        layout = Layout(
            Channel.world(), (QUERIES,) * RANKS, (9,) * RANKS, device=torch.device("cpu")
        )
        q = torch.zeros(1, QUERIES, HEADS, HEAD_DIM, dtype=torch.bfloat16)
        call = Call(layout, kernel_for("native", q), 1.0, requires_grad=True)
        statistics = torch.zeros(1, HEADS, QUERIES)
        keys, before = NoKeys(live), live.now
        monkeypatch.setattr(
            gather._Part, "merged", lambda part: (found.append(live.now - before), merged(part))[1]
        )
        gather.Gather().forward(call, q, keys)
        saved = Saved(q, q.clone(), statistics, statistics.clone())
        before = live.now
        gather.Gather().backward(call, saved, keys)
    # A message in 16 bits with lse and factors, what the other ranks sent, our own part in fp32.
    message = RANKS * (2 * numbers + QUERIES * (16 + 16))
    allowed = 1.02 * (2 * message + 4 * numbers)
    assert 2 * message < found[0] < allowed
    assert RANKS * 4 * numbers < keys.bytes_at_end - before < allowed
