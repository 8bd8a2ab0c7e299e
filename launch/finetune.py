#!/usr/bin/env python
"""Fine-tune a model on your own images and videos, its visual tokens sharded over ranks.

    deepspeed --num_gpus 4 launch/finetune.py \\
        --model meta-llama/Llama-3.2-11B-Vision-Instruct --data train.jsonl \\
        --deepspeed_config ds_configs/mllama-zero3-lvx-ulysses.json --output_dir runs/mine

`docs/fine-tuning.md` has the format of the data, all options and a tutorial. Each rank decodes only
the frames that it holds; what one rank finds wrong in the data is an error on all of them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from transformers.utils import logging

import ds_lvx
from ds_lvx.data.errors import print_any_name
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.failures import RankOutOfMemoryError, named
from ds_lvx.distributed.notes import PeerError
from ds_lvx.distributed.slurm import read_slurm
from ds_lvx.distributed.start import init_distributed, remove_shared_memory, take_device
from ds_lvx.distributed.together import together
from ds_lvx.models.precision import share_in_4bit
from ds_lvx.training.batches import Batches
from ds_lvx.training.ending import EndAskedError
from ds_lvx.training.engine import make_engine
from ds_lvx.training.inputs import check_samples, read_inputs
from ds_lvx.training.lock import held
from ds_lvx.training.loop import Trainer
from ds_lvx.training.model import load_model
from ds_lvx.training.options import Options, parse

# What is said in a line; whatever else fails shows where.
REPORTED = (ValueError, NotImplementedError, RankOutOfMemoryError, PeerError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code of this rank."""
    print_any_name()
    options = parse(arguments)
    # torch 2.13 renamed collectives that DeepSpeed calls by their old names: a warning each.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    options.limits.tell_pil()
    logging.disable_progress_bar()  # of loading and saving: they would tear the training's apart
    read_slurm()
    # Before anything is put on a device: several ranks share a node.
    take_device()
    init_distributed()
    world = Channel.world()
    try:
        finetune(options, world)
    except EndAskedError as asked:
        return asked.exit_code
    except REPORTED:
        if options.traceback:
            raise
        return 1
    return 0


def finetune(options: Options, world: Channel) -> None:
    """Train, evaluate and save as the options say.

    Raises:
        ValueError: something that the user gave is wrong; on all ranks.
        NotImplementedError: a combination that does not exist; on all ranks.
        RankOutOfMemoryError: this rank has no more memory.
        PeerError: another rank has none.
        EndAskedError: a signal asked a rank to end; a checkpoint is written.
    """
    engine = None
    try:
        with named("finetune.py"), held(options.output_dir, world):
            inputs = together(world, lambda: read_inputs(options, world.size))
            remove_shared_memory()
            inputs = check_samples(inputs, options, world)
            # Data workers start while the model is loaded.
            with together(world, lambda: Batches(inputs, options, world)) as batches:
                model = load_model(options, inputs.ds_config, inputs.source)
                if world.rank == 0 and options.load_in_4bit:
                    share = share_in_4bit(model)
                    print(f"ds_lvx: {share:.0%} of the weights are in 4 bits", flush=True)
                engine = make_engine(model, inputs, options)
                del model  # the engine's alone, so that nothing of it outlives the shutdown
                Trainer(engine, inputs, options, batches=batches, world=world).run()
    except REPORTED as error:
        # Before the shutdown, in which the launcher may end this rank for the failure of another.
        print(f"\n[rank {world.rank}] error: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        ds_lvx.shutdown(engine)


if __name__ == "__main__":
    sys.exit(main())
