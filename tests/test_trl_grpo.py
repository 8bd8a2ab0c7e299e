"""TRL's trainers that generate as they train, GRPO and RLOO, sharded as they are alone."""

from __future__ import annotations

import copy
import io
import random
import re
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from ds_lvx.models import FAMILIES
from ds_lvx.models.concatenated import prefixes
from ds_lvx.trainer import TrainerMixin
from tests.models.concatenated_case import rules
from tests.models.mllama_case import trained, weights
from tests.ranks import run_ranks
from tests.test_trainer import Recorder, assert_same, config_of, forget_state
from tests.test_trl_families import qwen

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


# Tokens that stand for an image or a video, which ours never generates.
MEDIA = [
    FAMILIES.named("qwen2_5_vl").tiny()[0].image_token_id,
    FAMILIES.named("qwen2_5_vl").tiny()[0].video_token_id,
]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "num_iterations": 2,
    "max_completion_length": 6,
    "generation_kwargs": {"suppress_tokens": MEDIA},
    "beta": 0.1,
    "max_steps": 4,
    "learning_rate": 0.05,
    "max_grad_norm": 0.5,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "bf16": False,
    "dataloader_pin_memory": False,
}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
SYNCHRONIZED = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
TIMES = ("time", "runtime", "second")


class GRPO(TrainerMixin, trl.GRPOTrainer):
    """All that a script changes."""


class RLOO(TrainerMixin, trl.RLOOTrainer):
    """Likewise."""


ALONE = {GRPO: trl.GRPOTrainer, RLOO: trl.RLOOTrainer}


def by_letters(
    completions: Sequence[Any], log_extra: Any, log_metric: Any, **_: Any
) -> list[float]:
    """Differs between the completions of a prompt; takes random numbers, of one rank alone."""
    found = [float(sum(map(ord, each[0]["content"])) % 97) for each in completions]
    torch.rand(1)
    log_extra("letters", [len(each[0]["content"]) for each in completions])
    log_metric("largest", max(found))
    return found


async def late(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """What TRL waits for, with a completion that has no reward."""
    return [None, *(float(n) for n in range(1, len(completions)))]


def rows() -> Any:
    """Prompts of unequal length with one or two images."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Which colour?" + "?" * n}],
                "images": [
                    Image.new("RGB", (28, 28), (80 * n, 60 * i, 90)) for i in range(1 + n % 2)
                ],
            }
            for n in range(4)
        ]
    )


def reinforce(
    kind: type[Any],
    folder: Path,
    tiny: Path,
    config: dict[str, Any] | None = None,
    *,
    lora: bool = False,
    rewards: Any = (by_letters, late),
    **settings: Any,
) -> dict[str, Any]:
    """TRL's usual script; what was logged, and the weights."""
    forget_state()
    if config is not None:
        deepspeed.init_distributed("gloo")
    own = trl.RLOOConfig if issubclass(kind, trl.RLOOTrainer) else trl.GRPOConfig
    args = own(
        str(folder),
        use_cpu=True,
        deepspeed=copy.deepcopy(config),
        **{**SETTINGS, **settings},
    )
    made, record = qwen(tiny), Recorder()
    made["processing_class"].tokenizer.padding_side = "left"
    trainer = kind(
        model=made["model"],
        processing_class=made["processing_class"],
        args=args,
        reward_funcs=list(rewards),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[record],
        peft_config=lora_config() if lora else None,
    )
    trainer.train()
    logs = [log for log in record.logs if "loss" in log]
    found = {
        "losses": [log["loss"] for log in logs],
        "rates": [log["learning_rate"] for log in logs],
        "logged": [
            {key: value or 0.0 for key, value in log.items() if key.split("_")[-1] not in TIMES}
            for log in record.logs
        ],
        "metrics": {},
        "weights": (
            {name: p.detach().clone() for name, p in trained(trainer.model)}
            if config is None
            else weights(trainer.model_wrapped)
        ),
    }
    if isinstance(trainer, TrainerMixin):
        trainer.accelerator.free_memory()
    forget_state()
    return found


def asked_once(folder: Path, tiny: Path, config: dict[str, Any]) -> dict[str, Any]:
    """How often a rank of two asks for rewards, how many images it encodes to generate, and what
    random numbers it has afterwards."""
    calls, images = [], []

    def count(completions: Sequence[Any], **_: Any) -> list[float]:
        calls.append(len(completions))
        torch.rand(1), random.random(), np.random.rand()
        return [float(n) for n in range(len(completions))]

    class Counted(GRPO):
        def _generate_single_turn(self, *args: Any) -> Any:
            images.append(len(args[2]["image_grid_thw"]))
            return super()._generate_single_turn(*args)

    settings = {"num_generations": 4, "num_iterations": 1, "max_steps": 1}
    reinforce(Counted, folder, tiny, config, rewards=[count], **settings)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    return {"calls": calls, "images": images, "drawn": drawn}


def test_functions_are_asked_once_and_images_encoded_once(tiny: Path, tmp_path: Path) -> None:
    first, second = run_ranks(asked_once, 2, tmp_path, tiny, sharded(2))
    assert first["calls"] == [4]
    assert second["calls"] == []
    assert first["images"] == second["images"]
    assert first["images"][0] in (1, 2)  # those of one prompt, of which there are four completions
    assert first["drawn"] == second["drawn"]


def broken(completions: Sequence[Any], **_: Any) -> list[float]:
    raise KeyError("no such reward")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_generations": 8}, "ValueError: got per_device_train_batch_size x .* = 4; expected a"),
    ({"use_vllm": True}, "NotImplementedError: got use_vllm in the training arguments"),
    ({"rewards": [broken]}, "RuntimeError: rank 0: a reward failed: KeyError: 'no such reward'"),
]


def refused(folder: Path, tiny: Path, config: dict[str, Any]) -> list[str]:
    """What ranks say of settings that do not go together, and of a function that fails."""
    said = []
    for settings, _ in REFUSED:
        with pytest.raises(Exception) as caught:
            reinforce(GRPO, folder, tiny, config, **settings)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
        forget_state()
    return said


def test_what_is_refused(tiny: Path, tmp_path: Path) -> None:
    for said in run_ranks(refused, 2, tmp_path, tiny, sharded(2)):
        for message, (_, expected) in zip(said, REFUSED, strict=True):
            assert re.match(expected, message), message


def test_no_rank_enters_a_reward_model_where_another_has_failed() -> None:
    """At ZeRO-3 it would wait there for the other."""
    entered, asked = [], []

    class Model(torch.nn.Module):
        def forward(self) -> None:
            entered.append(True)

    class Asking(trl.GRPOTrainer):
        def _calculate_rewards(self) -> None:
            for reward in self.reward_funcs:
                reward()

    class Online(TrainerMixin, Asking):
        pass

    def agree(error: Exception | None) -> None:
        asked.append(error)
        raise RuntimeError("rank 0: a reward failed")

    trainer = object.__new__(Online)
    trainer.reward_funcs = [Model()]
    trainer.accelerator = SimpleNamespace(
        is_first_of_replica=False,
        agree_on_failure=agree,
        gather=len,
        gather_object=len,
        indexing_replicas=nullcontext,
    )
    with pytest.raises(RuntimeError, match="rank 0"):
        trainer._calculate_rewards()
    assert (entered, asked) == ([], [None])


class Moving:
    """A trainer that moves what it gets to a device."""

    def _prepare_input(self, data: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(data, "moved")


class Moved(TrainerMixin, Moving):
    """With the mixin."""


def test_what_a_reward_model_gets_is_moved_whatever_its_names() -> None:
    """``token_type_ids`` of BERT are no visual key of Gemma 3, whose stay on the CPU."""
    trainer = object.__new__(Moved)
    family = FAMILIES.named("gemma3")
    with torch.device("meta"):
        trainer.model = family.build(family.tiny()[0], gate=0.5, dtype=torch.float32)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.float32))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    batch = {"input_ids": 1, "token_type_ids": 2}
    assert trainer._prepare_input(batch) == {"input_ids": "moved", "token_type_ids": 2}
    trainer._asks_for_rewards = True
    assert trainer._prepare_input(batch) == {"input_ids": "moved", "token_type_ids": "moved"}


def test_completions_that_tools_answer_are_prompts_of_their_own() -> None:
    trainer = object.__new__(GRPO)
    trainer.model, trainer.num_generations = SimpleNamespace(training=True), 2
    trainer.generation_config = SimpleNamespace(do_sample=True)
    assert trainer._copies_of(["a", "a", "b", "b"]) == 2
    trainer.tools = [by_letters]
    assert trainer._copies_of(["a", "a", "b", "b"]) == 1


class Other:
    """A trainer whose methods have the same names."""

    def _tokenize_prompts(self, prompts: list[str]) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def _calculate_rewards(self, prompts: list[str], *, scale: int) -> list[int]:
        return [scale * len(prompt) for prompt in prompts]


class Mixed(TrainerMixin, Other):
    """With the mixin."""


def test_other_trainers_keep_what_they_do() -> None:
    trainer = object.__new__(Mixed)
    assert trainer._tokenize_prompts(["a", "a"]) == [1, 1]
    assert trainer._calculate_rewards(["a"], scale=2) == [2]
    trainer.args, trainer.accelerator = (
        SimpleNamespace(steps_per_generation=1),
        SimpleNamespace(sp_size=2),
    )
    with pytest.raises(NotImplementedError, match="got Mixed, a trainer that shuffles"):
        trainer._check_online()


def lora_config() -> Any:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def assert_same_rollouts(
    found: dict[str, Any], alone: dict[str, Any], *, but: Sequence[str] = ()
) -> None:
    assert_same(found, alone)
    for got, expected in zip(found["logged"], alone["logged"], strict=True):
        wanted = {key: value for key, value in expected.items() if key.split("_")[-1] not in but}
        assert {key: got[key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    family = FAMILIES.named("qwen2_5_vl")
    torch.manual_seed(0)
    model = family.build(family.tiny()[0], gate=0.5, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def sharded(stage: int, *, method: str = "ring", **more: Any) -> dict[str, Any]:
    return {**config_of(stage), "ds_lvx": rules("qwen2_5_vl", method, 2)["ds_lvx"] | more}


@pytest.mark.parametrize(
    ("online", "stage", "settings"),
    [
        pytest.param(GRPO, 2, EVALUATING, marks=pytest.mark.exhaustive),
        pytest.param(GRPO, 3, {}, marks=pytest.mark.exhaustive),
        pytest.param(GRPO, 2, {"lora": True}, marks=pytest.mark.exhaustive),
        pytest.param(GRPO, 3, {"lora": True}, marks=pytest.mark.exhaustive),
        pytest.param(GRPO, 3, SYNCHRONIZED, marks=pytest.mark.exhaustive),
        pytest.param(RLOO, 2, {}, marks=pytest.mark.exhaustive),
    ],
)
def test_on_two_ranks_has_the_losses_of_one_process(
    online: type[Any], stage: int, settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    alone = reinforce(ALONE[online], tmp_path / "alone", tiny, **settings)
    for found in run_ranks(reinforce, 2, online, tmp_path, tiny, sharded(stage), **settings):
        assert_same_rollouts(found, alone)


def sharing(*given: Any, **settings: Any) -> dict[str, Any]:
    """`reinforce`, how many rows became one in each forward, and what was printed."""
    rows: list[int] = []
    printed = io.StringIO()
    share = prefixes.share

    def counted(text: Any, *more: Any) -> Any:
        made = share(text, *more)
        rows.append(len(text.input_ids) - len(made.input_ids))
        return made

    with pytest.MonkeyPatch.context() as patched, redirect_stdout(printed):
        patched.setattr("ds_lvx.models.concatenated.family.share", counted)
        found = reinforce(*given, **settings)
    return {**found, "rows": rows, "printed": printed.getvalue()}


@pytest.mark.parametrize(
    ("online", "stage", "settings"),
    [
        (GRPO, 2, EVALUATING),
        pytest.param(GRPO, 3, SYNCHRONIZED, marks=pytest.mark.exhaustive),
        pytest.param(GRPO, 2, {"lora": True}, marks=pytest.mark.exhaustive),
        pytest.param(RLOO, 2, {}, marks=pytest.mark.exhaustive),
    ],
)
def test_completions_that_share_their_prompt_learn_the_same(
    online: type[Any], stage: int, settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """They are in other micro-batches than TRL's, of which it logs extremes."""
    alone = reinforce(ALONE[online], tmp_path / "alone", tiny, **settings)
    config = sharded(stage, method="lvx", share_prefixes=True)
    results = run_ranks(sharing, 2, online, tmp_path, tiny, config, **settings)
    for found in results:
        assert_same_rollouts(found, alone, but=("min", "max"))
        assert set(found["rows"]) == {1}
    assert "share_prefixes: its 2 rows run as 1\n" in results[0]["printed"]


def test_two_replicas_of_two_ranks_have_those_of_two_processes(tiny: Path, tmp_path: Path) -> None:
    """The completions of a prompt are on both."""
    settings = {"num_generations": 4, "gradient_accumulation_steps": 1}
    plain = {key: value for key, value in config_of(2).items() if key != "ds_lvx"}
    apart = run_ranks(reinforce, 2, trl.GRPOTrainer, tmp_path / "plain", tiny, plain, **settings)
    for found in run_ranks(reinforce, 4, GRPO, tmp_path, tiny, sharded(2), **settings):
        assert_same_rollouts(found, apart[0])
