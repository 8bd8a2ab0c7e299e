"""A tiny mllama, batches for it, and the same training in one process and on several ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

import ds_lvx
from ds_lvx.config import LVXConfig
from ds_lvx.distributed.groups import SequenceParallelGroups
from ds_lvx.initialize import initialize
from ds_lvx.models import patch_model
from ds_lvx.sharding import mean_loss, shard_batch
from ds_lvx.whole_batches import WholeBatches
from tests.ranks import DEVICE

IMAGE = 128  # the image token's id is the vocabulary's size
TILES = 2
PATCHES = 5
LEARNING_RATE = 0.05
VISION_RULE = {"match": "*vision_model*", "method": "none"}

Batch = dict[str, Tensor]


def further(first: int) -> Any:
    """For a test of several trainings: the first ones, and what else combines the same."""
    rest = pytest.param(slice(first, None), marks=pytest.mark.exhaustive)
    return pytest.mark.parametrize("which", [slice(first), rest], ids=["first", "further"])


FURTHER = further(1)


def tiny_model(**text: Any) -> MllamaForConditionalGeneration:
    """Four text layers, two of them cross-attention, gates open; the same weights every time."""
    vision_config = MllamaVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        max_num_tiles=TILES,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        intermediate_layers_indices=[0, 1],
        vision_output_dim=48,
    )
    settings: dict[str, Any] = {
        "vocab_size": IMAGE,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text_config = MllamaTextConfig(**{**settings, **text})
    config = MllamaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=IMAGE
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MllamaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            # Closed gates would make every gradient of K and V zero, and a test of them nothing.
            if name.endswith("gate") or "gate_" in name.rpartition(".")[2]:
                torch.nn.init.constant_(parameter, 0.5)
    return model


def lora_model(dropout: float = 0.0) -> Any:
    """`tiny_model` inside peft's wrapper."""
    return with_lora(tiny_model(), dropout)


def with_lora(model: Any, dropout: float = 0.0) -> Any:
    """A model inside peft's wrapper: only adapters of the attention layers train."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=2,
        lora_alpha=1,  # of the size of the weights beside it
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_dropout=dropout,
        init_lora_weights=False,  # B would start at 0, and the gradients of A with it
    )
    return get_peft_model(model, config)


def processor_mask(input_ids: Tensor, num_tiles: list[list[int]]) -> Tensor:
    """``cross_attention_mask`` as mllama's processor makes it."""
    sparse = [get_cross_attention_token_mask(row, IMAGE) for row in input_ids.tolist()]
    return torch.from_numpy(
        convert_sparse_cross_attention_mask_to_dense(
            sparse, num_tiles=num_tiles, max_num_tiles=TILES, length=input_ids.shape[1]
        )
    )


def make_batch(
    images_at: list[list[int]], *, length: int, num_tiles: list[list[int]], seed: int = 0
) -> Batch:
    """A batch as the processor returns it, with labels.

    Args:
        images_at: for each sample the positions of its image tokens.
        length: text tokens.
        num_tiles: for each sample the tiles of its images; the others are padding.
        seed: of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    samples, images = len(images_at), max(map(len, images_at))
    ids = torch.randint(1, IMAGE, (samples, length), generator=generator)
    ratio_ids = torch.zeros(samples, images, dtype=torch.long)
    ratio_mask = torch.zeros(samples, images, TILES, dtype=torch.long)
    ratio_mask[:, :, 0] = 1  # the processor's own way, for padding images too
    for sample, (places, tiles) in enumerate(zip(images_at, num_tiles, strict=True)):
        ids[sample, places] = IMAGE
        for image, count in enumerate(tiles):
            ratio_ids[sample, image] = count
            ratio_mask[sample, image, :count] = 1
    labels = ids.clone()
    labels[ids == IMAGE] = -100
    pixels = torch.randn(samples, images, TILES, 3, 28, 28, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask,
        "cross_attention_mask": processor_mask(ids, num_tiles),
    }


def hard_batch(seed: int = 0) -> Batch:
    """Everything at once: two samples with three images and one, text before the first image,
    padding tiles, a padding image, padded text, an uneven number of tokens."""
    batch = make_batch([[4, 5, 9], [3]], length=17, num_tiles=[[2, 1, 2], [1]], seed=seed)
    batch["attention_mask"][1, 13:] = 0
    batch["labels"][1, 13:] = -100
    return batch


def reference_inputs(batch: Batch) -> Batch:
    """The batch for transformers' own model."""
    return {key: value for key, value in batch.items() if key != "visible_images"}


def reference_steps(
    batches: list[list[Batch]], model: MllamaForConditionalGeneration | None = None
) -> dict[str, Any]:
    """Train transformers' own model in this process with plain SGD.

    Args:
        batches: for each step the batches of its replicas, whose gradients are averaged.
        model: the model; `tiny_model` if None.

    Returns:
        ``losses`` and ``logits`` of each step's replicas, ``grads`` of the first step by name,
        ``weights`` at the end by name.
    """
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    result: dict[str, Any] = {"losses": [], "logits": []}
    for step in batches:
        outs = [model(**reference_inputs(batch), use_cache=False) for batch in step]
        torch.stack([out.loss for out in outs]).mean().backward()
        result["losses"].append([out.loss.item() for out in outs])
        result["logits"].append([out.logits.detach() for out in outs])
        if "grads" not in result:
            result["grads"] = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in trained(model)
            }
        optimizer.step()
        optimizer.zero_grad()
    result["weights"] = {name: p.detach().clone() for name, p in trained(model)}
    return result


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that are not frozen, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def ds_config(*, stage: int, sp_size: int, cross: dict[str, Any], self_attn: Any) -> dict[str, Any]:
    """A ds_config for plain SGD; ``cross`` is the rule of the cross-attention layers, ``self_attn``
    the method or the rule of the text's."""
    text = self_attn if isinstance(self_attn, dict) else {"method": self_attn}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**6,
        # Small enough that parameters really are partitioned, buckets really are filled.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 4096,
            "allgather_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 4096,
            "stage3_param_persistence_threshold": 64,
            # Else DeepSpeed looks through all that is left of a step, for each of its modules.
            "stage3_max_reuse_distance": 0,
        },
        "ds_lvx": {
            "sequence_parallel_size": sp_size,
            "layers": [
                {**VISION_RULE},  # a test may write into it
                {"match": "*.cross_attn", **cross},
                {"match": "*language_model*.self_attn", **text},
            ],
        },
    }


def start_engine(
    config: dict[str, Any], model: Any = None, *, learning_rate: float = LEARNING_RATE
) -> Any:
    """An engine over a tiny model with plain SGD."""
    model = tiny_model() if model is None else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    return initialize(model=model, optimizer=optimizer, config=copy.deepcopy(config))[0]


def sharded_steps(
    config: dict[str, Any], batches: list[list[Batch]], *, frames: str = "all", model: Any = None
) -> dict[str, Any]:
    """`reference_steps` on the ranks of a job: run it on every rank.

    Returns:
        As `reference_steps`, but ``losses`` has one mean a step, and ``logits`` those of this
        rank's shard.
    """
    engine = start_engine(config, model)
    groups = engine.ds_lvx.groups
    result: dict[str, Any] = {"losses": [], "logits": [], "shards": []}
    for step in batches:
        shard = shard_batch(step[groups.dp_rank], model=engine.module, frames=frames)
        out = engine(**shard)
        engine.backward(out.loss)
        result["losses"].append(mean_loss(out.loss).item())
        result["logits"].append(out.logits.detach())
        result["shards"].append(in_order_of(shard))
        if "grads" not in result:
            result["grads"] = {
                name: safe_get_full_grad(p).clone() for name, p in trained(engine.module)
            }
        engine.step()
    result["weights"] = weights(engine)
    end_engine(engine)
    return result


def weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter that an engine trains, whole."""
    full = engine.zero_optimization_stage() == 3
    return {
        name: safe_get_full_fp32_param(p).clone() if full else p.detach().clone()
        for name, p in trained(engine.module)
    }


def end_engine(engine: Any) -> None:
    """What `ds_lvx.shutdown` does, except for ``torch.distributed`` itself."""
    engine.ds_lvx.close()
    engine.destroy()


def plain_step(
    config: dict[str, Any], batch: dict[str, Any], *, frames: str = "all", model: Any = None
) -> dict[str, Any]:
    """One forward and backward without an engine, in groups of their own: run it on every rank.

    Returns:
        ``losses``, ``logits`` of this rank's shard and ``grads``, summed over the group.
    """
    model = (tiny_model() if model is None else model).to(DEVICE)
    lvx_config = LVXConfig.from_ds_config(config)
    groups = SequenceParallelGroups(lvx_config.sequence_parallel_size)
    patch = patch_model(model, lvx_config, groups)
    shard = shard_batch(batch, model=model, frames=frames)
    out = model(**shard)
    out.loss.backward()
    grads = {
        name: groups.channel.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in model.named_parameters()
    }
    result = {
        "losses": [mean_loss(out.loss).item()],
        "logits": [out.logits.detach()],
        "shards": [in_order_of(shard)],
    }
    patch.unpatch()
    groups.close()
    return {
        **result,
        "grads": grads,
        "missing": [n for n, p in model.named_parameters() if p.grad is None],
    }


def whole_step(config: dict[str, Any], batch: dict[str, Any], *, make: Any) -> dict[str, Any]:
    """As a trainer does that makes its loss of the logits: whole batches, in groups of their own.

    Args:
        config: as of `plain_step`.
        make: what makes the model.
        batch: its labels are those of the decoder's own tokens.

    Returns:
        As `plain_step`; the logits, which are the same on all ranks, with the first.
    """
    groups = SequenceParallelGroups(LVXConfig.from_ds_config(config).sequence_parallel_size)
    model = make().to(DEVICE)
    session = ds_lvx.apply(model, config, groups=groups)
    hooks = WholeBatches(model, session, averages=False)
    hooks.gathers_training = True
    logits = model(**batch).logits
    labels = batch["labels"].flatten().to(logits.device)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
    loss.backward()
    grads = {
        name: groups.channel.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in model.named_parameters()
    }
    mine = logits.detach() if groups.sp_rank == 0 else logits.detach()[:, :0]
    hooks.remove()
    session.close()
    groups.close()
    return {"losses": [loss.item()], "logits": [mine], "grads": grads}


def in_order_of(shard: dict[str, Any]) -> Tensor | None:
    """Where the ranks' tokens, one rank after the other, belong; None: they are in order."""
    order: Tensor | None = shard["ds_lvx"].order
    return order


def assert_same_training(
    results: list[dict[str, Any]], reference: dict[str, Any], *, sp_size: int, atol: float = 1e-5
) -> None:
    """Compare `sharded_steps` of all ranks with `reference_steps`."""

    def close(actual: Any, expected: Any, what: str) -> None:
        torch.testing.assert_close(
            actual, expected, atol=atol, rtol=1e-5, msg=lambda text: f"{what}: {text}"
        )

    for rank, result in enumerate(results):
        for step, losses in enumerate(reference["losses"]):
            mean = sum(losses) / len(losses)
            close(torch.tensor(result["losses"][step]), torch.tensor(mean), f"loss {step}")
        for key in ("grads", "weights"):
            if key not in result:
                continue
            assert result[key].keys() == reference[key].keys()
            for name, expected in reference[key].items():
                close(result[key][name], expected, f"{key} of {name} on rank {rank}")
    for step, logits in enumerate(reference["logits"]):
        for replica, expected in enumerate(logits):
            ranks = results[replica * sp_size :][:sp_size]
            found = torch.cat([r["logits"][step] for r in ranks], dim=1)
            order = ranks[0]["shards"][step] if "shards" in ranks[0] else None
            if order is not None:  # what pads the batch is on no rank
                rows, there = torch.arange(len(order))[:, None], order >= 0
                found, expected = found[rows, order][there], expected[there]
            close(found, expected, f"logits of step {step}")
