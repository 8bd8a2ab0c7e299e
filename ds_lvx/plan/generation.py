"""Generation with the visual keys sharded: tokens a second, time to the first one, memory.

docs/generation.md has the formulas. One sample of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ds_lvx.attention.shape import evenly
from ds_lvx.plan import recurrent
from ds_lvx.plan.choose import cheapest
from ds_lvx.plan.cluster import Cluster, Device
from ds_lvx.plan.cost import cost
from ds_lvx.plan.generation_memory import (
    Held,
    carried_bytes,
    features_bytes,
    held,
    keeps_prompt,
    keeps_text,
    prompt_tokens,
    rows_of_ranks,
    splits_text,
    text_bytes,
    with_text,
)
from ds_lvx.plan.pieces import FP32_BYTES
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import products_s, vision_s
from ds_lvx.plan.transfers import Pass, Ranks, Transfer
from ds_lvx.plan.units import at_least

_WAY = "lvx replicated"
_WITNESS_BYTES = 16  # in a token's first message: which one it is, and the token
# Numbers that its operations read and write, and those of them that lie in new memory: squares and
# their mean, the product with its root, that with the weights.
_NORM_NUMBERS, _NORM_NEW = 7, 3


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
    scenario, device = with_text(scenario), cluster.device
    if device.cross_layer_s is not None:  # what a call takes is in it
        cluster = replace(cluster, device=replace(device, call_s=0.0))
    memory = held(scenario, ranks=ranks, new_tokens=new_tokens, gpus=cluster.gpus)
    layers, of_token = scenario.model.cross.count, _cross(scenario, cluster, ranks=ranks, queries=1)
    sent = layers * of_token.bytes_sent + (ranks - 1) * _WITNESS_BYTES if layers else 0
    if keeps_text(scenario, ranks):
        sent += scenario.model.text.count * _text(scenario, cluster, ranks=ranks).bytes_sent
    return Generation(
        ranks=ranks,
        token=_token(scenario, cluster, of_token, ranks=ranks, new_tokens=new_tokens),
        prompt=_prompt(scenario, cluster, ranks=ranks),
        new_tokens=new_tokens,
        bytes_sent=sent + _weights(scenario, cluster, _token_parameters(scenario)).sent_bytes,
        held=memory,
        fits=memory.peak <= cluster.device.limit_bytes,
    )


# --------------------------------------------------------------------------------------------
# Seconds


def _cross(scenario: Scenario, cluster: Cluster, *, ranks: int, queries: int) -> Pass:
    """One layer of sharded keys on so many queries, the same on every rank; one projects nothing,
    because K and V are there. Of a prompt that is split each rank has its part of them."""
    way = _WAY
    shape = replace(scenario.cross_shape(ranks, way), recompute=False, backward=False)
    if queries > 1 and splits_text(scenario, ranks):
        way = "lvx gather"
        shape = replace(shape, q_lengths=tuple(evenly(queries, ranks)))
    else:
        shape = replace(shape, q_lengths=(queries,) * ranks)
    if keeps_prompt(scenario):
        shape = replace(shape, kv_lengths=tuple(rows_of_ranks(scenario, ranks)))
    if queries == 1:
        shape = replace(shape, features_dim=0)
    return cost(shape, cluster, way).forward


def _text(scenario: Scenario, cluster: Cluster, *, ranks: int) -> Pass:
    """A token's attention to text whose keys are sharded, in one layer."""
    keys = evenly(scenario.text_tokens, ranks)
    shape = scenario.shape(scenario.model.text, (1,) * ranks, keys)
    return cost(replace(shape, features_dim=0, backward=False), cluster, _WAY).forward


def _token(
    scenario: Scenario, cluster: Cluster, layer: Pass, *, ranks: int, new_tokens: int
) -> dict[str, float]:
    device, count = cluster.device, scenario.model.cross.count
    rate = device.weights_bytes_per_s or device.stream_bytes_per_s
    read = scenario.element_bytes * sum(_decoder_parameters(scenario))
    # Half of the answer is there, on average.
    read += text_bytes(scenario, ranks=ranks, new_tokens=new_tokens // 2)
    read += 2 * carried_bytes(scenario)  # read, and written anew
    other_s = layer.other_s if device.cross_layer_s is None else 0.0  # the host's, where measured
    parts = {
        "weights and text": read / rate,
        "visual keys": count * (layer.kernel_s + other_s),
        "network": count * layer.exposed_s,
    }
    messages = count
    if keeps_text(scenario, ranks):
        of_text, layers = _text(scenario, cluster, ranks=ranks), scenario.model.text.count
        parts["network"] += layers * of_text.exposed_s
        if device.cross_layer_s is None:
            parts["weights and text"] += layers * of_text.other_s
        messages += layers
    parts = {**parts, **_zero(scenario, cluster, _token_parameters(scenario), under=parts)}
    hiding_s = sum(parts.values())
    return {**parts, "host": _host_s(scenario, cluster, hiding_s=hiding_s, messages=messages)}


def _prompt(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    device, features = cluster.device, features_bytes(scenario, ranks)
    vision_seconds = vision_s(scenario, device, ranks, backward=False)
    parts = {"vision": vision_seconds + _written_s(device, features, copies=2)}
    if scenario.model.gathered:
        parts["text"] = _text_s(scenario, cluster)
        parts["network"] = Ranks(cluster, ranks).gather(features).seconds
    elif keeps_prompt(scenario):
        parts |= _split_parts(scenario, cluster, ranks=ranks)
    else:
        parts |= _cross_parts(scenario, cluster, ranks=ranks)
    parts |= _zero(scenario, cluster, scenario.model.parameters, under=parts)
    messages = scenario.model.cross.count
    hiding_s = sum(parts.values())
    host_s = _host_s(scenario, cluster, hiding_s=hiding_s, messages=messages)
    return {**parts, "host": device.begin_s + host_s}


def _split_parts(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    """Of a prompt whose keys stay with the ranks that have its tokens; an encoder's with K and V
    for the decoder behind it."""
    model, device, rows = scenario.model, cluster.device, scenario.model.rows
    layers = model.cross if rows is None else rows
    lengths = rows_of_ranks(scenario, ranks)
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
    of_states, states_waiting_s = _states_s(scenario, cluster, ranks=ranks)
    woken = layers.count * layers.woken(max(lengths))
    products = products_s(device, layers.token_parameters, max(lengths), beside=woken)
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
        **of_states,
        "network": waiting_s + states_waiting_s + logits.seconds,
    }


def _states_s(
    scenario: Scenario, cluster: Cluster, *, ranks: int
) -> tuple[dict[str, float], float]:
    """Of a prompt, the layers that carry a state, and what they wait for others; the state behind
    it goes to every rank."""
    layers, e = scenario.model.recurrent, scenario.element_bytes
    if layers is None:
        return {}, 0.0
    lengths = rows_of_ranks(scenario, ranks)
    rule = recurrent.cost(layers, cluster, lengths, element_bytes=e).forward
    most = max(lengths)
    products = products_s(cluster.device, layers.query_parameters, most, beside=layers.woken(most))
    state = recurrent.state_bytes(recurrent.spread(layers, ranks), element_bytes=e)
    waiting_s = rule.exposed_s + Ranks(cluster, ranks).gather(state / ranks).seconds
    seconds = layers.count * (products + rule.seconds - rule.exposed_s)
    return {"layers with a state": seconds}, layers.count * waiting_s


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
    layers = sum(each.count for each in (model.text, *model.crossing)) + model.embeddings
    return replace(whole, latency_s=layers * whole.latency_s)


def _cross_parts(scenario: Scenario, cluster: Cluster, *, ranks: int) -> dict[str, float]:
    device, count = cluster.device, scenario.model.cross.count
    layer = _cross(scenario, cluster, ranks=ranks, queries=scenario.text_tokens)
    text_s, waiting_s = _text_s(scenario, cluster), 0.0
    if splits_text(scenario, ranks):
        text_s, waiting_s = _part_of_text_s(scenario, cluster, ranks=ranks)
    return {
        "projection of K and V": count * (layer.projection_s + _keys_s(scenario, device, ranks)),
        "visual keys": count * (layer.kernel_s + layer.other_s),
        "network": count * layer.exposed_s + waiting_s,
        "text": text_s,
    }


def _part_of_text_s(scenario: Scenario, cluster: Cluster, *, ranks: int) -> tuple[float, float]:
    """A rank's part of a prompt's text, and what it waits for others; then every rank gets the last
    logits, and, where they are not to stay, K and V of all."""
    device, model, e = cluster.device, scenario.model, scenario.element_bytes
    of_layers, of_head = _decoder_parameters(scenario)
    tokens = prompt_tokens(scenario, ranks)
    lengths, text = evenly(scenario.text_tokens, ranks), model.text
    shape = replace(scenario.shape(text, lengths, lengths), backward=False)
    attention = cost(shape, cluster, "ulysses" if text.heads >= ranks else "ring").forward
    others = Ranks(cluster, ranks)
    waiting_s = others.gather(e * model.vocabulary).seconds + text.count * attention.exposed_s
    if not keeps_text(scenario, ranks):
        keys = 2 * e * tokens * text.kv_heads * text.head_dim
        waiting_s += text.count * others.gather(keys).seconds
    products = products_s(device, of_layers, tokens) + products_s(device, of_head, 1)
    return products + text.count * (attention.seconds - attention.exposed_s), waiting_s


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


def _host_s(scenario: Scenario, cluster: Cluster, *, hiding_s: float, messages: int) -> float:
    """What the host takes for a forward, as far as a GPU does not work meanwhile.

    Args:
        scenario, cluster: as of `generation`.
        hiding_s: that a GPU works.
        messages: layers that send one.
    """
    device, model = cluster.device, scenario.model
    # Cross-attention without an MLP is a part of the text's layers.
    layers = model.text.count + sum(each.count for each in model.crossing if each.mlp)
    seconds = device.token_s + layers * device.layer_s
    if device.cross_layer_s is not None:
        alone = sum(each.count for each in (model.text, *model.crossing)) - messages
        seconds = device.token_s + alone * device.layer_s + messages * device.cross_layer_s
    return seconds if device.on_cpu else max(seconds - hiding_s, 0.0)


def _decoder_parameters(scenario: Scenario) -> tuple[int, int]:
    """Weights that each token goes through: of layers, and of the head."""
    text = scenario.model.text
    layers = text.token_parameters
    for each in scenario.model.crossing:
        layers += each.count * each.query_parameters
        if keeps_prompt(scenario):  # these layers have keys of the answer's own tokens, too
            layers += each.count * each.key_parameters
    return layers, scenario.model.vocabulary * text.hidden


def _token_parameters(scenario: Scenario) -> int:
    """Weights of the modules that run for a token: its layers with all of their experts, and each
    table of the vocabulary."""
    layers, table = _decoder_parameters(scenario)
    kinds = (scenario.model.text, *scenario.model.crossing)
    others = sum(each.count * each.others for each in kinds)
    return layers + others + scenario.model.embeddings * table
