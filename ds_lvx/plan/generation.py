"""Generation with the visual keys sharded: tokens a second, time to the first one, memory.

docs/generation.md has the formulas. One sample of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ds_lvx.attention.shape import evenly
from ds_lvx.plan import recurrent
from ds_lvx.plan.choose import cheapest
from ds_lvx.plan.cluster import Cluster
from ds_lvx.plan.cost import cost
from ds_lvx.plan.generation_memory import Held, Share
from ds_lvx.plan.pieces import FP32_BYTES
from ds_lvx.plan.scenario import Scenario
from ds_lvx.plan.step import layer_s, products_s, vision_s
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
    if cluster.device.cross_layer_s is not None:  # what a call takes is in it
        cluster = replace(cluster, device=replace(cluster.device, call_s=0.0))
    rank = _Rank(Share.of(scenario, ranks), cluster)
    memory = rank.share.held(new_tokens=new_tokens, gpus=cluster.gpus)
    return Generation(
        ranks=ranks,
        token=rank.token(new_tokens),
        prompt=rank.prompt(),
        new_tokens=new_tokens,
        bytes_sent=rank.token_bytes(),
        held=memory,
        fits=memory.peak <= cluster.device.limit_bytes,
    )


class _Rank:
    """Seconds and messages of a rank."""

    def __init__(self, share: Share, cluster: Cluster) -> None:
        self.share, self.cluster, self.device = share, cluster, cluster.device
        self.scenario, self.model = share.scenario, share.scenario.model
        self.ranks, self.others = share.ranks, Ranks(cluster, share.ranks)

    def token(self, new_tokens: int) -> dict[str, float]:
        """From one to the next."""
        device, cross, text = self.device, self.model.cross.count, self.model.text.count
        rate = device.weights_bytes_per_s or device.stream_bytes_per_s
        read = self.scenario.element_bytes * sum(self._decoder_parameters())
        # Half of the answer is there, on average.
        read += self.share.text_bytes(new_tokens // 2)
        read += 2 * self.share.carried_bytes  # read, and written anew
        of_keys, of_text = self._cross(queries=1), self._text_keys()
        other = device.cross_layer_s is None  # else it is in the host's time
        parts = {
            "weights and text": read / rate + other * text * of_text.other_s,
            "visual keys": cross * (of_keys.kernel_s + other * of_keys.other_s),
            "network": cross * of_keys.exposed_s + text * of_text.exposed_s,
        }
        messages = cross + text * self.share.keeps_text
        return self._whole(parts, self._token_parameters(), messages=messages)

    def token_bytes(self) -> float:
        """That are sent for a token."""
        sent = self._weights(self._token_parameters()).sent_bytes
        if count := self.model.cross.count:
            sent += count * self._cross(queries=1).bytes_sent + (self.ranks - 1) * _WITNESS_BYTES
        if self.share.keeps_text:
            sent += self.model.text.count * self._text_keys().bytes_sent
        return sent

    def prompt(self) -> dict[str, float]:
        """Until the first token."""
        features = self.share.features_bytes
        vision = vision_s(self.scenario, self.device, self.ranks, backward=False)
        parts = {"vision": vision + self._written_s(features, copies=2)}
        if self.model.gathered:
            parts["text"] = self._text(1).seconds
            parts["network"] = self.others.gather(features).seconds
        elif self.share.keeps_prompt:
            parts |= self._split_parts()
        else:
            parts |= self._cross_parts()
        whole = self._whole(parts, self.model.parameters, messages=self.model.cross.count)
        return {**whole, "host": self.device.begin_s + whole["host"]}

    # ---- layers whose keys are sharded

    def _cross(self, *, queries: int) -> Pass:
        """One layer on so many queries, the same on every rank; one projects nothing, because K and
        V are there. Of a prompt that is split each rank has its part of them."""
        way, lengths = _WAY, (queries,) * self.ranks
        if queries > 1 and self.share.splits_text:
            way, lengths = "lvx gather", tuple(evenly(queries, self.ranks))
        shape = self.scenario.cross_shape(self.ranks, _WAY)
        shape = replace(shape, recompute=False, backward=False, q_lengths=lengths)
        if self.share.keeps_prompt:
            shape = replace(shape, kv_lengths=tuple(self.share.rows))
        if queries == 1:
            shape = replace(shape, features_dim=0)
        return cost(shape, self.cluster, way).forward

    def _text_keys(self) -> Pass:
        """A token's attention to text in one layer, where its keys are sharded."""
        if not self.share.keeps_text:
            return Pass()
        keys = evenly(self.scenario.text_tokens, self.ranks)
        shape = self.scenario.shape(self.model.text, (1,) * self.ranks, keys)
        return cost(replace(shape, features_dim=0, backward=False), self.cluster, _WAY).forward

    # ---- a prompt

    def _split_parts(self) -> dict[str, float]:
        """Of a prompt whose keys stay with the ranks that have its tokens; an encoder's with K and
        V for the decoder behind it."""
        model, rows, lengths = self.model, self.model.rows, self.share.rows
        layers = model.cross if rows is None else rows
        shape = self.scenario.shape(layers, lengths, lengths)
        shape = replace(shape, features_dim=0, backward=False)  # products count by themselves
        if self.ranks == 1:
            way = "none"
        elif rows is None:
            way = cheapest(shape, self.cluster).name
        else:
            way = "ulysses" if rows.heads >= self.ranks else "ring"
        layer = cost(shape, self.cluster, way).forward
        seen = self.scenario.pairs_seen if rows is None else rows.share_seen(sum(lengths))
        attention_s = layers.count * (seen * layer.kernel_s + layer.other_s)
        waiting_s = layers.count * layer.exposed_s
        woken = layers.count * layers.woken(max(lengths))
        products = products_s(self.device, layers.token_parameters, max(lengths), beside=woken)
        if rows is not None:
            keys = products_s(self.device, model.cross.key_parameters, max(lengths))
            return {
                "encoder": products + attention_s,
                "projection of K and V": model.cross.count * keys,
                "network": waiting_s,
            }
        of_states, states_waiting_s = self._states()
        # The prompt's last logits go to every rank.
        logits = self.others.gather(self.scenario.element_bytes * model.vocabulary)
        return {
            "text": products + products_s(self.device, model.vocabulary * model.text.hidden, 1),
            "attention": attention_s,
            **of_states,
            "network": waiting_s + states_waiting_s + logits.seconds,
        }

    def _states(self) -> tuple[dict[str, float], float]:
        """The layers that carry a state, and what they wait for others; the state behind the prompt
        goes to every rank."""
        layers, e, lengths = self.model.recurrent, self.scenario.element_bytes, self.share.rows
        if layers is None:
            return {}, 0.0
        rule = recurrent.cost(layers, self.cluster, lengths, element_bytes=e).forward
        products = layer_s(self.device, layers, max(lengths))
        state = recurrent.state_bytes(recurrent.spread(layers, self.ranks), element_bytes=e)
        waiting_s = rule.exposed_s + self.others.gather(state / self.ranks).seconds
        seconds = layers.count * (products + rule.seconds - rule.exposed_s)
        return {"layers with a state": seconds}, layers.count * waiting_s

    def _cross_parts(self) -> dict[str, float]:
        count, layer = self.model.cross.count, self._cross(queries=self.scenario.text_tokens)
        text = self._text(self.ranks if self.share.splits_text else 1)
        return {
            "projection of K and V": count * (layer.projection_s + self._keys_s()),
            "visual keys": count * (layer.kernel_s + layer.other_s),
            "network": count * layer.exposed_s + text.waiting_s,
            "text": text.seconds,
        }

    def _text(self, ranks: int) -> _Text:
        """A prompt's text, by parts on so many ranks; then every rank gets the last logits, and,
        where they are not to stay, K and V of all."""
        text, e, others = self.model.text, self.scenario.element_bytes, Ranks(self.cluster, ranks)
        of_layers, of_head = self._decoder_parameters()
        lengths = evenly(self.scenario.text_tokens, ranks)
        shape = replace(self.scenario.shape(text, lengths, lengths), backward=False)
        way = "ulysses" if text.heads >= ranks else "ring"
        attention = cost(shape, self.cluster, way).forward
        tokens = -(-self.scenario.text_tokens // ranks)
        waiting_s = others.gather(e * self.model.vocabulary).seconds
        waiting_s += text.count * attention.exposed_s
        if not self.share.keeps_text:
            keys = 2 * e * tokens * text.kv_heads * text.head_dim
            waiting_s += text.count * others.gather(keys).seconds
        products = products_s(self.device, of_layers, tokens) + products_s(self.device, of_head, 1)
        attending_s = text.count * (attention.seconds - attention.exposed_s)
        return _Text(products + attending_s, waiting_s)

    def _written_s(self, nbytes: float, *, copies: int = 1) -> float:
        """So many bytes into new memory, in each of some copies."""
        return copies * nbytes * (1 / self.device.stream_bytes_per_s + self.device.new_byte_s)

    def _keys_s(self) -> float:
        """Of a layer, what K and V take beside their products: new memory, and K's norm in fp32."""
        device, cross = self.device, self.model.cross
        numbers = self.share.visual_tokens * cross.kv_heads * cross.head_dim
        written = self._written_s(2 * numbers * self.scenario.element_bytes)
        norm_s = _NORM_NUMBERS / device.stream_bytes_per_s + _NORM_NEW * device.new_byte_s
        return written + numbers * FP32_BYTES * norm_s

    # ---- what comes on top

    def _whole(
        self, parts: dict[str, float], parameters: int, *, messages: int
    ) -> dict[str, float]:
        """With what gathering so many weights takes, and the host's time, as far as they do not run
        under the other parts; so many layers send a message."""
        moved = self._weights(parameters)
        if moved.messages:
            exposed_s = max(0.0, moved.busy_s - sum(parts.values())) + moved.latency_s
            parts = {**parts, "ZeRO, network": exposed_s}
        device, model = self.device, self.model
        # Cross-attention without an MLP is a part of the text's layers.
        layers = model.text.count + sum(each.count for each in model.crossing if each.mlp)
        seconds = device.token_s + layers * device.layer_s
        if device.cross_layer_s is not None:
            alone = sum(each.count for each in (model.text, *model.crossing)) - messages
            seconds = device.token_s + alone * device.layer_s + messages * device.cross_layer_s
        if not device.on_cpu:  # a GPU works meanwhile
            seconds = max(seconds - sum(parts.values()), 0.0)
        return {**parts, "host": seconds}

    def _weights(self, parameters: int) -> Transfer:
        """The gathering of so many weights for a forward, a layer at a time, at ZeRO-3."""
        if self.scenario.zero_stage < 3:
            return Transfer(0.0, 0.0, 0, 0)
        gpus, model = self.cluster.gpus, self.model
        whole = Ranks(self.cluster, gpus).gather(self.scenario.element_bytes * parameters / gpus)
        layers = sum(each.count for each in (model.text, *model.crossing)) + model.embeddings
        return replace(whole, latency_s=layers * whole.latency_s)

    def _decoder_parameters(self) -> tuple[int, int]:
        """Weights that each token goes through: of layers, and of the head."""
        layers = self.model.text.token_parameters
        for each in self.model.crossing:
            layers += each.count * each.query_parameters
            if self.share.keeps_prompt:  # these layers have keys of the answer's own tokens, too
                layers += each.count * each.key_parameters
        return layers, self.model.vocabulary * self.model.text.hidden

    def _token_parameters(self) -> int:
        """Weights of the modules that run for a token: its layers with all of their experts, and
        each table of the vocabulary."""
        layers, table = self._decoder_parameters()
        kinds = (self.model.text, *self.model.crossing)
        others = sum(each.count * each.others for each in kinds)
        return layers + others + self.model.embeddings * table


class _Text(NamedTuple):
    seconds: float  # computing
    waiting_s: float  # for other ranks
