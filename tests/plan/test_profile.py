"""Where the planner's numbers come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_lvx.plan import profile
from ds_lvx.plan.cards import CARDS
from ds_lvx.plan.cluster import Cluster, Link, from_card


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("NETLAB", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "ds_lvx"


def keep(name: str, ranks: int, network: str | None = None, **changes: object) -> Cluster:
    cluster = Cluster.of({**from_card(CARDS["A30"], gpus=ranks).record(), "source": f"{ranks}"})
    path = profile.path_of(name, ranks, network)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": profile.FORMAT, "cluster": cluster.record(), **changes}))
    return cluster


def test_a_cluster_survives_json() -> None:
    cluster = from_card(CARDS["H200"], gpus=64, across=Link.of(1e9, 1e-5))
    assert Cluster.of(json.loads(json.dumps(cluster.record()))) == cluster


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A30", "A30"),
    ],
)
def test_a_device_is_known_by_its_drivers_name(name: str, card: str) -> None:
    assert profile.guess(name, gpus=8, gpus_per_node=8).device.name == card


def test_an_unknown_accelerator_and_a_cpu_are_guessed_and_say_so() -> None:
    assert "unknown" in profile.guess("Voodoo 2", gpus=8, gpus_per_node=8).source
    assert "--calibrate" in profile.current("cpu", 4).source


def test_a_measured_profile_goes_before_the_guess(cache: Path) -> None:
    name = profile.device_name("cpu")
    keep(name, 2)
    keep(name, 8)
    assert profile.current("cpu", 3).source == "2"
    assert profile.current("cpu", 16).source == "8"
    found = profile.current("cpu", 16)
    assert (found.gpus, found.gpus_per_node) == (16, 16)


def test_ranks_of_a_node_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert profile.current("cpu", 16).gpus_per_node == 4


def test_an_emulated_network_has_its_own_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    name = profile.device_name("cpu")
    keep(name, 2)
    keep(name, 4, "200mbit")
    assert profile.current("cpu", 4).source == "2"
    monkeypatch.setenv("NETLAB", "200mbit")
    assert profile.current("cpu", 4).source == "4"
    monkeypatch.setenv("NETLAB", "80mbit,3ms")
    found = profile.current("cpu", 4)
    assert found.across.shift.bytes_per_s == pytest.approx(1e7)
    assert found.across.shift.latency_s > 3e-3
    assert "80mbit" in found.source


def test_a_profile_that_does_not_serve_is_passed_over_and_named(tmp_path: Path) -> None:
    name = profile.device_name("cpu")
    keep(name, 4, format=profile.FORMAT + 1)
    assert "--calibrate" in profile.current("cpu", 4).source
    for path, words in (
        (profile.path_of(name, 4), "not a profile of format"),
        (tmp_path / "none.json", "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            profile.read(path)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        profile.read(broken)
    broken.write_text(json.dumps({"format": profile.FORMAT, "cluster": {"device": {}}}))
    with pytest.raises(ValueError, match="not a cluster's"):
        profile.read(broken)
