"""A whole training step, part by part, for one group size, method and schedule.

docs/planning.md has the formulas. Matrix products take the longer of computing and of reading their
weights; a backward through trained weights takes two of them, through frozen ones one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_lvx.attention.shape import evenly
from ds_lvx.models.dimensions import Layers
from ds_lvx.plan import recurrent
from ds_lvx.plan.cluster import Cluster, Device
from ds_lvx.plan.cost import Cost, cost
from ds_lvx.plan.memory import BYTES_IN_4BIT, Footprint, footprint
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.transfers import Ranks

# fp32 weight, two moments and gradient: read, and all but the gradient written; the bf16 weight.
_ADAM_BYTES = 30
_CROSS_PARTS = ("cross-attention", "projection of K and V", "cross-attention, network")


@dataclass(frozen=True)
class Step:
    """One step of a rank."""

    ranks: int  # of the group that shares a sample
    way: str  # of the cross-attention: its method, and the schedule of lvx
    text_method: str  # of the text's self-attention
    parts: dict[str, float]  # seconds by part; they add up to ``seconds``
    cross: Cost  # one cross-attention layer
    bytes_sent: float  # by a rank for all layers of cross-attention, and those with a state
    footprint: Footprint
    fits: bool  # the memory suffices

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def cross_seconds(self) -> float:
        """Of all cross-attention: kernels, merging, projection of K and V, and waiting."""
        return sum(self.parts[name] for name in _CROSS_PARTS)

    @property
    def limited_by(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda part: self.parts[part])


def step(scenario: Scenario, cluster: Cluster, *, ranks: int, way: str) -> Step:
    """Predict a step in which ``ranks`` adjacent ranks share a sample.

    Raises:
        ValueError: the method cannot run this layer on so many ranks.
    """
    shape = scenario.cross_shape(ranks, way)
    layer, waiting_s = cost(shape, cluster, way), 0.0
    text_method = "ulysses" if scenario.model.text.heads >= ranks else "ring"
    text_method = way if scenario.model.among else text_method
    seen = scenario.pairs_seen
    count, passes = scenario.model.cross.count, (layer.forward, layer.backward)
    projections = list(passes)
    of_states, states_bytes = _recurrent(scenario, cluster, ranks)
    windowed = scenario.model.windowed
    if windowed:  # there is less to do while others' parts arrive
        narrow = replace(shape, seen=scenario.model.share_in_window(scenario.sequence))
        waiting_s = windowed * cost(narrow, cluster, way).exposed_s
    if scenario.checkpointing and not scenario.recomputes(way):
        projections.append(layer.forward)  # in the layer's second forward
    parts = {
        "cross-attention": count * sum(seen * each.kernel_s + each.other_s for each in passes),
        "projection of K and V": count * sum(each.projection_s for each in projections),
        "cross-attention, network": (count - windowed) * layer.exposed_s + waiting_s,
        **_text(scenario, cluster, ranks, text_method),
        **_rows(scenario, cluster, ranks, text_method),
        **of_states,
        "vision": vision_s(scenario, cluster.device, ranks),
        **_in_4_bits(scenario, cluster.device),
    }
    parts["ZeRO, network"] = max(0.0, _zero(scenario, cluster) - sum(parts.values()))
    shared = cluster.gpus if scenario.zero_stage >= 1 else 1
    updated_bytes = scenario.trained_parameters / shared * _ADAM_BYTES
    parts["optimizer"] = updated_bytes / cluster.device.stream_bytes_per_s
    memory = footprint(scenario, gpus=cluster.gpus, ranks=ranks, way=way)
    return Step(
        ranks=ranks,
        way=way,
        text_method=text_method,
        parts=parts,
        cross=layer,
        bytes_sent=count * layer.bytes_sent + states_bytes,
        footprint=memory,
        fits=memory.peak <= cluster.device.limit_bytes,
    )


def _text(scenario: Scenario, cluster: Cluster, ranks: int, method: str) -> dict[str, float]:
    model, text = scenario.model, scenario.model.text
    tokens = -(-scenario.sequence // ranks)
    cross, device = model.cross, cluster.device
    head = products_s(device, model.vocabulary * text.hidden, tokens)
    of_text = text.query_parameters + text.key_parameters
    of_text_s = products_s(device, of_text, tokens, beside=text.woken(tokens))
    layers = (2 + scenario.text_trains) * head + text.count * scenario.passes * of_text_s
    passes = 2 + scenario.cross_trains + scenario.checkpointing
    layers += cross.count * passes * layer_s(device, cross, tokens)
    queries, keys = evenly(scenario.sequence, ranks), evenly(scenario.text_tokens, ranks)
    attention = cost(scenario.shape(text, queries, keys), cluster, method)
    waiting = text.count * attention.exposed_s
    return {
        "text layers": layers + text.count * attention.seconds - waiting,
        "text, network": waiting,
    }


def _rows(scenario: Scenario, cluster: Cluster, ranks: int, method: str) -> dict[str, float]:
    """The layers of an encoder over all visual tokens; of windows the pairs that are seen."""
    rows = scenario.model.rows
    if rows is None:
        return {}
    tokens = scenario.visual_tokens_of_a_rank(ranks)
    products = products_s(cluster.device, rows.parameters // rows.count, tokens)
    lengths = scenario.cross_shape(ranks, "ring").kv_lengths
    attention = cost(scenario.shape(rows, lengths, lengths), cluster, method)
    kernels = attention.forward.kernel_s + attention.backward.kernel_s
    unseen = kernels * (1 - rows.share_seen(scenario.visual_tokens))
    layer = scenario.passes * products + attention.seconds - attention.exposed_s - unseen
    return {
        "encoder layers": rows.count * layer,
        "encoder, network": rows.count * attention.exposed_s,
    }


def _recurrent(scenario: Scenario, cluster: Cluster, ranks: int) -> tuple[dict[str, float], float]:
    """The layers that carry a state, and what a rank sends for them."""
    layers = scenario.model.recurrent
    if layers is None:
        return {}, 0.0
    tokens, again = -(-scenario.sequence // ranks), scenario.checkpointing
    lengths = evenly(scenario.sequence, ranks)
    rule = recurrent.cost(layers, cluster, lengths, element_bytes=scenario.element_bytes)
    products = (2 + scenario.cross_trains + again) * layer_s(cluster.device, layers, tokens)
    layer = products + again * rule.forward.kernel_s
    parts = {
        "layers with a state": layers.count * (layer + rule.seconds - rule.exposed_s),
        "layers with a state, network": layers.count * rule.exposed_s,
    }
    return parts, layers.count * rule.bytes_sent


def products_s(device: Device, parameters: int, tokens: int, *, beside: float = 0.0) -> float:
    """One pass of so many tokens through so many weights, while others are read ``beside``."""
    computing = 2 * parameters * tokens / device.matmul_flops
    reading = (parameters + beside) * device.element_bytes / device.stream_bytes_per_s
    return max(computing, reading)


def layer_s(device: Device, layers: Layers, tokens: int) -> float:
    """One pass of so many tokens through a layer's weights, but those of K and V."""
    return products_s(device, layers.query_parameters, tokens, beside=layers.woken(tokens))


def _in_4_bits(scenario: Scenario, device: Device) -> dict[str, float]:
    """Reading weights of 4 bits and writing them in full, before each pass of products."""
    if not scenario.load_in_4bit:
        return {}
    nbytes = scenario.quantized_parameters * (BYTES_IN_4BIT + scenario.element_bytes)
    passes = 2 + scenario.checkpointing
    return {"weights in 4 bits": passes * nbytes / device.stream_bytes_per_s}


def vision_s(scenario: Scenario, device: Device, ranks: int, *, backward: bool = True) -> float:
    """The tower and the projector, over the frames of a rank; without backward a forward alone."""
    model, tower = scenario.model, scenario.model.tower
    frames = scenario.frames_of_a_rank(ranks)
    tokens = frames * model.tower_tokens
    # Frames attend within themselves: 4 T^2 H D operations forward, 10 backward.
    pairs = tokens * model.tower_tokens * tower.heads * tower.head_dim
    passes, attention = 1, pairs * device.whole.pair_s
    if scenario.vision_trains and backward:
        passes = scenario.passes
        attention += pairs * device.backward.pair_s
    layer = passes * products_s(device, tower.parameters // tower.count, tokens) + attention
    projected = frames * model.projector_tokens
    projector = products_s(device, model.projector_parameters, projected)
    back = backward * (scenario.cross_trains + scenario.vision_trains)
    return tower.count * layer + (1 + back) * projector


def _zero(scenario: Scenario, cluster: Cluster) -> float:
    """Seconds of the network for weights and gradients, hidden or not."""
    ranks = Ranks(cluster, cluster.gpus)
    weights = scenario.weight_bytes / ranks.size
    gradients = scenario.element_bytes * scenario.trained_parameters / ranks.size
    # Stage 3: weights in forward and in backward, gradients once. Else: gradients are summed, or
    # reduced and the new weights gathered, which is as much.
    sizes = [weights] * 2 + [gradients] if scenario.zero_stage == 3 else [gradients] * 2
    return sum(ranks.gather(size).busy_s for size in sizes)
