"""Every labelled token of a step weighs the same, and no sample changes another's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.data.media import chat, write_image, write_jsonl
from tests.launch.checkpoint_folder import write_checkpoint
from tests.launch.finetune_runs import (
    arguments,
    finetune,
    metrics,
    one_process_samples,
    write_config,
)
from tests.ranks import run_ranks

LEARNING_RATE = 0.05
# Not Adam, which makes steps of one size of gradients of any.
SGD = {"type": "SGD", "params": {"lr": LEARNING_RATE}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and four samples: a short and a long answer, and one without an image."""
    folder = tmp_path_factory.mktemp("loss")
    write_checkpoint(folder / "checkpoint")
    write_image(folder / "a.png", (100, 40))
    write_image(folder / "b.png", (40, 40), colour=255)
    long = "A butterfly sits on a stone, and a rabbit looks at it for a long while. " * 3
    write_jsonl(
        folder / "train.jsonl",
        chat(("image", "a.png"), ("text", "What?"), answer="It."),
        chat(("image", "a.png"), ("image", "b.png"), ("text", "And now?"), answer=long),
    )
    write_jsonl(
        folder / "mixed.jsonl",
        chat(("text", "What animal?"), answer="A big rabbit."),
        chat(("text", "Look:"), ("image", "a.png"), ("image", "b.png"), answer="In a meadow."),
    )
    write_jsonl(folder / "text.jsonl", chat(("text", "What animal?"), answer="A big rabbit."))
    return folder


def run(folder: Path, out: Path, data: str, *, ranks: int, **config: Any) -> list[float]:
    """One step of all samples; the losses of training and of evaluation."""
    words = arguments(
        model=folder / "checkpoint",
        data=folder / data,
        eval_data=folder / data,
        deepspeed_config=write_config(
            out.with_suffix(".json"), optimizer=SGD, zero_allow_untested_optimizer=True, **config
        ),
        output_dir=out,
        learning_rate=LEARNING_RATE,
        lr_scheduler="constant",
        epochs=1,
    )
    run_ranks(finetune, ranks, *words)
    training, evaluation = metrics(out)
    return [*(row["loss"] for row in training), *(row["eval_loss"] for row in evaluation)]


def reference(folder: Path, data: str) -> tuple[float, float, dict[str, Tensor]]:
    """The same step in one process, sample by sample: losses before and after, and weights."""
    samples = one_process_samples(folder / "checkpoint", folder / data, frames=1)
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    labelled = [int((sample["labels"][:, 1:] != -100).sum()) for sample in samples]
    assert max(labelled) > 20 * min(labelled) or data != "train.jsonl"

    def mean() -> Tensor:
        losses = [model(**s).loss * n for s, n in zip(samples, labelled, strict=True)]
        return torch.stack(losses).sum() / sum(labelled)

    before = mean()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return before.item(), mean().item(), model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        (2, {"stage": 2, "micro": 2}),
        (2, {"stage": 0, "accumulation": 2}),
        pytest.param(2, {"stage": 2, "sp_size": 1}, id="two replicas"),
        pytest.param(4, {"stage": 3}, id="two replicas of two", marks=pytest.mark.exhaustive),
    ],
)
def test_a_token_weighs_the_same_wherever_it_falls(
    folder: Path, tmp_path: Path, ranks: int, config: dict[str, Any]
) -> None:
    before, after, weights = reference(folder, "train.jsonl")
    found = run(folder, tmp_path / "out", "train.jsonl", ranks=ranks, **config)
    assert found == pytest.approx([before, after], abs=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0, msg=name)


def test_text_alone_has_the_loss_that_it_has_beside_images(folder: Path, tmp_path: Path) -> None:
    before, after, _ = reference(folder, "mixed.jsonl")
    together = run(folder, tmp_path / "out", "mixed.jsonl", ranks=2, stage=0, micro=2)
    assert together == pytest.approx([before, after], abs=1e-5)
