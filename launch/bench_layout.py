"""How long the layout of a batch takes, and how much memory: on one core, without a device.

    python launch/bench_layout.py [--document docs/benchmarks/layout.json]

A long video between the words of a text: the whole rule of text and frames, both layouts, and what
the layers of one rank ask of them: its part of the rule, the blocks of `native`, and the lists of
the three Triton kernels, forward and backward. Seconds are of the processor, of a process of its
own with one thread; memory is what its resident memory grows by at most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import peak
from ds_lvx.attention.layout import Layout
from ds_lvx.compare.document import save
from ds_lvx.compare.machine import header
from ds_lvx.distributed.channel import Channel
from ds_lvx.kernels import triton_tiles
from ds_lvx.kernels.device import HOPPER
from ds_lvx.kernels.rule import Rule
from ds_lvx.models.cuts import split
from ds_lvx.models.runs import Runs
from ds_lvx.models.text import Text

TEXT, RANKS = 4096, 8
FRAMES, TILES, PATCHES = 234, 4, 1601  # of Llama-3.2-Vision: 1,498,536 visual tokens
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MIB = 2**20


class _Eighth(Channel):
    """The last of eight ranks, of which there is no other."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rank, self.size = RANKS - 1, RANKS


def batch() -> tuple[Text, Runs, torch.Tensor]:
    """Text with its frames at even distances, and which tiles of each frame are no padding."""
    ids = torch.ones(1, TEXT, dtype=torch.long)
    at = torch.arange(FRAMES) * (TEXT // FRAMES) + 8
    ids[0, at] = 0
    seen = (ids == 0).cumsum(dim=1)
    runs = Runs.of_visible_images(torch.stack([torch.zeros_like(seen), seen], dim=-1))
    tiles = torch.arange(TILES) < torch.arange(FRAMES)[:, None] % TILES + 1
    return Text(ids, None, None, None), runs, tiles[None]


def make(given: tuple[Text, Runs, torch.Tensor]) -> int:
    """Everything that a batch settles for the layers of one rank; how many blocks there are."""
    text, runs, tiles = given
    channel, cpu = _Eighth(), torch.device("cpu")
    lengths = split(TEXT, RANKS)
    keys = tuple(frames * TILES * PATCHES for frames in split(FRAMES, RANKS))
    rule = runs.visibility(tiles, patches=PATCHES, blind_see_all=True)
    of_text = Layout.of_batch(channel, lengths, lengths, text.visibility(), device=cpu)
    cross = Layout.of_batch(channel, lengths, keys, rule, device=cpu)
    blocks = 0
    for part in (cross.rule(queries=None, keys=channel.rank), of_text.arrival(1).rule):
        assert part is not None
        blocks += _ask(part)
    return blocks


def _ask(part: Rule) -> int:
    seqlen_q, seqlen_kv = part.shape
    q = torch.empty(1, seqlen_q, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, seqlen_kv, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    group = HEADS // KV_HEADS
    for choose_tiles, of_keys in (
        (triton_tiles.forward_tiles, False),
        (triton_tiles.queries_tiles, False),
        (triton_tiles.keys_tiles, True),
    ):
        tiles = choose_tiles(q, k, HOPPER)
        part.lists(rows=tiles.rows, keys=tiles.keys, group=group, of_keys=of_keys)
    return len(part.blocks(queries_per_block=seqlen_q, keys_per_block=4096))


def measure(repeats: int) -> dict[str, Any]:
    """Samples of this process."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    given, meter = batch(), peak.meter("cpu")
    seconds, grown = [], []
    for _ in range(repeats + 2):
        meter.reset()
        before, begin = meter.now_bytes(), time.process_time()
        blocks = make(given)
        seconds.append(time.process_time() - begin)
        grown.append(meter.peak_bytes() - before)
    return {"processor_s": seconds[2:], "peak_bytes": grown[2:], "blocks": blocks}


def main() -> None:
    """Measure in a fresh process, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--document", type=Path, help="the JSON to write")
    parser.add_argument("--repeats", type=int, default=20, help="after two that do not count")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.repeats)))
        return
    command = [sys.executable, __file__, "--here", "--repeats", str(options.repeats)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ, **peak.PROMPT_FREEING}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    shape = {"text": TEXT, "visual_tokens": FRAMES * TILES * PATCHES, "ranks": RANKS}
    shape |= {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "cores": 1}
    record = {**header(device="cpu"), "shape": shape, **found}
    print(
        f"{shape['text']:,} tokens, {shape['visual_tokens']:,} visual tokens: "
        f"{1e3 * statistics.median(found['processor_s']):.1f} ms of one core (median), "
        f"{max(found['peak_bytes']) / MIB:.1f} MiB at most"
    )
    if options.document is not None:
        save(record, options.document)


if __name__ == "__main__":
    main()
