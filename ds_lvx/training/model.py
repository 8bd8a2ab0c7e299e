"""The model to train, its processor, and what of it trains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_lvx.config import zero_stage
from ds_lvx.models.contract import Family
from ds_lvx.models.precision import training_dtype
from ds_lvx.models.registry import FAMILIES
from ds_lvx.models.remote import read_config
from ds_lvx.training import quantized
from ds_lvx.training.lora import with_lora
from ds_lvx.training.options import Options

TINY = "tiny"
TINY_GATE = (
    0.5  # at 0, as checkpoints of the real size start, nothing visual has an effect at first
)


@dataclass(frozen=True)
class Source:
    """Where the model comes from.

    Attributes:
        name: folder or hub name of a checkpoint; ``tiny`` or ``tiny:TYPE``: random weights.
        family: of the model.
        config: of the model.
        processor: that belongs to it.
        trust_remote_code: code that comes with the checkpoint may run.
    """

    name: str
    family: Family
    config: Any
    processor: Any
    trust_remote_code: bool = False

    @classmethod
    def of(cls, name: str, *, trust_remote_code: bool = False) -> Source:
        """Read config and processor, not the weights.

        Raises:
            ValueError: there is no such checkpoint, or it is of a type that no family has.
        """
        tiny, _, wanted = name.partition(":")
        if tiny == TINY:
            family = _family(name, wanted or FAMILIES.default().model_type)
            return cls(name, family, *family.tiny())
        _refuse_adapter(name, only_local=True)
        with _readable(name):
            config = read_config(name, trust_remote_code=trust_remote_code)
        family = _family(name, config.model_type)
        with _readable(name):
            return cls(name, family, config, family.load_processor(name), trust_remote_code)

    @property
    def is_tiny(self) -> bool:
        """Whether the weights are random."""
        return self.name.partition(":")[0] == TINY

    def max_length(self, wanted: int | None) -> int:
        """Text tokens that a sample may have: the option, or all positions of the model.

        Raises:
            ValueError: the option asks for more than the model has.
        """
        positions = int(self.config.get_text_config().max_position_embeddings)
        if wanted is not None and wanted > positions:
            raise ValueError(
                f"--max_length: got {wanted}; expected at most {positions}, the positions of "
                f"{self.name}; lower it"
            )
        return positions if wanted is None else wanted

    def check_tokenizer(self) -> None:
        """Compare the tokenizer with the model.

        Raises:
            ValueError: it has tokens that the model has no output for, or another image token.
        """
        of_model = _image_tokens(self.config, getattr(self.config, "encoder", None))
        of_text = _image_tokens(self.processor, self.processor.tokenizer)
        if of_model and of_text.isdisjoint(of_model):
            raise ValueError(
                f"--model: got {self.name}, a {self.config.model_type!r} whose image token is "
                f"{min(of_model)}, and a {type(self.processor).__name__} whose image token is "
                f"{min(of_text)}; expected the processor of the same model: copy its files again"
            )
        text = self.config.get_text_config()
        outputs = int(text.vocab_size) + int(getattr(text, "additional_vocab_size", 0))
        tokens = self.processor.tokenizer.get_vocab()
        # The image token is read and never written, and may have no output.
        beyond = {
            number: token
            for token, number in tokens.items()
            if number >= outputs and number != self.processor.image_token_id
        }
        if beyond:
            first = min(beyond)
            raise ValueError(
                f"--model: got {self.name}, whose tokenizer has {len(beyond)} tokens more than the "
                f"model has outputs ({outputs}): {beyond[first]!r} is {first}; expected that of "
                "the checkpoint; copy its files again, or resize the model"
            )

    @property
    def is_packed(self) -> bool:
        """Whether the checkpoint's own weights are quantized."""
        return getattr(self.config, "quantization_config", None) is not None

    def load(self, dtype: torch.dtype, *, in_4bit: bool = False) -> Any:
        """The model.

        Args:
            dtype: of the weights, or of what is computed with those in 4 bits.
            in_4bit: quantize weights as they are read (`ds_lvx.training.quantized`).
        """
        more = quantized.words(self.family, dtype) if in_4bit else {}
        if self.is_tiny:
            model = self.family.build(self.config, gate=TINY_GATE, dtype=dtype)
            return quantized.read_again(model, dtype, more) if in_4bit else model
        with _readable(self.name):
            trusts = {"trust_remote_code": True} if self.trust_remote_code else {}
            model = self.family.load(self.name, dtype, **trusts, **more)
        quantized.settle(model, dtype)
        return model


def _image_tokens(*holders: Any) -> set[int]:
    """The ids that stand for images, by those who know some."""
    names = ("image_token_id", "image_token_index")
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return {each for each in found if isinstance(each, int)}


def _family(name: str, model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(
            f"--model: got {name}, a model of type {model_type!r}; expected one of type "
            f"{', '.join(map(repr, FAMILIES))}; take such a checkpoint: "
            f"{FAMILIES.advice(model_type)}"
        )
    return FAMILIES.named(model_type)


def _refuse_adapter(name: str, *, only_local: bool) -> None:
    from transformers.utils import find_adapter_config_file

    # Of a name on the hub the network is asked, which is left for names that cannot be read.
    if only_local and not Path(name).is_dir():
        return
    try:
        found = find_adapter_config_file(name)
        base = None if found is None else json.loads(Path(found).read_text())
    except (OSError, ValueError):  # no name of the hub, no network, no JSON
        return
    if base is not None:
        of = base.get("base_model_name_or_path") if isinstance(base, dict) else None
        raise ValueError(
            f"--model: got {name}, a LoRA adapter of {of}; expected a whole model; merge the two "
            f"first: ds-lvx merge --adapter {name} --output FOLDER"
        )


def load_model(options: Options, ds_config: Mapping[str, Any], source: Source) -> nn.Module:
    """The model, with what trains chosen; under ZeRO-3 no rank ever holds the whole of it, but for
    weights in 4 bits, which DeepSpeed takes apart later.

    Args:
        options: ``seed``, ``load_in_4bit``, ``lora_*``, ``freeze_vision``,
            ``gradient_checkpointing``.
        ds_config: the whole config: dtype and ZeRO stage count here.
        source: where the model comes from.

    Raises:
        ValueError: the checkpoint cannot be read, or LoRA is asked for where there is no module.

    Collectives: under ZeRO-3, broadcasts of the weights from rank 0, over all ranks.
    """
    dtype = training_dtype(ds_config)
    torch.manual_seed(options.seed)
    stage = 0 if options.load_in_4bit or source.is_packed else zero_stage(ds_config)
    with _partitioned(ds_config, stage):
        model = source.load(dtype, in_4bit=options.load_in_4bit)
    if options.freeze_vision:
        source.family.vision_tower(model).requires_grad_(False)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if options.lora_r == 0:
        return model
    return with_lora(model, options, source.family)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, in two groups: matrices decay, norms, biases and gates do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # A parameter that ZeRO-3 has taken apart keeps its shape in ds_shape.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = ((matrices, weight_decay), (others, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


@contextmanager
def _partitioned(ds_config: Mapping[str, Any], stage: int) -> Iterator[None]:
    """Under ZeRO-3, let transformers take each weight apart as soon as it is there."""
    if stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # Only what concerns the weights: DeepSpeed would check the batch sizes against a world in
    # which it knows of no sequence-parallel group.
    keys = [key for key in ("zero_optimization", "bf16", "fp16") if key in ds_config]
    config = {key: ds_config[key] for key in keys} | {"train_micro_batch_size_per_gpu": 1}
    # transformers holds only a weak reference: it must live as long as the loading.
    alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del alive


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError of a type that transformers has not
        _refuse_adapter(name, only_local=False)
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"--model: got {name!r}, a model whose code comes with the checkpoint; expected "
                "leave to run that code; read it, and pass --trust_remote_code"
            ) from error
        expected = (
            "a folder or the hub name of a checkpoint, or `tiny`; check the name, and the login "
            "for a gated one"
        )
        if Path(name).is_dir():
            expected = (
                "a whole checkpoint: config.json, weights, and the files of tokenizer and "
                "processor, as the model's repository has them; copy what is missing"
            )
        raise ValueError(
            f"--model: got {name!r}, which cannot be read ({error}); expected {expected}"
        ) from error
