"""Transfers are posted before the work that hides them, and waited for after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ds_lvx
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.pending import Pending
from ds_lvx.kernels.native import NativeKernel
from tests.attention.cases import Problem
from tests.ranks import run_ranks


class Journal:
    """Writes down, in order, transfers posted, transfers waited for, kernels and projections."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def watch(self, patch: Any) -> None:
        for name in ("gather_rows", "exchange_rows", "shift"):
            self._watch_transfer(patch, name)
        for name in ("forward", "fold", "backward"):
            self._watch_kernel(patch, name)

    def _watch_transfer(self, patch: Any, name: str) -> None:
        original = getattr(Channel, name)

        def posted(channel: Channel, *args: Any, **kwargs: Any) -> Pending[Any]:
            number = sum(event.startswith("post") for event in self.events)
            self.events.append(f"post {number}")
            pending = original(channel, *args, **kwargs)
            wait = pending.wait

            def waited() -> Any:
                self.events.append(f"wait {number}")
                return wait()

            pending.wait = waited
            return pending

        patch.setattr(Channel, name, posted)

    def _watch_kernel(self, patch: Any, name: str) -> None:
        original = getattr(NativeKernel, name)

        def computed(kernel: NativeKernel, *args: Any, **kwargs: Any) -> Any:
            self.events.append("kernel")
            return original(kernel, *args, **kwargs)

        patch.setattr(NativeKernel, name, computed)

    def take(self) -> list[str]:
        events, self.events = self.events, []
        return events


def run_journal(method: str, schedule: str, queries: int = 4) -> tuple[list[str], list[str]]:
    """The events of a forward and of a backward."""
    problem = Problem((queries,) * 3, (8,) * 3, heads=8, kv_heads=8)
    shard = problem.shard(torch.distributed.get_rank())
    journal = Journal()
    with pytest.MonkeyPatch.context() as patch:
        journal.watch(patch)

        def project(features: Tensor) -> tuple[Tensor, Tensor]:
            journal.events.append("project")
            features = _Watch.apply(journal, features)
            return features[:, :, 0], features[:, :, 1]

        if method == "ring_attention":
            out = ds_lvx.ring_attention(shard["q"], shard["k"], shard["v"])
        elif method == "recompute":
            features = torch.stack((shard["k"], shard["v"]), dim=2)
            out = ds_lvx.lv_xattn_recompute(shard["q"], features, project, schedule=schedule)
        else:
            out = ds_lvx.lv_xattn(shard["q"], shard["k"], shard["v"], schedule=schedule)
        forward = journal.take()
        out.sum().backward()
    return forward, journal.take()


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journal: Journal, features: Tensor) -> Tensor:
        ctx.journal = journal
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.journal.events.append("project backward")
        return None, gradient


# Three ranks. Rows travel under the first two kernels (transfers 0 and 1), parts return under the
# third (2) and after it (3).
ROWS_AND_PARTS = (
    "post 0, kernel, wait 0, post 1, kernel, post 2, wait 1, kernel, wait 2, post 3, wait 3"
)
ROWS_ALONE = "post 0, kernel, wait 0, post 1, kernel, wait 1, kernel"


@pytest.mark.parametrize(
    ("method", "forward"), [("lvx", ROWS_AND_PARTS), ("ring_attention", ROWS_ALONE)]
)
def test_the_ring_transfers_under_the_kernel(method: str, forward: str) -> None:
    for answer in run_ranks(run_journal, 3, method, "ring"):
        assert answer == (forward.split(", "), ROWS_AND_PARTS.split(", "))


def test_the_ring_hides_its_first_and_last_transfer_under_the_projection() -> None:
    forward = ROWS_AND_PARTS.replace("post 0,", "post 0, project,")
    backward = forward.replace("post 3,", "post 3, project backward,")
    for answer in run_ranks(run_journal, 3, "recompute", "ring"):
        assert answer == (forward.split(", "), backward.split(", "))


def test_gather_hides_under_the_projection_in_both_directions() -> None:
    forward = "post 0, project, wait 0, kernel, post 1, wait 1"
    backward = forward.replace("post 1,", "post 1, project backward,")
    for answer in run_ranks(run_journal, 3, "recompute", "gather"):
        assert answer == (forward.split(", "), backward.split(", "))


@pytest.mark.slow
def test_gather_sends_large_queries_by_groups_of_heads() -> None:
    """The next group's queries arrive, and the last group's part goes home, under each kernel."""
    expected = (
        "post 0, wait 0, post 1, kernel, post 2, wait 1, post 3, kernel, post 4, wait 3, kernel, "
        "post 5, wait 2, wait 4, wait 5"
    )
    for answer in run_ranks(run_journal, 3, "lvx", "gather", queries=40):
        assert answer == (expected.split(", "), expected.split(", "))


def test_gather_sends_small_queries_at_once() -> None:
    expected = "post 0, wait 0, kernel, post 1, wait 1"
    for answer in run_ranks(run_journal, 3, "lvx", "gather"):
        assert answer == (expected.split(", "), expected.split(", "))
