"""Compare the methods on the ranks that a launcher has started: `ds-lvx compare` for a cluster.

    deepspeed --num_gpus 2 launch/compare.py --seqlen-q 256 --seqlen-kv 1M --output runs/compare
    deepspeed --hostfile hosts --no_ssh --node_rank 0 --master_addr ... launch/compare.py ...

Takes the options of `ds-lvx compare` that say what to measure and what to write; rank 0 reports.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from deepspeed.accelerator import get_accelerator

import ds_lvx
from ds_lvx.compare import command
from ds_lvx.compare.harness import Ranks
from ds_lvx.compare.network import Network
from ds_lvx.compare.operators import rank as operators
from ds_lvx.compare.operators import subject
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.start import init_distributed
from ds_lvx.distributed.together import together
from ds_lvx.plan.profile import ranks_of_this_node


def main() -> int:
    """Measure on all ranks; rank 0 shows the result. Exit status 1 where methods disagree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    command.add_measurement(parser)
    command.add_output(parser)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_args()
    init_distributed(verbose=False)
    try:
        return compare(options)
    except ValueError as error:
        if os.environ["RANK"] == "0":  # the same on all ranks
            print(f"compare.py: {error}", file=sys.stderr)
        return 2
    finally:
        ds_lvx.shutdown()


def compare(options: argparse.Namespace) -> int:
    """Measure what the options ask for; the exit status."""
    world = Channel.world()
    together(world, lambda: world.rank or command.check_places(options))
    command.settle_measurement(options)
    contest, skipped = command.contest_of(options, world.size)
    answers = world.agree(operators.measure(contest))
    network = Network.parse(os.environ["NETLAB"]) if os.environ.get("NETLAB") else None
    device, node = get_accelerator().device_name(), ranks_of_this_node() or world.size
    ranks = Ranks(world.size, torch.get_num_threads(), device, network)
    try:
        results = subject.assemble(contest, answers, ranks, skipped=skipped, ranks_of_a_node=node)
    except subject.DisagreementError as error:
        if world.rank == 0:
            print(f"compare.py: {error}", file=sys.stderr)
        return 1
    if world.rank == 0:
        command.show(results, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
