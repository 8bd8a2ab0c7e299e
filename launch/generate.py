#!/usr/bin/env python
"""Ask a model about images and videos, its visual keys sharded over ranks.

    deepspeed --num_gpus 4 launch/generate.py --model runs/mine/model \\
        --deepspeed_config ds_configs/finetune-zero2.json \\
        --video film.mp4 --fps 1 --prompt "What happens after the rabbit wakes up?"

`docs/generation.md` has more. With `--chat` questions are typed, and the video is encoded for the
first of them. Each rank decodes only the frames that it holds. The first writes the answer as it
comes, and with `--output` a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import TextStreamer
from transformers.utils import logging

import ds_lvx
from ds_lvx.config import LVXConfig, read_ds_config
from ds_lvx.config.words import in_ranks
from ds_lvx.data.chat import Conversation
from ds_lvx.data.errors import print_any_name
from ds_lvx.data.extras import need
from ds_lvx.data.text import TextEncoder
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.slurm import read_slurm
from ds_lvx.distributed.start import init_distributed, take_device
from ds_lvx.distributed.together import together
from ds_lvx.models.generating.started import begins_with, has_encoder
from ds_lvx.models.precision import training_dtype
from ds_lvx.training import quantized
from ds_lvx.training.asking import Options, Prompts, parse, question, with_base
from ds_lvx.training.chatting import OPEN, Questions, conversation
from ds_lvx.training.model import Source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code of this rank."""
    print_any_name()
    options = parse(arguments)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    logging.disable_progress_bar()
    read_slurm()
    take_device()
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
    options = together(world, lambda: with_base(options))
    source, encoder, dtype = together(world, lambda: read(options, world.size))
    torch.manual_seed(options.seed)
    device = get_accelerator().current_device_name()
    model = together(world, lambda: load(options, source, dtype).to(device))
    session = ds_lvx.apply(model, options.deepspeed_config)
    groups = session.groups
    prompts = Prompts(
        encoder,
        options.rate,
        owned=ds_lvx.owned,
        dtype=dtype,
        deal=partial(source.family.owned, rank=groups.sp_rank, size=groups.sp_size),
    )
    prompts.shows = world.rank == 0
    asking = Asking(options, model, prompts, world)
    together(world, asking.begin)
    if options.chat:
        asking.chat(Questions(sys.stdin, world, options.prompt))
    else:
        asking.each(options.conversations())
    session.close()


class Asking:
    """What a run asks of its model.

    Args:
        options: of the run.
        model: patched.
        prompts: makes batches.
        world: all ranks.
    """

    def __init__(self, options: Options, model: Any, prompts: Prompts, world: Channel) -> None:
        self._options, self._model, self._prompts, self._world = options, model, prompts, world
        self._tokenizer = prompts.encoder.tokenizer
        self._speaks = world.rank == 0

    def begin(self) -> None:
        """An empty file for the answers."""
        if self._speaks and self._options.output is not None:
            Path(self._options.output).write_text("")

    def each(self, conversations: Iterator[Conversation]) -> None:
        """Answer one conversation after the other."""
        while (asked := together(self._world, lambda: next(conversations, None))) is not None:
            inputs = together(self._world, lambda asked=asked: self._prompts.batch([asked]).inputs)
            self._answer(asked, inputs, None)

    def chat(self, questions: Questions) -> None:
        """Answer questions about the same images and videos, which are encoded for the first; by a
        model with an encoder for each.

        What is wrong with a question, such as no room for it, is said, and it is taken back.
        """
        turns: list[tuple[str, str]] = []
        cache = None
        for said in questions:
            asked = conversation(self._options.media, [*turns, (said, OPEN)])
            try:
                inputs = together(
                    self._world,
                    lambda asked=asked, cache=cache: (
                        self._prompts.batch([asked]).inputs
                        if cache is None
                        else self._prompts.text(asked)
                    ),
                )
                text, cache = self._answer(asked, inputs, cache, goes_on=True)
            except ValueError as error:
                if not turns:  # the media are wrong, not the question
                    raise
                if self._speaks:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                continue
            turns.append((said, text))

    def _begin(
        self, asked: Conversation, inputs: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Any]:
        """A cache of as much of a prompt as further questions go on from, and what is asked beside
        it; where that is all of it, the batch as it is, and none."""
        if has_encoder(self._model):
            return inputs, None
        lasting = together(self._world, lambda: self._prompts.lasting(asked, inputs))
        if begins_with(lasting) == begins_with(inputs):
            return inputs, None
        cache = self._generate(lasting, None, silent=True, max_new_tokens=1).past_key_values
        return together(self._world, lambda: self._prompts.text(asked)), cache

    def _answer(
        self, asked: Conversation, inputs: Mapping[str, Any], cache: Any, *, goes_on: bool = False
    ) -> tuple[str, Any]:
        """The answer, written to the terminal as it comes and to the file; and its cache.

        Another question may go on from that, if ``goes_on``."""
        started = time.perf_counter()
        if goes_on and cache is None:
            inputs, cache = self._begin(asked, inputs)
        found = self._generate(inputs, cache)
        seconds = time.perf_counter() - started
        tokens = found.sequences[0, begins_with(inputs) :].tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        record = {
            "source": str(asked.source),
            "question": question(asked),
            "answer": text,
            "reference": self._options.reference(asked),
            "new_tokens": len(tokens),
            "seconds": seconds,
        }
        together(self._world, lambda: self._write(record))
        # What an encoder reads is the whole conversation, another one for every question.
        return text, None if has_encoder(self._model) else found.past_key_values

    def _generate(
        self, inputs: Mapping[str, Any], cache: Any, *, silent: bool = False, **words: Any
    ) -> Any:
        options, streamer = self._options, None
        if self._speaks and not silent:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:
            sampling = {"do_sample": True, "temperature": options.temperature}
        return ds_lvx.generate(
            self._model,
            inputs,
            frames="local",
            text_keys=options.text_keys,
            streamer=streamer,
            past_key_values=cache,
            return_dict_in_generate=True,
            **{"max_new_tokens": options.max_new_tokens, **words},
            **sampling,
            **self._prompts.ending(self._model),
        )

    def _write(self, record: Mapping[str, Any]) -> None:
        """Add a line to the file of answers, on one rank."""
        if self._speaks and self._options.output is not None:
            with Path(self._options.output).open("a") as file:
                file.write(json.dumps(record) + "\n")


def read(options: Options, ranks: int) -> tuple[Source, TextEncoder, torch.dtype]:
    """Config and processor of the model, and the dtype to run it in. What is wrong with the first
    question is found here: to load the model takes long."""
    size = LVXConfig.from_ds_config(options.deepspeed_config).sequence_parallel_size
    if size != ranks:
        raise ValueError(
            f"got {in_ranks(ranks)} and ds_lvx.sequence_parallel_size {size}; expected as many: "
            "all ranks answer the same question"
        )
    dtype = training_dtype(read_ds_config(options.deepspeed_config))
    if options.adapter is not None:
        need("peft", "lora", why="--adapter")
    source = Source.of(options.model, trust_remote_code=options.trust_remote_code)
    quantized.check(options, source.config)
    if not source.family.has("generator"):
        raise source.family.lacks("generator", "launch/generate.py")
    source.check_tokenizer()
    length = source.max_length(options.max_length)
    encoder = TextEncoder(source.processor, length, family=source.family)
    if (first := next(options.conversations(), None)) is not None:
        Prompts(encoder, options.rate, owned=range).sample(first)
    return source, encoder, dtype


def load(options: Options, source: Source, dtype: torch.dtype) -> Any:
    """The model, with its adapter."""
    model = source.load(dtype, in_4bit=options.load_in_4bit)
    if options.adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, options.adapter)


if __name__ == "__main__":
    sys.exit(main())
