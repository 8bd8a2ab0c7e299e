"""Generation with the visual keys sharded: tokens a second, time to the first one, memory.

docs/generation.md has the formulas. One sample of one row; the text runs whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ds_lvx.attention.shape import evenly
from ds_lvx.models.dimensions import Model
from ds_lvx.plan.choose import cheapest
from ds_lvx.plan.cluster import Cluster, Device
from ds_lvx.plan.cost import cost
from ds_lvx.plan.memory import LAYER_BYTES, tower_bytes
from ds_lvx.plan.pieces import FP32_BYTES
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import products_s, vision_s
from ds_lvx.plan.transfers import Pass, Ranks, Transfer
from ds_lvx.plan.units import at_least

_WAY = "lvx replicated"
_WITNESS_BYTES = 16  # in a token's first message: which one it is, and the token
# Of K in its norm, in fp32: two of what goes in, what is squared, and what comes out.
_NORM_TENSORS = 2
# Numbers that its operations read and write, and those of them that lie in new memory: squares and
# their mean, the product with its root, that with the weights.
_NORM_NUMBERS, _NORM_NEW = 7, 3


@dataclass(frozen=True)
class Held:
    """Bytes of the rank that holds most."""

    weights: int  # of the whole model; at ZeRO-3 this rank's share
    # K and V of its visual tokens, in all cross-attention layers; of its part of the prompt, where
    # visual tokens stand among the text or an encoder has both.
    keys: int
    text: int  # K and V that every rank has: of prompt and answer, or there of the answer
    # The most that the prompt's forward has beside the weights: in the vision tower, or where the
    # last cross-attention layer makes its keys.
    prompt: int
    gathered: int = 0  # at ZeRO-3 the largest layer, or table of the vocabulary, while it runs

    @property
    def kept(self) -> int:
        """Between two tokens, beside the weights."""
        return self.keys + self.text

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return self.weights + self.gathered + max(self.prompt, self.kept)


@dataclass(frozen=True)
class Generation:
    """One answer."""

    ranks: int  # that share the sample
    token: dict[str, float]  # seconds of one by part
    prompt: dict[str, float]  # seconds until the first token by part
    new_tokens: int  # of the answer
    bytes_sent: float  # by a rank for a token
    held: Held
    fits: bool  # the memory suffices

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
    """
    at_least(1, generate=new_tokens)
    return [
        generation(scenario, cluster, ranks=ranks, new_tokens=new_tokens)
        for ranks in cluster.groups(group)
    ]


def best(found: Sequence[Generation]) -> Generation | None:
    """The one with the most tokens a second that fits; None where none does."""
    fitting = [each for each in found if each.fits]
    return max(fitting, key=lambda each: each.tokens_per_s) if fitting else None


def generation(scenario: Scenario, cluster: Cluster, *, ranks: int, new_tokens: int) -> Generation:
    """Predict one group."""
    scenario, device = _with_text(scenario), cluster.device
    if device.cross_layer_s is not None:  # what a call takes is in it
        cluster = replace(cluster, device=replace(device, call_s=0.0))
    memory = held(scenario, ranks=ranks, new_tokens=new_tokens, gpus=cluster.gpus)
    layers, of_token = scenario.model.cross.count, _cross(scenario, cluster, ranks=ranks, queries=1)
    sent = layers * of_token.bytes_sent + (ranks - 1) * _WITNESS_BYTES if layers else 0
    return Generation(
        ranks=ranks,
        token=_token(scenario, cluster, of_token, new_tokens),
        prompt=_prompt(scenario, cluster, ranks=ranks),
        new_tokens=new_tokens,
        bytes_sent=sent + _weights(scenario, cluster, _token_parameters(scenario)).sent_bytes,
        held=memory,
        fits=memory.peak <= cluster.device.limit_bytes,
    )


def _with_text(scenario: Scenario) -> Scenario:
    """The same; where visual tokens are gathered, they are text, which every rank has."""
    model = scenario.model
    if not (model.gathered and model.among):
        return scenario
    whole = replace(model, text=model.cross, cross=replace(model.cross, count=0), among=False)
    return replace(scenario, model=whole, text_tokens=scenario.sequence)


def _keeps_prompt(scenario: Scenario) -> bool:
    """Whether a rank keeps K and V of its part of the prompt: of text, or of an encoder's rows.

    All of such a prompt runs split over the ranks, as in training.
    """
    return scenario.model.among or scenario.model.rows is not None


def _rows_of_ranks(scenario: Scenario, ranks: int) -> Sequence[int]:
    """Tokens of such a prompt by rank, visual ones and text, the rank that has most first.

    Text is dealt around the visual tokens, and these stay on the rank that encodes their frame.
    """
    tokens = scenario.text_tokens + scenario.visual_tokens
    most = max(-(-tokens // ranks), scenario.visual_tokens_of_a_rank(ranks))
    return [most, *(evenly(tokens - most, ranks - 1) if ranks > 1 else [])]


# --------------------------------------------------------------------------------------------
# Seconds


def _cross(scenario: Scenario, cluster: Cluster, *, ranks: int, queries: int) -> Pass:
    """One layer of sharded keys on so many queries, the same on every rank; one projects nothing,
    because K and V are there."""
    shape = replace(scenario.cross_shape(ranks, _WAY), recompute=False, backward=False)
    shape = replace(shape, q_lengths=(queries,) * ranks)
    if _keeps_prompt(scenario):
        shape = replace(shape, kv_lengths=tuple(_rows_of_ranks(scenario, ranks)))
    if queries == 1:
        shape = replace(shape, features_dim=0)
    return cost(shape, cluster, _WAY).forward


def _token(scenario: Scenario, cluster: Cluster, layer: Pass, new_tokens: int) -> dict[str, float]:
    device, count = cluster.device, scenario.model.cross.count
    rate = device.weights_bytes_per_s or device.stream_bytes_per_s
    read = scenario.element_bytes * sum(_decoder_parameters(scenario))
    # Half of the answer is there, on average.
    read += _text_bytes(scenario, new_tokens // 2)
    other_s = layer.other_s if device.cross_layer_s is None else 0.0  # the host's, where measured
    parts = {
        "weights and text": read / rate,
        "visual keys": count * (layer.kernel_s + other_s),
        "network": count * layer.exposed_s,
    }
    parts = {**parts, **_zero(scenario, cluster, _token_parameters(scenario), under=parts)}
    return {**parts, "host": _host_s(scenario, cluster, hiding_s=sum(parts.values()))}


def _prompt(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    device, features = cluster.device, _features_bytes(scenario, ranks)
    vision_seconds = vision_s(scenario, device, ranks, backward=False)
    parts = {"vision": vision_seconds + _written_s(device, features, copies=2)}
    if scenario.model.gathered:
        parts["text"] = _text_s(scenario, cluster)
        parts["network"] = Ranks(cluster, ranks).gather(features).seconds
    elif _keeps_prompt(scenario):
        parts |= _split_parts(scenario, cluster, ranks=ranks)
    else:
        parts |= _cross_parts(scenario, cluster, ranks=ranks)
    parts |= _zero(scenario, cluster, scenario.model.parameters, under=parts)
    host_s = device.begin_s + _host_s(scenario, cluster, hiding_s=sum(parts.values()))
    return {**parts, "host": host_s}


def _split_parts(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    """Of a prompt whose keys stay with the ranks that have its tokens; an encoder's with K and V
    for the decoder behind it."""
    model, device, rows = scenario.model, cluster.device, scenario.model.rows
    layers = model.cross if rows is None else rows
    lengths = _rows_of_ranks(scenario, ranks)
    shape = scenario.shape(layers, lengths, lengths)
    shape = replace(shape, features_dim=0, backward=False)  # products count by themselves
    if ranks == 1:
        way = "none"
    elif rows is None:
        way = cheapest(shape, cluster).name
    else:
        way = "ulysses" if rows.heads >= ranks else "ring"
    layer = cost(shape, cluster, way).forward
    seen = scenario.pairs_seen if rows is None else rows.share_seen(sum(lengths))
    attention_s = layers.count * (seen * layer.kernel_s + layer.other_s)
    waiting_s = layers.count * layer.exposed_s
    products = products_s(device, layers.parameters, max(lengths))
    if rows is not None:
        keys = products_s(device, model.cross.key_parameters, max(lengths))
        return {
            "encoder": products + attention_s,
            "projection of K and V": model.cross.count * keys,
            "network": waiting_s,
        }
    # The prompt's last logits go to every rank.
    logits = Ranks(cluster, ranks).gather(scenario.element_bytes * model.vocabulary)
    return {
        "text": products + products_s(device, model.vocabulary * model.text.hidden, 1),
        "attention": attention_s,
        "network": waiting_s + logits.seconds,
    }


def _zero(
    scenario: Scenario, cluster: Cluster, parameters: int, *, under: Mapping[str, float]
) -> dict[str, float]:
    """What gathering weights takes, as far as it does not run ``under`` the other parts."""
    moved = _weights(scenario, cluster, parameters)
    if moved.messages == 0:
        return {}
    return {"ZeRO, network": max(0.0, moved.busy_s - sum(under.values())) + moved.latency_s}


def _weights(scenario: Scenario, cluster: Cluster, parameters: int) -> Transfer:
    """The gathering of so many weights for a forward, a layer at a time, at ZeRO-3."""
    if scenario.zero_stage < 3:
        return Transfer(0.0, 0.0, 0, 0)
    whole = Ranks(cluster, cluster.gpus).gather(scenario.element_bytes * parameters / cluster.gpus)
    model = scenario.model
    layers = model.text.count + model.cross.count + model.embeddings
    return replace(whole, latency_s=layers * whole.latency_s)


def _cross_parts(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    device, count = cluster.device, scenario.model.cross.count
    layer = _cross(scenario, cluster, ranks=ranks, queries=scenario.text_tokens)
    return {
        "projection of K and V": count * (layer.projection_s + _keys_s(scenario, device, ranks)),
        "visual keys": count * (layer.kernel_s + layer.other_s),
        "network": count * layer.exposed_s,
        "text": _text_s(scenario, cluster),
    }


def _text_s(scenario: Scenario, cluster: Cluster) -> float:
    """The prompt's text, which every rank runs whole."""
    device = cluster.device
    of_layers, of_head = _decoder_parameters(scenario)
    products = products_s(device, of_layers, scenario.text_tokens) + products_s(device, of_head, 1)
    tokens = (scenario.text_tokens,)
    shape = replace(scenario.shape(scenario.model.text, tokens, tokens), backward=False)
    attention = cost(shape, cluster, "none").forward
    return products + scenario.model.text.count * attention.seconds


def _written_s(device: Device, nbytes: float, *, copies: int = 1) -> float:
    """So many bytes into new memory, in each of some copies."""
    return copies * nbytes * (1 / device.stream_bytes_per_s + device.new_byte_s)


def _keys_s(scenario: Scenario, device: Device, ranks: int) -> float:
    """Of a layer, what K and V take beside their products: new memory, and K's norm in fp32."""
    cross = scenario.model.cross
    numbers = scenario.visual_tokens_of_a_rank(ranks) * cross.kv_heads * cross.head_dim
    written = _written_s(device, 2 * numbers * scenario.element_bytes)
    norm_s = _NORM_NUMBERS / device.stream_bytes_per_s + _NORM_NEW * device.new_byte_s
    return written + numbers * FP32_BYTES * norm_s


def _features_bytes(scenario: Scenario, ranks: int) -> int:
    """Of a rank's features."""
    cross, tokens = scenario.model.cross, scenario.visual_tokens_of_a_rank(ranks)
    return scenario.element_bytes * tokens * (cross.features_dim or cross.hidden)


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
    if _keeps_prompt(scenario):  # these layers have keys of the answer's own tokens, too
        layers += cross.count * cross.key_parameters
    return layers, scenario.model.vocabulary * text.hidden


def _token_parameters(scenario: Scenario) -> int:
    """Weights of the modules that run for a token: its layers, and each table of the vocabulary."""
    layers, table = _decoder_parameters(scenario)
    return layers + scenario.model.embeddings * table


# --------------------------------------------------------------------------------------------
# Bytes


def held(scenario: Scenario, *, ranks: int, new_tokens: int, gpus: int = 1) -> Held:
    """Predict the memory of the rank that holds most.

    Args:
        scenario: at ``zero_stage`` 3 the GPUs share the weights.
        ranks: that share the sample.
        new_tokens: of the answer.
        gpus: in all.
    """
    scenario = _with_text(scenario)
    shares = gpus if scenario.zero_stage == 3 else 1
    model, e, cross = scenario.model, scenario.element_bytes, scenario.model.cross
    frames_tokens = scenario.frames_of_a_rank(ranks) * model.tower_tokens
    vision, _ = tower_bytes(replace(scenario, trains="cross"), frames_tokens)
    tokens, text = scenario.visual_tokens_of_a_rank(ranks), _text_bytes(scenario, new_tokens)
    if _keeps_prompt(scenario):
        tokens = max(_rows_of_ranks(scenario, ranks))
    numbers = tokens * cross.kv_heads * cross.head_dim
    keys = cross.count * 2 * e * numbers
    if model.rows is not None:  # a layer, which is over when the decoder makes its keys
        width = tokens * model.rows.hidden
        layers = max(LAYER_BYTES * width, e * width + keys)
    elif model.among:
        layers = LAYER_BYTES * tokens * cross.hidden + keys
    else:
        norm = numbers * (e + _NORM_TENSORS * FP32_BYTES)
        last = max(norm, 2 * e * numbers) if cross.count else 0
        layers = max(cross.count - 1, 0) * 2 * e * numbers + last + text
        layers += LAYER_BYTES * scenario.text_tokens * model.text.hidden
    return Held(
        weights=-(-e * model.parameters // shares),
        keys=keys,
        text=text,
        prompt=max(vision, _features_bytes(scenario, ranks) + layers),
        gathered=e * _largest(model) if shares > 1 else 0,
    )


def _largest(model: Model) -> int:
    """Weights of the largest layer, or of a table of the vocabulary."""
    kinds = (model.text, model.cross, model.tower, model.rows)
    layers = [each.parameters // each.count for each in kinds if each is not None and each.count]
    return max(*layers, model.vocabulary * model.text.hidden)


def _text_bytes(scenario: Scenario, new_tokens: int) -> int:
    """K and V that every rank has: of the text and so many new tokens, or of these alone."""
    model = scenario.model
    layers = model.cross if _keeps_prompt(scenario) else model.text
    tokens = new_tokens + (0 if _keeps_prompt(scenario) else scenario.text_tokens)
    return tokens * 2 * scenario.element_bytes * layers.count * layers.kv_heads * layers.head_dim
