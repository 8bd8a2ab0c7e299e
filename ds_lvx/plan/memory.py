"""What cross-attention layers keep for backward, and the most that a rank needs in a step.

The formulas follow what autograd saves and what is alive when memory peaks; docs/memory.md tells
the same in words. `tests/plan/test_memory.py` counts the saved bytes of real layers, and
`launch/bench_memory.py` measures both. Of the text it is 34 bytes a token, layer and unit of width
where attention keeps no scores (Korthikanti et al., arXiv:2205.05198, equation 1 without the
quadratic term); a checkpointed layer keeps its input.

Legend: B batch, s queries and t keys (visual tokens) of a rank, n ranks, H query heads, K key/value
heads, D head_dim, e bytes an element; fp32 has 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_lvx.attention.shape import STREAMED_TOKENS, evenly
from ds_lvx.models.dimensions import Layers
from ds_lvx.plan.pieces import FP32_BYTES
from ds_lvx.plan.recurrent import checkpointed_bytes, kept_bytes
from ds_lvx.plan.scenario import Scenario

LAYER_BYTES = 34
_LOGIT_BYTES = 10  # bf16, their copy in fp32, its gradient
_OPTIMIZER_BYTES = 12  # fp32 weight and two moments
_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)  # of a weight in 4 bits
BYTES_IN_4BIT = 1 / 2 + _SCALE_BYTES
"""Of a weight; docs/memory.md has them."""
LIVE_NUMBERS = 10**9
"""``stage3_max_live_parameters``, of DeepSpeed and of ds_configs/."""
BUCKET_NUMBERS = 5 * 10**7
"""``reduce_bucket_size`` of ds_configs/."""
# A query that is gathered, under the kernel: q, dout, PyTorch's stand-in for out and its dq in 16
# bits, dq in fp32. Behind it 8: dq, the message, what answers it.
_GATHERED_BYTES = 12

# The backward of transformers' RMSNorm over K, operation by operation in fp32, has its input and
# five temporaries of K's size at its worst.
_NORM_BACKWARD_TENSORS = 6


@dataclass(frozen=True)
class Setting:
    """How these layers run: a rule of the ds_config, and whether layers are checkpointed."""

    method: str = "lvx"  # or ``"ring"`` or ``"ulysses"``
    recompute_kv: bool = False  # as in the rule; lvx only
    checkpointing: bool = False  # the ds_config has a section ``activation_checkpointing``
    features: str = "keep"  # as in the rule; lvx only
    kv_chunk_tokens: int | None = None  # likewise

    def rule(self) -> dict[str, Any]:
        """The keys of this setting in a rule of the ``ds_lvx`` section."""
        own = {name: value for name, value in vars(self).items() if value != getattr(Setting, name)}
        own.pop("checkpointing", None)
        return {"method": self.method, **own}


@dataclass(frozen=True)
class Load:
    """What one rank works on."""

    keys: int  # visual tokens of a sample on this rank
    queries: int = 0  # text tokens of a sample on this rank
    batch: int = 1  # samples
    ranks: int = 1  # that share a sample
    features_train: bool = True  # something before the features trains: they want a gradient
    host_is_device: bool = False  # on a CPU, where features on the host are where they were
    element_bytes: int = 2  # of weights and activations
    lora_r: int = 0  # rank of LoRA at all projections, and nothing else trains; 0: all of it does


@dataclass(frozen=True)
class Kept:
    """Bytes that stay on the device from forward to backward."""

    features: int  # the visual features, once for all layers
    of_keys: int  # of each layer, proportional to the visual tokens
    of_queries: int  # of each layer, proportional to the text tokens


def kept(layers: Layers, setting: Setting, load: Load) -> Kept:
    """What the cross-attention layers keep after forward.

    With ``recompute_kv``, ``of_keys`` is 0: nothing that a layer keeps grows with the visual input.
    """
    a, e, n = layers, load.element_bytes, load.ranks
    scattered = setting.method == "ulysses" and n > 1
    # Repeated or padded: as many heads on every rank.
    kv_heads = -(-max(a.kv_heads, n) // n) * n if scattered else a.kv_heads
    k_and_v = 2 * e * kv_heads * a.head_dim
    q = e * a.heads * a.head_dim
    # The layer's input, out (by heads and by tokens where it was scattered), and lse.
    of_query = e * a.hidden + q * (2 if scattered else 1) + FP32_BYTES * a.heads
    if setting.checkpointing:
        # What came by an all-to-all is kept, because it must not be sent again.
        of_key, of_query = (k_and_v, of_query + q) if scattered else (0, of_query)
    else:
        of_lora = 2 * e * load.lora_r  # between its matrices, of two projections each
        of_key = k_and_v + _norm_bytes(a.kv_heads, a.head_dim, load) + of_lora
        # A gated out is a third tensor beside out and its gate.
        of_query += _norm_bytes(a.heads, a.head_dim, load) + q * (1 + 2 * a.gated) + of_lora
    keys, queries = load.batch * load.keys, load.batch * load.queries
    return Kept(
        features=0 if _on_host(setting, load) else keys * _feature_bytes(a, e),
        of_keys=0 if setting.recompute_kv else keys * of_key,
        of_queries=queries * of_query,
    )


def _feature_bytes(layers: Layers, element_bytes: int) -> int:
    """Of a visual token's features."""
    return element_bytes * (layers.features_dim or layers.hidden)


def _norm_bytes(heads: int, head_dim: int, load: Load) -> int:
    """What an RMSNorm over q or K saves of a token: input, its factors in fp32; the result, where
    its weights train."""
    width = heads * head_dim
    return FP32_BYTES * (width + heads) + (0 if load.lora_r else load.element_bytes * width)


def peak(layers: Layers, setting: Setting, load: Load) -> int:
    """The most that a step holds on a rank above weights, gradients and optimizer: a prediction.

    Counts what grows with the visual tokens, and what attention keeps of the text; the vision tower
    and the rest of the text model come on top. Memory peaks in backward: in the last layer, while
    all others still wait, or in the one before it, when the features have a gradient already.
    """
    keys, on_host = load.batch * load.keys, _on_host(setting, load)
    feature_bytes, saved = _feature_bytes(layers, load.element_bytes), kept(layers, setting, load)
    chunk = load.keys  # visual tokens of a sample whose K and V exist at a time
    if setting.kv_chunk_tokens is not None:
        chunk = min(setting.kv_chunk_tokens, chunk)
    elif on_host:
        chunk = min(STREAMED_TOKENS, chunk)
    arriving = 2 * feature_bytes if on_host else 0  # this chunk and the next
    one_layer = load.batch * chunk * (_transient_per_key(layers, setting, load) + arriving)
    # Layers that recompute add theirs to one gradient of the features; autograd adds up the rest.
    gradient = keys * feature_bytes if load.features_train and not on_host else 0
    count = layers.count
    in_last = saved.of_keys * (count - 1) + one_layer + (gradient if chunk < load.keys else 0)
    in_next = saved.of_keys * (count - 2) + one_layer + gradient if count > 1 else 0
    # Features that wait on the host are made on the device, and their gradient ends there.
    whole = keys * feature_bytes
    return max(saved.features + max(in_last, in_next), whole) + saved.of_queries * count


def _transient_per_key(a: Layers, setting: Setting, load: Load) -> int:
    """Bytes a visual token at the worst moment of a layer's backward, its saved tensors included.

    The moments are the attention's backward, that of K's norm, and that of the linear layers.
    """
    width, e = a.kv_heads * a.head_dim, load.element_bytes
    d_features = _feature_bytes(a, e) if load.features_train else 0
    k_and_v = 2 * e * width  # dk and dv are as large
    attention = _norm_bytes(a.kv_heads, a.head_dim, load) + 2 * k_and_v
    if setting.method == "ring" and load.ranks > 1:
        # The next block's K and V, the last one's dk and dv, and this rank's own in fp32.
        attention += 2 * k_and_v + 2 * FP32_BYTES * width
    norm = _NORM_BACKWARD_TENSORS * FP32_BYTES * width
    linear = e * width + d_features
    if setting.recompute_kv:
        # First K, then V goes back through its projection; dv waits, and dk is not let go.
        return max(attention, norm + k_and_v, linear + k_and_v)
    # Autograd's own order: V has been through its projection when K's norm runs.
    return max(attention, norm + d_features, linear + d_features)


def _on_host(setting: Setting, load: Load) -> bool:
    return setting.features == "offload" and not load.host_is_device


# ---- a whole step


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank."""

    states: int  # weights, gradients and optimizer
    whole: int  # at ZeRO-3 weights and gradients that are whole at a time
    vision: int  # the vision tower's activations at their peak
    cross: int  # the cross-attention's at their peak, features included
    text: int  # the text's activations and logits, and the queries of other ranks
    rows: int  # the activations of an encoder over all visual tokens
    recurrent: int  # the activations of layers that carry a state
    vision_stays: int  # what of ``vision`` is still there in the text's backward
    loading: int  # all weights, where each rank reads them before ZeRO-3 shares them: in 4 bits

    @property
    def peak(self) -> int:
        """The most at any moment: in the vision tower, in the text's backward, or at the start."""
        stays = self.vision_stays + self.cross + self.text + self.rows + self.recurrent
        return max(self.loading, self.states + self.whole + max(self.vision, stays))


def footprint(scenario: Scenario, *, gpus: int, ranks: int, way: str) -> Footprint:
    """Predict the memory of the rank that needs most."""
    cross, frames = scenario.model.cross, scenario.frames_of_a_rank(ranks)
    setting = Setting(
        method=way.partition(" ")[0],
        recompute_kv=scenario.recomputes(way),
        checkpointing=scenario.checkpointing,
    )
    queries = max(evenly(scenario.sequence, ranks))
    keys = queries if scenario.model.among else scenario.visual_tokens_of_a_rank(ranks)
    load = Load(
        keys,
        queries,
        ranks=ranks,
        features_train=scenario.features_train,
        element_bytes=scenario.element_bytes,
        lora_r=scenario.lora_r,
    )
    travelling = 0  # queries of other ranks that are here, with their gradients
    if setting.method == "lvx" and ranks > 1:
        here = scenario.sequence if way == "lvx gather" else 2 * queries
        travelling = _GATHERED_BYTES * here * cross.heads * cross.head_dim
    text, rows = scenario.model.text, scenario.model.rows
    # Cross-attention layers with an MLP are layers of their own; what attention itself keeps is in
    # the cross-attention's share.
    own_layers = replace(text, count=text.count + (cross.count if cross.mlp else 0))
    vision, stays = tower_bytes(scenario, frames * scenario.model.tower_tokens)
    whole = 0
    if scenario.zero_stage == 3 and gpus > 1:
        whole = gathered_bytes(scenario) + gradients_bytes(scenario, ranks=ranks)
    return Footprint(
        states=_states(scenario, gpus),
        whole=whole,
        vision=vision,
        cross=peak(replace(cross, hidden=cross.features_dim or cross.hidden), setting, load),
        text=_layers(scenario, own_layers, queries) + logits_bytes(scenario, queries) + travelling,
        rows=0 if rows is None else _layers(scenario, rows, keys),
        recurrent=_recurrent(scenario, ranks),
        vision_stays=stays,
        loading=scenario.load_in_4bit * (scenario.weight_bytes + _scales_bytes(scenario)),
    )


def _states(scenario: Scenario, gpus: int) -> int:
    """Weights, gradients and optimizer, shared from ZeRO stages 3, 2 and 1 on."""
    sizes = {
        3: scenario.weight_bytes,
        2: scenario.element_bytes * scenario.trained_parameters,
        1: _OPTIMIZER_BYTES * scenario.trained_parameters,
    }
    return _scales_bytes(scenario) + sum(
        -(-size // (gpus if scenario.zero_stage >= stage else 1)) for stage, size in sizes.items()
    )


def _scales_bytes(scenario: Scenario) -> int:
    """Of weights in 4 bits, which every rank has, whatever the stage."""
    return int(_SCALE_BYTES * scenario.quantized_parameters)


def gathered_bytes(scenario: Scenario, *, live: int = LIVE_NUMBERS) -> int:
    """Of weights that ZeRO-3 has whole at a time.

    DeepSpeed gathers ahead of use until so many numbers are there, and then the rest of a tensor,
    or a larger layer. Products with weights in 4 bits keep these for backward.
    """
    model = scenario.model
    kept = 0 if scenario.checkpointing else scenario.quantized_parameters // 2
    ahead = scenario.element_bytes * max(live + model.largest_weight, model.largest_layer)
    return min(ahead + kept, scenario.weight_bytes)


def gradients_bytes(scenario: Scenario, *, ranks: int, bucket: int = BUCKET_NUMBERS) -> int:
    """Of gradients that ZeRO-3 has whole: its buffer of so many numbers, and what does not fit.

    A larger one stays until the next comes, a mixture's all at once; each is then reduced in fp32
    where ranks share a sample.
    """
    e, sent = scenario.element_bytes, FP32_BYTES if ranks > 1 else scenario.element_bytes
    full = 0
    if scenario.cross_trains:
        trained = [scenario.model] if scenario.text_trains else scenario.model.crossing
        full = e * max(each.largest_layer for each in trained)
        full += (sent if sent != e else 0) * max(each.largest_weight for each in trained)
    return sent * bucket + max(full, sent * min(bucket, scenario.trained_parameters))


def tower_bytes(scenario: Scenario, tokens: int) -> tuple[int, int]:
    """The tower's activations at their peak, and what of them waits for its backward."""
    tower, states = scenario.model.tower, scenario.model.tower_states
    layer, state = LAYER_BYTES * tower.hidden, scenario.element_bytes * tower.hidden
    if not scenario.vision_trains:
        return tokens * (states * state + layer), 0
    if not scenario.checkpointing:
        return tokens * tower.count * layer, tokens * tower.count * layer
    kept = tokens * max(states, tower.count) * state
    return kept + tokens * layer, kept


def _layers(scenario: Scenario, layers: Layers, tokens: int) -> int:
    """What layers keep of so many tokens, and one of them at its peak."""
    layer = LAYER_BYTES * layers.hidden
    kept = scenario.element_bytes * layers.hidden if scenario.checkpointing else layer
    return tokens * (layers.count * kept + layer)


def _recurrent(scenario: Scenario, ranks: int) -> int:
    """What layers with a state keep of a rank's tokens, and one of them at its peak."""
    layers, e = scenario.model.recurrent, scenario.element_bytes
    if layers is None:
        return 0
    layer = LAYER_BYTES * layers.hidden + kept_bytes(layers, ranks=ranks, element_bytes=e)
    kept = checkpointed_bytes(layers, ranks=ranks, element_bytes=e)
    each = kept if scenario.checkpointing else layer
    return int(max(evenly(scenario.sequence, ranks)) * (layers.count * each + layer))


def logits_bytes(scenario: Scenario, queries: int) -> int:
    """Logits of a tile of a rank's text, and the sums of the head's gradients over several."""
    words, tiles = scenario.model.vocabulary, scenario.loss_tiles
    sums = FP32_BYTES * words * scenario.model.text.hidden if scenario.text_trains else 0
    return _LOGIT_BYTES * -(-queries // tiles) * words + (sums if tiles > 1 else 0)


# ---- the same sample elsewhere


def elsewhere(scenario: Scenario, *, gpus: int, ranks: int) -> tuple[int, int, int]:
    """What other trainers need where visual tokens stand among the text's.

    They run Ulysses in the text, on contiguous pieces of embeddings that every rank has whole.
    These are gathered when nothing of the text is there yet, and their gradients when nothing is
    there any more. With ``T`` tokens of a sample, ``V`` visual ones, there are at once: the
    gradient of the embeddings of the text, that of the features, what is sent of it and what comes,
    ``T + 3 V``. In forward it is ``2 T + V``, or with the whole tower, whose features come from
    nowhere, as much.

    Returns:
        Bytes of a rank: at the peak where each rank encodes its frames, what it sends for the
        gathering in a step beside what attention sends, and at the peak where each encodes all.
    """
    own = footprint(scenario, gpus=gpus, ranks=ranks, way="ulysses")
    states = own.states + own.whole
    width = scenario.element_bytes * scenario.model.text.hidden
    visual, both = scenario.visual_tokens, scenario.sequence
    forward = width * (2 * both + visual)
    gathering = width * (both + 3 * visual) if scenario.cross_trains else forward
    tower, stays = tower_bytes(scenario, scenario.frames * scenario.model.tower_tokens)
    return (
        max(own.peak, states + own.vision_stays + gathering),
        2 * width * (ranks - 1) * (visual // ranks),
        states + max(tower, stays + max(own.cross + own.text + own.recurrent, forward)),
    )
