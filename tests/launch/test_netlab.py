"""launch/netlab.sh and launch/compare.py together: real ranks on an emulated network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_lvx.compare.network import Lab, Network
from tests.compare.test_network import own, why_not

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_BYTES_A_SEGMENT = 8948


def netlab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / "netlab.sh"), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )


def test_help_is_the_script_s_own_text() -> None:
    done = netlab("--help")
    assert done.returncode == 0
    assert "netlab.sh [--name NAME] up N RATE [LATENCY]" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.exhaustive
def test_ranks_of_a_launcher_compare_and_the_interfaces_agree(tmp_path: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    words = ("--methods", "lvx", "ulysses", "ring", "--seqlen-kv", "4K", "--repeats", "1")
    with Lab(Network(10**9), ranks=2, name=own("compare")) as lab:
        done = netlab(
            *("--name", lab.name, "run", sys.executable, str(ROOT / "launch" / "compare.py")),
            *(*words, "--warmup", "0", "--output", str(tmp_path)),
        )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "compare-q256-kv4K-ranks2-1gbit.json").read_text())
    assert results["kind"] == "emulated"
    assert results["ranks"] == 2
    for record in results["records"]:
        for rank in record["ranks"]:
            traffic, interface = rank["traffic"], rank["interface"]
            counted = traffic["bytes_sent"] + traffic["control_bytes"]
            # On a machine under load, TCP may send again in each of the steps that were counted.
            again = MOST_BYTES_A_SEGMENT * interface["segments_sent_again"]
            carried = interface["sent_payload_bytes"]
            assert counted <= carried < 1.02 * counted + again, (record["method"], rank)
        assert record["interface_over_traffic"] >= 1.0
    assert "lvx-gather" in done.stdout
