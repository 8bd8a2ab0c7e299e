"""Memory of a rank in a generation with the visual keys sharded, and which tokens it has.

docs/generation.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_lvx.attention.shape import evenly
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


def with_text(scenario: Scenario) -> Scenario:
    """The same; where visual tokens are gathered, they are text, which every rank has."""
    model = scenario.model
    if not (model.gathered and model.among):
        return scenario
    whole = replace(model, text=model.cross, cross=replace(model.cross, count=0), among=False)
    return replace(scenario, model=whole, text_tokens=scenario.sequence)


def keeps_prompt(scenario: Scenario) -> bool:
    """Whether a rank keeps K and V of its part of the prompt: of text, or of an encoder's rows.

    All of such a prompt runs split over the ranks, as in training.
    """
    return scenario.model.among or scenario.model.rows is not None


def rows_of_ranks(scenario: Scenario, ranks: int) -> Sequence[int]:
    """Tokens of such a prompt by rank, visual ones and text, the rank that has most first.

    Text is dealt around the visual tokens, and these stay on the rank that encodes their frame.
    """
    tokens = scenario.text_tokens + scenario.visual_tokens
    most = max(-(-tokens // ranks), scenario.visual_tokens_of_a_rank(ranks))
    return [most, *(evenly(tokens - most, ranks - 1) if ranks > 1 else [])]


def splits_text(scenario: Scenario, ranks: int) -> bool:
    """Whether text beside the images is so long that each rank runs its part of the prompt."""
    beside = not scenario.model.gathered and not keeps_prompt(scenario)
    return beside and limits.splits(scenario.text_tokens, ranks)


def prompt_tokens(scenario: Scenario, ranks: int) -> int:
    """Tokens of text beside the images that a rank runs in the prompt's forward."""
    return -(-scenario.text_tokens // (ranks if splits_text(scenario, ranks) else 1))


def keeps_text(scenario: Scenario, ranks: int) -> bool:
    """Whether a rank keeps K and V of its part of that text, as ``text_keys="auto"`` has it."""
    whole = scenario.text_tokens * _token_bytes(scenario)
    return splits_text(scenario, ranks) and whole > limits.SHARDED_BYTES


def held(scenario: Scenario, *, ranks: int, new_tokens: int, gpus: int = 1) -> Held:
    """Predict the memory of the rank that holds most.

    Args:
        scenario: at ``zero_stage`` 3 the GPUs share the weights.
        ranks: that share the sample.
        new_tokens: of the answer.
        gpus: in all.
    """
    scenario = with_text(scenario)
    shares = gpus if scenario.zero_stage == 3 else 1
    model, e, cross = scenario.model, scenario.element_bytes, scenario.model.cross
    frames_tokens = scenario.frames_of_a_rank(ranks) * model.tower_tokens
    vision, _ = tower_bytes(replace(scenario, trains="cross"), frames_tokens)
    tokens = scenario.visual_tokens_of_a_rank(ranks)
    text = text_bytes(scenario, ranks=ranks, new_tokens=new_tokens)
    if keeps_prompt(scenario):
        tokens = max(rows_of_ranks(scenario, ranks))
    numbers = tokens * cross.kv_heads * cross.head_dim
    keys = cross.count * 2 * e * numbers
    if model.rows is not None:  # a layer, which is over when the decoder makes its keys
        width = tokens * model.rows.hidden
        layers = max(LAYER_BYTES * width, e * width + keys)
    elif model.among:
        layers = tokens * _layer_bytes(scenario, ranks) + keys + 2 * carried_bytes(scenario)
    else:
        norm = numbers * (e + _NORM_TENSORS * FP32_BYTES)
        last = max(norm, 2 * e * numbers) if cross.count else 0
        layers = max(cross.count - 1, 0) * 2 * e * numbers + last
        layers += _running_text_bytes(scenario, ranks, text)
    return Held(
        weights=-(-e * model.parameters // shares),
        keys=keys,
        text=text,
        prompt=max(vision, features_bytes(scenario, ranks) + layers),
        gathered=gathered_bytes(scenario) if shares > 1 else 0,
        carried=2 * carried_bytes(scenario),
    )


def _layer_bytes(scenario: Scenario, ranks: int) -> int:
    """Of a token in a layer that runs; one with a state has as much as it keeps in training."""
    layers, e = scenario.model.recurrent, scenario.element_bytes
    least = LAYER_BYTES * scenario.model.cross.hidden
    if layers is None:
        return least
    return max(least, int(recurrent.kept_bytes(layers, ranks=ranks, element_bytes=e)))


def carried_bytes(scenario: Scenario) -> int:
    """Of the states of all layers that carry one."""
    layers = scenario.model.recurrent
    if layers is None:
        return 0
    return layers.count * recurrent.state_bytes(layers, element_bytes=scenario.element_bytes)


def _running_text_bytes(scenario: Scenario, ranks: int, kept: int) -> int:
    """Of text beside the images while the prompt runs: K and V, and a layer.

    Args:
        scenario, ranks: as of `held`.
        kept: bytes of K and V between two tokens.
    """
    model, tokens = scenario.model, prompt_tokens(scenario, ranks)
    layer = LAYER_BYTES * tokens * model.text.hidden
    if not splits_text(scenario, ranks):
        return kept + layer
    # The queries of all ranks come together, and out of them.
    width = model.cross.heads * model.cross.head_dim
    together = 2 * scenario.element_bytes * scenario.text_tokens * width
    return tokens * _token_bytes(scenario) + max(layer, together)


def text_bytes(scenario: Scenario, *, ranks: int, new_tokens: int) -> int:
    """K and V of the text and so many new tokens that a rank has, or of these alone."""
    tokens = 0 if keeps_prompt(scenario) else scenario.text_tokens
    if keeps_text(scenario, ranks):
        tokens = prompt_tokens(scenario, ranks)
    return (tokens + new_tokens) * _token_bytes(scenario)


def _token_bytes(scenario: Scenario) -> int:
    """K and V of a token in all layers that attend to text."""
    layers = scenario.model.cross if keeps_prompt(scenario) else scenario.model.text
    return 2 * scenario.element_bytes * layers.count * layers.kv_heads * layers.head_dim


def features_bytes(scenario: Scenario, ranks: int) -> int:
    """Of a rank's features."""
    cross, tokens = scenario.model.cross, scenario.visual_tokens_of_a_rank(ranks)
    return scenario.element_bytes * tokens * (cross.features_dim or cross.hidden)
