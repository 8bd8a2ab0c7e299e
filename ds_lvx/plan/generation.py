"""Generation with the visual keys sharded: tokens a second, time to the first one, memory.

docs/generation.md has the formulas. One sample of one row; the text runs whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_lvx.plan.cluster import Cluster, Device
from ds_lvx.plan.cost import cost
from ds_lvx.plan.memory import LAYER_BYTES, tower_bytes
from ds_lvx.plan.pieces import FP32_BYTES
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import products_s, vision_s
from ds_lvx.plan.transfers import Pass

_WAY = "lvx replicated"
_WITNESS_BYTES = 16  # in a token's first message: which one it is, and the token
# Of K in its norm, in fp32: two of what goes in, what is squared, and what comes out.
_NORM_TENSORS = 2
# Numbers that its operations read and write, and those of them that lie in new memory: squares and
# their mean, the product with its root, that with the weights.
_NORM_NUMBERS, _NORM_NEW = 7, 3


@dataclass(frozen=True)
class Held:
    """Bytes of the rank that holds most.

    Attributes:
        weights: of the whole model.
        keys: K and V of its visual tokens, in all cross-attention layers.
        text: K and V of prompt and answer.
        prompt: the most that the prompt's forward has beside the weights: in the vision tower, or
            where the last cross-attention layer makes its keys.
    """

    weights: int
    keys: int
    text: int
    prompt: int

    @property
    def kept(self) -> int:
        """Between two tokens, beside the weights."""
        return self.keys + self.text

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return self.weights + max(self.prompt, self.kept)


@dataclass(frozen=True)
class Generation:
    """One answer, as ``ranks`` ranks generate it together.

    Attributes:
        ranks: that share the sample.
        token: seconds of a token by part.
        prompt: seconds until the first token by part.
        new_tokens: of the answer.
        bytes_sent: by a rank for a token.
        held: memory.
        fits: it suffices.
    """

    ranks: int
    token: dict[str, float]
    prompt: dict[str, float]
    new_tokens: int
    bytes_sent: float
    held: Held
    fits: bool

    @property
    def token_s(self) -> float:
        """From one token to the next."""
        return sum(self.token.values())

    @property
    def tokens_per_s(self) -> float:
        """While decoding."""
        return 1 / self.token_s

    @property
    def prompt_s(self) -> float:
        """Until the first token."""
        return sum(self.prompt.values())

    @property
    def seconds(self) -> float:
        """Of the whole answer."""
        return self.prompt_s + (self.new_tokens - 1) * self.token_s


def generations(
    scenario: Scenario, cluster: Cluster, *, new_tokens: int, group: int | None = None
) -> list[Generation]:
    """Predict all groups that divide the GPUs, or one; small ones first.

    Raises:
        ValueError: ``group`` does not divide the GPUs, or ``new_tokens`` is below 1.
        NotImplementedError: a model whose visual keys are not sharded in generation.
    """
    if new_tokens < 1:
        raise ValueError(f"generate: got {new_tokens} new tokens; expected at least 1")
    divisors = [each for each in range(1, cluster.gpus + 1) if cluster.gpus % each == 0]
    if group is not None and group not in divisors:
        raise ValueError(f"group: got {group} for {cluster.gpus} GPUs; expected one of {divisors}")
    return [
        generation(scenario, cluster, ranks=ranks, new_tokens=new_tokens)
        for ranks in (divisors if group is None else [group])
    ]


def best(found: Sequence[Generation]) -> Generation | None:
    """The one with the most tokens a second that fits; None where none does."""
    fitting = [each for each in found if each.fits]
    return max(fitting, key=lambda each: each.tokens_per_s) if fitting else None


def generation(scenario: Scenario, cluster: Cluster, *, ranks: int, new_tokens: int) -> Generation:
    """Predict one group.

    Raises:
        NotImplementedError: a model whose visual keys are not sharded in generation.
    """
    if scenario.model.among or scenario.model.rows is not None:
        raise NotImplementedError(
            f"generate: got {scenario.model.name}, whose visual tokens stand among the text's or "
            "have an encoder of their own; expected a model with cross-attention to visual "
            "features, whose keys ds_lvx.generate shards"
        )
    layers, device = scenario.model.cross.count, cluster.device
    if device.cross_layer_s is not None:  # what a call takes is in it
        cluster = replace(cluster, device=replace(device, call_s=0.0))
    of_token = _cross(scenario, cluster, ranks=ranks, queries=1)
    of_prompt = _cross(scenario, cluster, ranks=ranks, queries=scenario.text_tokens)
    memory = held(scenario, ranks=ranks, new_tokens=new_tokens)
    return Generation(
        ranks=ranks,
        token=_token(scenario, cluster, of_token, new_tokens),
        prompt=_prompt(scenario, cluster, of_prompt, ranks=ranks),
        new_tokens=new_tokens,
        bytes_sent=layers * of_token.bytes_sent + (ranks - 1) * _WITNESS_BYTES,
        held=memory,
        fits=memory.peak <= cluster.device.limit_bytes,
    )


# --------------------------------------------------------------------------------------------
# Seconds


def _cross(scenario: Scenario, cluster: Cluster, *, ranks: int, queries: int) -> Pass:
    """One cross-attention layer on so many queries, the same on every rank; one projects nothing,
    because K and V are there."""
    shape = replace(
        scenario.cross_shape(ranks, _WAY),
        q_lengths=(queries,) * ranks,
        recompute=False,
        backward=False,
    )
    if queries == 1:
        shape = replace(shape, features_dim=0)
    return cost(shape, cluster, _WAY).forward


def _token(scenario: Scenario, cluster: Cluster, layer: Pass, new_tokens: int) -> dict[str, float]:
    device, count = cluster.device, scenario.model.cross.count
    rate = device.weights_bytes_per_s or device.stream_bytes_per_s
    # Half of the answer is there, on average.
    text = scenario.text_tokens + new_tokens // 2
    read = scenario.element_bytes * sum(_decoder_parameters(scenario))
    read += text * _text_token_bytes(scenario)
    other_s = layer.other_s if device.cross_layer_s is None else 0.0  # the host's, where measured
    parts = {
        "weights and text": read / rate,
        "visual keys": count * (layer.kernel_s + other_s),
        "network": count * layer.exposed_s,
    }
    return {**parts, "host": _host_s(scenario, cluster, hiding_s=sum(parts.values()))}


def _prompt(scenario: Scenario, cluster: Cluster, layer: Pass, *, ranks: int) -> dict[str, float]:
    device, count, tokens = cluster.device, scenario.model.cross.count, scenario.text_tokens
    of_layers, of_head = _decoder_parameters(scenario)
    text = products_s(device, of_layers, tokens) + products_s(device, of_head, 1)
    attention = cost(replace(scenario.text_shape(1), backward=False), cluster, "none").forward
    text += scenario.model.text.count * attention.seconds
    parts = {
        "vision": vision_s(scenario, device, ranks, backward=False)
        + _written_s(device, _features_bytes(scenario, ranks), copies=2),
        "projection of K and V": count * (layer.projection_s + _keys_s(scenario, device, ranks)),
        "visual keys": count * (layer.kernel_s + layer.other_s),
        "network": count * layer.exposed_s,
        "text": text,
    }
    host_s = device.begin_s + _host_s(scenario, cluster, hiding_s=sum(parts.values()))
    return {**parts, "host": host_s}


def _written_s(device: Device, nbytes: float, *, copies: int = 1) -> float:
    """So many bytes into new memory, in each of some copies."""
    return copies * nbytes * (1 / device.stream_bytes_per_s + device.new_byte_s)


def _keys_s(scenario: Scenario, device: Device, ranks: int) -> float:
    """Of a layer, what K and V take beside their products: new memory, and K's norm in fp32."""
    cross = scenario.model.cross
    tokens = scenario.frames_of_a_rank(ranks) * scenario.model.frame_tokens
    numbers = tokens * cross.kv_heads * cross.head_dim
    written = _written_s(device, 2 * numbers * scenario.element_bytes)
    norm_s = _NORM_NUMBERS / device.stream_bytes_per_s + _NORM_NEW * device.new_byte_s
    return written + numbers * FP32_BYTES * norm_s


def _features_bytes(scenario: Scenario, ranks: int) -> int:
    """Of a rank's features."""
    model = scenario.model
    tokens = scenario.frames_of_a_rank(ranks) * model.frame_tokens
    return scenario.element_bytes * tokens * (model.cross.features_dim or model.cross.hidden)


def _host_s(scenario: Scenario, cluster: Cluster, *, hiding_s: float) -> float:
    """What the host takes for a forward, as far as a GPU does not work meanwhile."""
    device, model = cluster.device, scenario.model
    # Cross-attention without an MLP is a part of the text's layers.
    layers = model.text.count + (model.cross.count if model.cross.mlp else 0)
    seconds = device.token_s + layers * device.layer_s
    if device.cross_layer_s is not None:
        layers_s = model.text.count * device.layer_s + model.cross.count * device.cross_layer_s
        seconds = device.token_s + layers_s
    return seconds if device.on_cpu else max(seconds - hiding_s, 0.0)


def _decoder_parameters(scenario: Scenario) -> tuple[int, int]:
    """Weights that each token goes through: of layers, and of the head."""
    text, cross = scenario.model.text, scenario.model.cross
    layers = text.parameters + cross.count * cross.query_parameters
    return layers, scenario.model.vocabulary * text.hidden


# --------------------------------------------------------------------------------------------
# Bytes


def held(scenario: Scenario, *, ranks: int, new_tokens: int) -> Held:
    """Predict the memory of the rank that holds most."""
    model, e = scenario.model, scenario.element_bytes
    frames = scenario.frames_of_a_rank(ranks)
    tokens = frames * model.frame_tokens
    width = model.cross.kv_heads * model.cross.head_dim
    layer = 2 * e * tokens * width
    features = _features_bytes(scenario, ranks)
    norm = tokens * width * (e + _NORM_TENSORS * FP32_BYTES)
    vision, _ = tower_bytes(replace(scenario, trains="cross"), frames * model.tower_tokens)
    text = (scenario.text_tokens + new_tokens) * _text_token_bytes(scenario)
    others = (model.cross.count - 1) * layer + text
    others += LAYER_BYTES * scenario.text_tokens * model.text.hidden
    return Held(
        weights=e * model.parameters,
        keys=model.cross.count * layer,
        text=text,
        prompt=max(vision, features + others + max(norm, layer)),
    )


def _text_token_bytes(scenario: Scenario) -> int:
    """K and V of a token of the text, in all of its layers."""
    text = scenario.model.text
    return 2 * scenario.element_bytes * text.count * text.kv_heads * text.head_dim
