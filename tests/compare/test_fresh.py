"""Fresh processes for a measurement, and the meter that they read."""

from __future__ import annotations

import mmap
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bench.peak import PROMPT_FREEING, meter
from bench.weigh import Weighing, weigh
from ds_lvx.compare import harness
from ds_lvx.compare.case import Case
from ds_lvx.compare.harness import Ranks, RunError, on_ranks
from ds_lvx.plan.memory import Setting
from tests.compare.failing_worker import ended, fail, wait_until
from tests.forked import fork_fresh_ranks
from tests.ranks import ROOT

TINY = Case(hidden=32, heads=4, kv_heads=2, cross_layers=1, mlp=8, vocabulary=16, text_tokens=4)
MIB = 2**20


TWO = Ranks(2, environment=PROMPT_FREEING)


def load(setting: Setting) -> Weighing:
    return Weighing(TINY, setting, frames=(1, 2, 2))


SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass
from beside import FACTOR
from ds_lvx.compare.harness import Ranks, on_ranks

@dataclass
class Request:
    number: int

def times(request: Request) -> int:
    return FACTOR * request.number

if __name__ == "__main__":
    print(on_ranks(times, Request(7), Ranks(2)))
"""


def test_ranks_run_what_a_script_defines_and_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("FACTOR = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    fork_fresh_ranks(monkeypatch)
    runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    assert capsys.readouterr().out == "[21, 21]\n"


@pytest.mark.slow
def test_every_rank_answers_with_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_fresh_ranks(monkeypatch)
    answers = on_ranks(weigh, load(Setting(recompute_kv=True, checkpointing=True)), TWO)
    assert len(answers) == 2
    for answer in answers:
        assert {len(answer[name]) for name in ("kept_bytes", "peak_bytes", "step_s", "loss")} == {2}
        assert answer["before_bytes"] > 0
        for step, forward in zip(answer["step_s"], answer["forward_s"], strict=True):
            assert step > forward > 0


def test_a_rank_that_fails_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_fresh_ranks(monkeypatch)
    buffers = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    with pytest.raises(RunError, match=r"(?s)rank \d ended with code 1; .*features") as raised:
        on_ranks(weigh, load(Setting(method="ring", features="offload")), TWO)
    assert "Traceback" in str(raised.value) or "Error" in str(raised.value)
    assert set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) <= buffers


def test_the_rank_that_failed_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 fails; rank 0 ends because of it, and its process is gone first."""
    fork_fresh_ranks(monkeypatch)
    monkeypatch.setattr(harness, "_VICTIMS_S", 600.0)
    with pytest.raises(RunError, match=r"(?s)rank 1 ended with code 5; .*rank 1 is broken"):
        on_ranks(fail, tmp_path, Ranks(2))


KILLED = """
import sys
from pathlib import Path
from ds_lvx.compare.harness import Ranks, on_ranks
from tests.compare.failing_worker import stay

on_ranks(stay, Path(sys.argv[1]), Ranks(2))
"""


@pytest.mark.exhaustive
def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    wait_until(lambda: len(list(tmp_path.glob("rank-*"))) == 2 or parent.poll() is not None)
    parent.kill()
    parent.wait()
    ranks = [path.read_text() for path in tmp_path.glob("rank-*")]
    assert len(ranks) == 2
    wait_until(lambda: all(ended(rank) for rank in ranks))


def test_resident_memory_has_a_peak_that_is_set_back() -> None:
    memory = meter("cpu")
    memory.reset()
    before = memory.now_bytes()
    # Not by malloc, which may have as much at hand.
    with mmap.mmap(-1, 64 * MIB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert memory.now_bytes() - before > 48 * MIB
    assert memory.peak_bytes() - before > 48 * MIB
    memory.reset()
    assert memory.peak_bytes() - memory.now_bytes() < 48 * MIB
