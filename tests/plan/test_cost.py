"""Predicted bytes and times of one attention call."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_lvx.attention.shape import AttentionShape
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import Cluster, Link, from_card
from ds_lvx.plan.cost import Cost, cost
from ds_lvx.plan.models import model
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import step
from ds_lvx.plan.walks import WAYS
from tests.sent import bytes_sent

SHAPE = AttentionShape.even(queries=384, keys=768_000, ranks=8, heads=32, kv_heads=8, head_dim=128)


def cluster(gpus: int = 8, per_node: int = 8, **links: Link) -> Cluster:
    return from_card(CARDS["A100-40"], gpus=gpus, gpus_per_node=per_node, **links)


def both(way: str, shape: AttentionShape = SHAPE) -> tuple[float, float]:
    found = cost(shape, cluster(shape.ranks), way)
    return found.forward.bytes_sent, found.backward.bytes_sent


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("visibility", [False, True])
def test_a_walk_sends_the_bytes_of_the_formulas(n: int, *, visibility: bool) -> None:
    """Equal shards; `tests/attention/test_messages.py` holds the formulas to the documents."""
    shape = AttentionShape(2, (48,) * n, (96_000,) * n, 32, 8, 128, visibility=visibility)
    for way in WAYS:
        sent = bytes_sent(shape, way)
        wanted = sent.rule + sent.forward, sent.backward  # the rule goes once, before forward
        assert both(way, shape) == pytest.approx(wanted, rel=1e-9), way
        assert bool(sent.rule) == (visibility and n > 1 and bool(WAYS[way].rule))


@pytest.mark.parametrize("way", WAYS)
def test_parts_add_up_to_the_whole(way: str) -> None:
    shape = replace(SHAPE, recompute=True, features_dim=4096, visibility=True)
    found = cost(shape, cluster(), way)
    for each in (found.forward, found.backward):
        parts = each.kernel_s + each.projection_s + each.other_s + each.exposed_s
        assert parts == pytest.approx(each.seconds)
        assert each.exposed_s <= each.wire_s + 1e-12


def slow_network() -> Cluster:
    return cluster(8, 1, across=Link.of(1e8, 1e-4))


def test_a_slow_network_costs_ring_and_ulysses_but_not_lvx() -> None:
    fast, slow = cluster(), slow_network()

    def ratio(way: str) -> float:
        times = [cost(SHAPE, c, way).seconds for c in (slow, fast)]
        return times[0] / times[1]

    assert ratio("ring") > 50
    assert ratio("ulysses") > 50
    assert ratio("lvx ring") < ratio("ring") / 10


def test_overlap_hides_the_transfers_of_ring_attention_under_its_kernels() -> None:
    # Many queries: kernels take longer than transfers.
    shape = replace(SHAPE, q_lengths=(8192,) * 8)
    hidden = cost(shape, cluster(), "ring")
    assert hidden.forward.exposed_s < 0.01 * hidden.forward.wire_s


def test_a_window_hides_less_of_the_network() -> None:
    asked = Scenario(model("gemma-3-4b-it"), text_tokens=1024, frames=450)
    found = step(asked, cluster(), ranks=8, way="ring")
    full = found.cross.exposed_s
    narrow = cost(replace(asked.cross_shape(8, "ring"), seen=0.01), cluster(), "ring")
    assert full < narrow.exposed_s
    assert found.parts["cross-attention, network"] > 34 * full
    assert narrow.bytes_sent == found.cross.bytes_sent


def test_recomputation_hides_the_gathers_under_the_projection() -> None:
    """Forward and backward: the first transfer; backward: the last one too."""
    shape = replace(SHAPE, features_dim=4096)
    kept = cost(shape, cluster(), "lvx gather")
    again = cost(replace(shape, recompute=True), cluster(), "lvx gather")
    assert again.backward.exposed_s == 0
    assert again.forward.exposed_s < kept.forward.exposed_s
    extra = again.backward.projection_s - kept.backward.projection_s
    assert extra == pytest.approx(kept.forward.projection_s)


def test_gather_hides_all_but_the_first_and_last_heads() -> None:
    """Of a slow network: an eighth of the queries and an eighth of the parts stay in the open."""
    network = cluster(8, 1, across=Link.of(1e9, 1e-4))
    large = replace(SHAPE, q_lengths=(1024,) * 8, kv_lengths=(10**6,) * 8)
    found = cost(large, network, "lvx gather")
    again = cost(replace(large, recompute=True), network, "lvx gather")
    for passed, whole in ((found.forward, again.forward), (found.backward, again.backward)):
        assert passed.bytes_sent == pytest.approx(whole.bytes_sent)
        assert passed.messages == 3 * whole.messages
        # A little less: the first parts are merged while the last ones travel.
        assert whole.exposed_s / 16 < passed.exposed_s < 1.02 * whole.exposed_s / 8


def test_two_transfers_at_once_and_their_drag_count() -> None:
    link = Link.of(1e9, 1e-5)
    slow = replace(link, shifts=replace(link.shifts, bytes_per_s=0.5e9))
    times = [cost(SHAPE, cluster(within=each), "ring") for each in (link, slow)]
    # Forward of ring attention has one transfer at a time, backward has two.
    assert times[0].forward == times[1].forward
    assert times[1].backward.seconds > 1.5 * times[0].backward.seconds
    heavy = replace(link, drag_s=1e-3)
    light, dragged = (cost(SHAPE, cluster(within=each), "lvx ring") for each in (link, heavy))
    messages = dragged.forward.messages + dragged.backward.messages
    assert dragged.seconds - light.seconds == pytest.approx(1e-3 * messages, rel=0.05)


def test_sending_takes_processor_time_under_a_kernel_too() -> None:
    """Where a transfer hides, its processor's time does not; where it is waited for, it does."""
    light = Link.of(1e9, 1e-5)
    heavy = replace(light, processor_s=0.5e-9)
    for way in ("lvx ring", "ulysses"):
        before, after = (cost(SHAPE, cluster(within=each), way) for each in (light, heavy))
        sent = before.forward.bytes_sent + before.backward.bytes_sent
        share = (after.seconds - before.seconds) / (sent * heavy.processor_s)
        # The last part home is waited for.
        assert 0.8 < share < 1.0 if way == "lvx ring" else abs(share) < 0.01


def test_one_rank_alone_has_the_kernels_of_one_whose_neighbours_are_idle() -> None:
    shared = cluster()
    device = shared.device
    quick = replace(device.whole, pair_s=device.whole.pair_s / 4, key_s=device.whole.key_s / 4)
    slow = replace(device.backward, pair_s=2 * device.backward.pair_s)
    alone = replace(shared, device=replace(device, whole_alone=quick, backward_alone=slow))
    before, after = (cost(SHAPE, each, "none") for each in (shared, alone))
    assert after.forward.seconds < 0.5 * before.forward.seconds
    assert after.backward.seconds > 1.5 * before.backward.seconds
    for way in ("lvx gather", "ring"):
        assert cost(SHAPE, alone, way) == cost(SHAPE, shared, way)


def test_ranks_of_a_node_share_its_link() -> None:
    """An all-to-all crosses with every rank at once, a ring only with one."""
    link = Link.of(1e9, 1e-5)
    few, many = (cluster(8, per_node, across=link) for per_node in (1, 4))
    assert cost(SHAPE, many, "ulysses").seconds > 2 * cost(SHAPE, few, "ulysses").seconds
    ring = [cost(SHAPE, c, "ring").forward.seconds for c in (few, many)]
    assert ring[1] == pytest.approx(ring[0], rel=0.05)


def test_the_longest_shard_of_what_stays_counts() -> None:
    uneven = replace(SHAPE, kv_lengths=(768_000 - 7 * 1000,) + (1000,) * 7)
    assert lvx(uneven).forward.kernel_s > 6 * lvx(SHAPE).forward.kernel_s
    # In ring attention the keys rotate: every rank meets all of them either way.
    ring = [cost(shape, cluster(), "ring").forward.kernel_s for shape in (uneven, SHAPE)]
    assert ring[0] == pytest.approx(ring[1])


def lvx(shape: AttentionShape) -> Cost:
    return cost(shape, cluster(), "lvx gather")


def test_a_call_by_itself_agrees_first() -> None:
    bare = cost(SHAPE, cluster(), "lvx gather", settled=False)
    settled = lvx(SHAPE)
    assert bare.seconds > settled.seconds
    assert bare.bytes_sent == settled.bytes_sent


def test_what_cannot_be_is_refused() -> None:
    for unknown in ("lvxx", "lvx tree", "lvx"):
        with pytest.raises(ValueError, match=f"way: got '{unknown}'; expected one of"):
            cost(SHAPE, cluster(), unknown)
    many = AttentionShape.even(queries=64, keys=640, ranks=64, heads=32, kv_heads=8, head_dim=64)
    with pytest.raises(ValueError, match="32 heads do not reach 64 ranks"):
        cost(many, cluster(64), "ulysses")
    with pytest.raises(ValueError, match="expected one of each for every rank"):
        AttentionShape(1, (1, 2), (3,), 1, 1, 64)
