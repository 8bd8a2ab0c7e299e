"""`ds_lvx.accelerate.Accelerator` in a loop that was written for accelerate's."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import accelerate
import deepspeed
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import DynamicCache, MllamaForConditionalGeneration

from ds_lvx.accelerate import Accelerator
from tests.models.mllama_case import tiny_model, trained, weights
from tests.ranks import ROOT, run_ranks
from tests.test_trainer import assert_same, config_of, forget_state, samples


def loop(kind: type[Any], tiny: Path, *, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """One epoch, two batches a step, then the logits of one batch."""
    forget_state()
    plugin = None
    if config is not None:
        deepspeed.init_distributed("gloo")  # accelerate does not where torch.distributed runs
        plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(config))
    PartialState(cpu=True)  # ``cpu=True`` of an Accelerator would leave DeepSpeed out
    accelerator = kind(gradient_accumulation_steps=2, deepspeed_plugin=plugin)
    plain = MllamaForConditionalGeneration.from_pretrained(tiny)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(samples(), batch_size=1)
    model, optimizer, loader, scheduler = accelerator.prepare(plain, optimizer, loader, scheduler)
    losses, rates = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates += scheduler.get_last_lr()
        losses.append(accelerator.gather_for_metrics(loss.detach()).mean().item())
    with torch.no_grad():
        logits = model(**batch).logits
    found = {
        "losses": losses,
        "rates": [*rates, accelerator.num_processes],
        "metrics": {"eval_size": logits.abs().mean().item()},
        "counted": accelerator.reduce(torch.ones(())).item(),
        "objects": accelerator.gather_for_metrics(["one"]),
        "tokens": plain.generate(**batch, max_new_tokens=2).tolist(),
        "weights": (
            {name: p.detach().clone() for name, p in trained(plain)}
            if config is None
            else weights(model)
        ),
    }
    with accelerator.split_between_processes(["a", "b"]) as found["part"]:
        pass
    if config is not None:
        with pytest.raises(ValueError, match=r"got max_norm 0\.7 .* by the ds_config's .*, 0.5"):
            accelerator.clip_grad_norm_(model.parameters(), 0.7)
        with pytest.raises(NotImplementedError, match=r"call ds_lvx\.generate"):
            model(**batch, past_key_values=DynamicCache())
    accelerator.free_memory()
    forget_state()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_losses_weights_and_logits_are_those_of_one_process(stage: int, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    expected = loop(accelerate.Accelerator, tmp_path)
    config = config_of(stage, gradient_clipping=0.5, zero_allow_untested_optimizer=True)
    for found in run_ranks(loop, 2, Accelerator, tmp_path, config=config):
        assert_same(found, expected)
        assert found["counted"] == 1
        assert found["objects"] == ["one"]
        assert found["part"] == ["a", "b"]
        assert found["tokens"] == expected["tokens"]


class Names(dict[str, Any]):
    """Variables of a script that keep every loss."""

    def __init__(self, **names: Any) -> None:
        super().__init__(names)
        self.losses: list[float] = []

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "loss":
            self.losses.append(value.item())
        super().__setitem__(name, value)


def document(tiny: Path) -> list[float]:
    """The losses of the loop that the documents have."""
    forget_state()
    deepspeed.init_distributed("gloo")
    PartialState(cpu=True)
    [code] = re.findall(
        r"```python\n(from accelerate\.utils.*?)```", (ROOT / "docs/trainer.md").read_text(), re.S
    )
    model = MllamaForConditionalGeneration.from_pretrained(tiny)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(samples(), batch_size=2)
    names = Names(model=model, optimizer=optimizer, loader=loader)
    code = code.replace("ds_configs/mine.json", f"{tiny}/mine.json")
    exec(compile(code, "loop", "exec"), {}, names)
    forget_state()
    return names.losses


def plain(tiny: Path) -> list[float]:
    """The same losses without accelerate, in one process, clipped as accelerate does by default."""
    model = MllamaForConditionalGeneration.from_pretrained(tiny)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for batch in DataLoader(samples(), batch_size=2):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_the_loop_of_the_documents_trains_as_one_process(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = config_of(2, zero_allow_untested_optimizer=True, train_micro_batch_size_per_gpu=2)
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        del config[key]
    (tmp_path / "mine.json").write_text(json.dumps(config))
    expected = plain(tmp_path)
    assert len(set(expected)) == 3
    for losses in run_ranks(document, 2, tmp_path):
        assert losses == pytest.approx(expected, abs=1e-5)
