"""Memory of a rank in a generation with the visual keys sharded, and which tokens it has.

docs/generation.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ds_lvx.attention.shape import evenly
from ds_lvx.models.dimensions import Layers
from ds_lvx.models.generating import limits
from ds_lvx.plan import recurrent
from ds_lvx.plan.memory import LAYER_BYTES, gathered_bytes, tower_bytes
from ds_lvx.plan.pieces import FP32_BYTES
from ds_lvx.plan.scenario import Scenario

# Of K in its norm, in fp32: two of what goes in, what is squared, and what comes out.
_NORM_TENSORS = 2


@dataclass(frozen=True)
class Held:
    """Bytes of the rank that holds most."""

    weights: int  # of the whole model; at ZeRO-3 this rank's share
    # K and V of its visual tokens, in all cross-attention layers; of its part of the prompt, where
    # visual tokens stand among the text or an encoder has both.
    keys: int
    # K and V of the text, all or this rank's part, and of the answer, which every rank has; there
    # of the answer.
    text: int
    # The most that the prompt's forward has beside the weights: in the vision tower, or where the
    # last cross-attention layer makes its keys.
    prompt: int
    gathered: int = 0  # weights that ZeRO-3 has whole at a time
    # States of layers that carry one, whole on every rank: as they are, and behind the prompt.
    carried: int = 0

    @property
    def kept(self) -> int:
        """Between two tokens, beside the weights."""
        return self.keys + self.text + self.carried

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return self.weights + self.gathered + max(self.prompt, self.kept)


@dataclass(frozen=True)
class Share:
    """What a rank of a generation has, of the rank that has most."""

    scenario: Scenario
    ranks: int  # that share the sample

    @classmethod
    def of(cls, scenario: Scenario, ranks: int) -> Share:
        """Where visual tokens are gathered, they are text, which every rank has."""
        model = scenario.model
        if model.gathered and model.among:
            cross = replace(model.cross, count=0)
            model = replace(model, text=model.cross, cross=cross, among=False)
            scenario = replace(scenario, model=model, text_tokens=scenario.sequence)
        return cls(scenario, ranks)

    # ---- tokens

    @property
    def keeps_prompt(self) -> bool:
        """Whether a rank keeps K and V of its part of the prompt: of text, or of an encoder's rows.

        All of such a prompt runs split over the ranks, as in training.
        """
        return self.scenario.model.among or self.scenario.model.rows is not None

    @cached_property
    def rows(self) -> Sequence[int]:
        """Tokens of such a prompt by rank, visual ones and text, the rank that has most first.

        Text is dealt around the visual tokens, which stay on the rank that encodes their frame.
        """
        tokens = self.scenario.text_tokens + self.scenario.visual_tokens
        most = max(-(-tokens // self.ranks), self.visual_tokens)
        return [most, *(evenly(tokens - most, self.ranks - 1) if self.ranks > 1 else [])]

    @property
    def visual_tokens(self) -> int:
        """Of its frames."""
        return self.scenario.visual_tokens_of_a_rank(self.ranks)

    @property
    def splits_text(self) -> bool:
        """Whether text beside the images is so long that each rank runs its part of the prompt."""
        beside = not self.scenario.model.gathered and not self.keeps_prompt
        return beside and limits.splits(self.scenario.text_tokens, self.ranks)

    @property
    def prompt_tokens(self) -> int:
        """Of text beside the images, those that run in the prompt's forward."""
        return -(-self.scenario.text_tokens // (self.ranks if self.splits_text else 1))

    @property
    def keeps_text(self) -> bool:
        """Whether a rank keeps K and V of its part of that text, as ``text_keys="auto"`` has it."""
        whole = self.scenario.text_tokens * self._token_bytes
        return self.splits_text and whole > limits.SHARDED_BYTES

    # ---- bytes

    def held(self, *, new_tokens: int, gpus: int = 1) -> Held:
        """Predict the memory for an answer of ``new_tokens``.

        At ``zero_stage`` 3 all ``gpus`` share the weights.
        """
        scenario, model, e = self.scenario, self.scenario.model, self.scenario.element_bytes
        shares, cross = gpus if scenario.zero_stage == 3 else 1, model.cross
        towers_tokens = scenario.frames_of_a_rank(self.ranks) * model.tower_tokens
        vision, _ = tower_bytes(replace(scenario, trains="cross"), towers_tokens)
        text = self.text_bytes(new_tokens)
        tokens = max(self.rows) if self.keeps_prompt else self.visual_tokens
        numbers = tokens * cross.kv_heads * cross.head_dim
        keys = cross.count * 2 * e * numbers
        if model.rows is not None:  # a layer, which is over when the decoder makes its keys
            width = tokens * model.rows.hidden
            layers = max(LAYER_BYTES * width, e * width + keys)
        elif model.among:
            layers = tokens * self._layer_bytes + keys + 2 * self.carried_bytes
        else:
            norm = numbers * (e + _NORM_TENSORS * FP32_BYTES)
            last = max(norm, 2 * e * numbers) if cross.count else 0
            layers = max(cross.count - 1, 0) * 2 * e * numbers + last
            layers += self._running_text_bytes(text)
        return Held(
            weights=-(-e * model.parameters // shares),
            keys=keys,
            text=text,
            prompt=max(vision, self.features_bytes + layers),
            gathered=gathered_bytes(scenario) if shares > 1 else 0,
            carried=2 * self.carried_bytes,
        )

    @property
    def _layer_bytes(self) -> int:
        """Of a token in a layer that runs; one with a state has as much as it keeps in training."""
        layers, least = (
            self.scenario.model.recurrent,
            LAYER_BYTES * self.scenario.model.cross.hidden,
        )
        if layers is None:
            return least
        e = self.scenario.element_bytes
        return max(least, int(recurrent.kept_bytes(layers, ranks=self.ranks, element_bytes=e)))

    @property
    def carried_bytes(self) -> int:
        """Of the states of all layers that carry one."""
        layers, e = self.scenario.model.recurrent, self.scenario.element_bytes
        return (
            0 if layers is None else layers.count * recurrent.state_bytes(layers, element_bytes=e)
        )

    def _running_text_bytes(self, kept: int) -> int:
        """Of text beside the images while the prompt runs: K and V, and a layer; ``kept`` are K and
        V between two tokens."""
        scenario, model = self.scenario, self.scenario.model
        layer = LAYER_BYTES * self.prompt_tokens * model.text.hidden
        if not self.splits_text:
            return kept + layer
        # The queries of all ranks come together, and out of them.
        width = model.cross.heads * model.cross.head_dim
        together = 2 * scenario.element_bytes * scenario.text_tokens * width
        return self.prompt_tokens * self._token_bytes + max(layer, together)

    def text_bytes(self, new_tokens: int) -> int:
        """K and V of the text and so many new tokens that a rank has, or of these alone."""
        tokens = 0 if self.keeps_prompt else self.scenario.text_tokens
        if self.keeps_text:
            tokens = self.prompt_tokens
        return (tokens + new_tokens) * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        """K and V of a token in all layers that attend to text."""
        model = self.scenario.model
        layers: Layers = model.cross if self.keeps_prompt else model.text
        return 2 * self.scenario.element_bytes * layers.count * layers.kv_heads * layers.head_dim

    @property
    def features_bytes(self) -> int:
        """Of a rank's features."""
        cross = self.scenario.model.cross
        width = cross.features_dim or cross.hidden
        return self.scenario.element_bytes * self.visual_tokens * width
