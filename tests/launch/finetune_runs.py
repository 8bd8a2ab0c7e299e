"""Runs of `launch/finetune.py` on real ranks, and the same loss in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, get_scheduler

from ds_lvx.data.chat import read_conversations
from ds_lvx.data.frames import choose, decode, probe
from ds_lvx.data.images import load_image
from ds_lvx.data.order import SampleOrder
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.training.ending import SIGNALS

# Here, not in the script alone: what is imported before a run costs its collections nothing.
import ds_lvx.training.loop  # noqa: F401  isort: skip

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "launch" / "finetune.py"
Row = dict[str, float]


def finetune(*arguments: str) -> None:
    """The script's own main, on a rank of `tests.ranks`; what it finds wrong is raised."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert finetune_main([*arguments, "--traceback"]) == 0, "exit code"
    finally:  # the script ignores them from its end to that of its process, which goes on here
        for number, handler in before.items():
            signal.signal(number, handler)


def finetune_main(arguments: Sequence[str]) -> int:
    """The script's own main; its exit code."""
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    code: int = script.main(arguments)
    return code


def deepspeed(
    *words: str, script: Path = SCRIPT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script on two ranks of the `deepspeed` launcher, with variables of the environment."""
    command, environment = deepspeed_command(*words, script=script, **variables)
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def deepspeed_command(
    *words: str, script: Path = SCRIPT, **variables: str
) -> tuple[list[str], dict[str, str]]:
    """What `deepspeed` runs: the command and its environment."""
    launcher = Path(sys.executable).with_name("deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    # The launcher looks for its Python on the path.
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    port = str(29600 + os.getpid() % 300)
    command = [str(launcher), "--num_gpus", "2", "--master_port", port, str(script), *words]
    return command, environment


def write_config(
    path: Path,
    *,
    stage: int,
    sp_size: int = 2,
    micro: int = 1,
    accumulation: int = 1,
    cross: str = "lvx",
    **more: Any,
) -> str:
    """A ds_config with lvx and ulysses."""
    layers = [
        {"match": "*vision_model*", "method": "none"},
        {"match": "*.cross_attn", "method": cross, "recompute_kv": cross == "lvx"},
        {"match": "*language_model*.self_attn", "method": "ulysses"},
    ]
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
        # At stage 3 nothing stays gathered, as with a model that is too large for that.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "ds_lvx": {"sequence_parallel_size": sp_size, "layers": layers if sp_size > 1 else []},
        **more,
    }
    path.write_text(json.dumps(config))
    return str(path)


def metrics(folder: Path) -> tuple[list[Row], list[Row]]:
    """The rows of training and of evaluation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def one_process_samples(folder: Path, data: Path, *, frames: int) -> list[dict[str, Any]]:
    """Every line of a file as transformers' own processor makes it, mask and all.

    Args:
        folder: of the processor.
        data: JSONL file.
        frames: of a video.
    """
    processor = AutoProcessor.from_pretrained(folder)
    encoder = TextEncoder(processor, 10_000, family=FAMILIES.default())
    samples = []
    for conversation in read_conversations(data):
        images: list[list[Any]] = []
        for part in conversation.media:
            if part.kind == "image":
                images.append([load_image(part.value)])
            else:
                video = probe(part.value)
                images.append(list(decode(video, choose(video, count=frames))))
        text = encoder.encode(conversation, [len(group) for group in images])
        inputs = processor(
            text=processor.tokenizer.decode(text.input_ids),
            images=[image for group in images for image in group] or None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        assert inputs["input_ids"][0].tolist() == text.input_ids
        samples.append({**inputs, "labels": torch.tensor([text.labels])})
    return samples


def one_process_loss(model: Any, samples: Sequence[dict[str, Any]]) -> float:
    """The mean loss of all labelled tokens by transformers alone, one sample at a time."""
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            loss = model.eval()(**sample).loss
        labelled = int((sample["labels"][:, 1:] != -100).sum())
        total += float(loss) * labelled
        count += labelled
    return total / count


def one_process_answers(
    folder: Path, samples: Sequence[dict[str, Any]], *, tokens: int, adapter: Path | None = None
) -> list[str]:
    """What transformers alone generates in the place of the last answer of each sample."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    answers = []
    for sample in samples:
        labels = sample["labels"][0].tolist()
        end = max(place for place, label in enumerate(labels) if label != -100)
        while labels[end - 1] != -100:
            end -= 1
        given = {key: value for key, value in sample.items() if key != "labels"}
        for key in ("input_ids", "attention_mask", "cross_attention_mask"):
            given[key] = given[key][:, :end]
        out = model.generate(**given, max_new_tokens=tokens, do_sample=False)
        answers.append(tokenizer.decode(out[0, end:], skip_special_tokens=True))
    return answers


def one_process_training(
    model: Any, samples: Sequence[dict[str, Any]], *, steps: int, accumulation: int
) -> list[float]:
    """The losses of plain training by transformers and torch alone, seed 0, cosine from 1e-2."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    order = SampleOrder(len(samples), 0)
    losses = []
    for step in range(steps):
        places = range(step * accumulation, (step + 1) * accumulation)
        taken = [samples[order.sample(place)] for place in places]
        labelled = [int((sample["labels"][:, 1:] != -100).sum()) for sample in taken]
        sums = [model.train()(**s).loss * n for s, n in zip(taken, labelled, strict=True)]
        mean = torch.stack(sums).sum() / sum(labelled)
        mean.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(mean.detach()))
    return losses


def arguments(**options: Any) -> Sequence[str]:
    """Options as the command line has them; True is a flag, None and False are left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words
