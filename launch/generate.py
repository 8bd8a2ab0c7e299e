#!/usr/bin/env python
"""Ask a model about images and videos, its visual keys sharded over ranks.

    deepspeed --num_gpus 4 launch/generate.py --model runs/mine/model \\
        --deepspeed_config ds_configs/finetune-zero2.json \\
        --video film.mp4 --fps 1 --prompt "What happens after the rabbit wakes up?"

`docs/generation.md` has more. Each rank decodes only the frames that it holds. The first writes the
answer as it comes, and with `--output` a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import TextStreamer
from transformers.utils import logging

import ds_lvx
from ds_lvx.config import read_ds_config
from ds_lvx.data.text import TextEncoder
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.slurm import read_slurm
from ds_lvx.distributed.start import init_distributed
from ds_lvx.training.asking import Options, Prompts, parse, question
from ds_lvx.training.model import Source, training_dtype
from ds_lvx.training.together import together


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code of this rank."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    logging.disable_progress_bar()
    read_slurm()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    init_distributed()
    world = Channel.world()
    try:
        answer_all(options, world)
    except (ValueError, NotImplementedError) as error:
        if options.traceback:
            raise
        print(f"\n[rank {world.rank}] error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        ds_lvx.shutdown()
    return 0


def answer_all(options: Options, world: Channel) -> None:
    """Answer what the options ask.

    Raises:
        ValueError: something that the user gave is wrong; on all ranks.
        NotImplementedError: a model or a combination that does not exist; on all ranks.
    """
    speaks = world.rank == 0
    source, encoder, dtype = together(world, lambda: read(options))
    torch.manual_seed(options.seed)
    device = get_accelerator().current_device_name()
    model = together(world, lambda: load(options, source, dtype).to(device))
    session = ds_lvx.apply(model, options.deepspeed_config)
    if session.groups.dp_size > 1:
        raise ValueError(
            f"got {world.size} ranks and ds_lvx.sequence_parallel_size {session.groups.sp_size}; "
            "expected as many: all ranks answer the same question"
        )
    prompts = Prompts(encoder, options.rate, owned=ds_lvx.owned, dtype=dtype)
    conversations = options.conversations()
    together(world, lambda: begin(options, speaks=speaks))
    while (asked := together(world, lambda: next(conversations, None))) is not None:
        batch = together(world, lambda asked=asked: prompts.batch([asked]).inputs)
        started = time.perf_counter()
        tokens = answer(model, batch, encoder.tokenizer, options, speaks=speaks)
        seconds = time.perf_counter() - started
        text = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        record = {
            "source": str(asked.source),
            "question": question(asked),
            "answer": text,
            "reference": options.reference(asked),
            "new_tokens": len(tokens),
            "seconds": seconds,
        }
        together(world, lambda record=record: write(options, record, speaks=speaks))
    session.close()


def read(options: Options) -> tuple[Source, TextEncoder, torch.dtype]:
    """Config and processor of the model, and the dtype to run it in."""
    dtype = training_dtype(read_ds_config(options.deepspeed_config))
    source = Source.of(options.model, trust_remote_code=options.trust_remote_code)
    if not source.family.has("generator"):
        raise source.family.lacks("generator", "launch/generate.py")
    source.check_tokenizer()
    length = source.max_length(options.max_length)
    encoder = TextEncoder(source.processor, length, family=source.family)
    return source, encoder, dtype


def begin(options: Options, *, speaks: bool) -> None:
    """An empty file for the answers."""
    if speaks and options.output is not None:
        Path(options.output).write_text("")


def load(options: Options, source: Source, dtype: torch.dtype) -> Any:
    """The model, with its adapter."""
    model = source.load(dtype)
    if options.adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, options.adapter)


def answer(
    model: Any, batch: Mapping[str, Any], tokenizer: Any, options: Options, *, speaks: bool
) -> list[int]:
    """The new tokens of one prompt, written to the terminal as they come."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    found = ds_lvx.generate(
        model,
        batch,
        frames="local",
        max_new_tokens=options.max_new_tokens,
        streamer=streamer if speaks else None,
        **sampling,
    )
    new: list[int] = found[0, batch["input_ids"].shape[1] :].tolist()
    return new


def write(options: Options, record: Mapping[str, Any], *, speaks: bool) -> None:
    """Add a line to the file of answers, on one rank."""
    if speaks and options.output is not None:
        with Path(options.output).open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
