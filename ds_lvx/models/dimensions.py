"""What the planner has to know of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Layers:
    """Transformer layers of one kind.

    Attributes:
        count: how many.
        hidden: width.
        heads, kv_heads, head_dim: of attention.
        mlp: inner width; 0 where there is none.
        mlp_matrices: 3 with a gate, 2 without.
        features_dim: width of what K and V are made of; 0 is ``hidden``.
        others: weights of a layer that a token does not go through: experts that it is not sent
            to, with the router that knows of them. ``mlp`` are then those that it is sent to.
        plain_mlp: of ``mlp`` what is beside such experts, in linear layers.
        gated: what attention gives is gated, by as many numbers of the projection of q.
        gated_mlp: so is what ``plain_mlp`` gives, by one number.
    """

    count: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int = 0
    mlp_matrices: int = 3
    features_dim: int = 0
    others: int = 0
    plain_mlp: int = 0
    gated: bool = False
    gated_mlp: bool = False

    @property
    def query_parameters(self) -> int:
        """Weights of a layer that every token of its own goes through."""
        out = self.hidden * self.heads * self.head_dim
        return self._query_width * self.hidden + out + self.mlp_parameters

    @property
    def mlp_parameters(self) -> int:
        """Of these, the MLP's."""
        return self.mlp_matrices * self.hidden * self.mlp + self.hidden * self.gated_mlp

    @property
    def key_parameters(self) -> int:
        """Weights of a layer's projection of K and V."""
        return 2 * (self.features_dim or self.hidden) * self.kv_heads * self.head_dim

    @property
    def token_parameters(self) -> int:
        """Weights that a token goes through in all layers."""
        return self.count * (self.query_parameters + self.key_parameters)

    @property
    def parameters(self) -> int:
        """Weights of all layers."""
        return self.token_parameters + self.count * self.others

    @property
    def largest_layer(self) -> int:
        """Weights of a layer."""
        return self.parameters // self.count

    @property
    def linear_parameters(self) -> int:
        """Weights of a layer's linear layers, which experts are not."""
        return self.query_parameters + self.key_parameters - self._chosen

    @property
    def largest_weight(self) -> int:
        """Numbers of a layer's largest tensor: of experts, which are stacked, gate and up."""
        mlp = self.hidden * self.mlp
        if self.others:
            mlp = 2 * (self._chosen + self.others) // 3
        return max(mlp, self.hidden * self._query_width)

    def lora_parameters(self, rank: int) -> int:
        """What LoRA of a rank adds to a layer, at its projections of q, k, v and out."""
        out, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        queries = 2 * self.hidden + self._query_width + out
        return rank * (queries + 2 * (self.features_dim or self.hidden) + 2 * keys)

    def woken(self, tokens: int) -> float:
        """Of `others`, weights that are read for so many tokens, which choose experts at random."""
        experts = self._chosen + self.others
        unread = (1 - self._chosen / experts) ** tokens if self.others else 0.0
        return experts * (1 - unread) - self._chosen

    @property
    def _query_width(self) -> int:
        """Numbers that a token's projection of q gives."""
        return (1 + self.gated) * self.heads * self.head_dim

    @property
    def _chosen(self) -> int:
        """Weights of the experts that a token is sent to, in a layer."""
        mlp = self.mlp - self.plain_mlp if self.others else 0
        return self.mlp_matrices * self.hidden * mlp


@dataclass(frozen=True)
class RowLayers(Layers):
    """Layers of an encoder in which all visual tokens of a sample attend to each other.

    Attributes:
        full: how many of them see all; the others a window.
        window: tokens of it.
    """

    full: int = 0
    window: int = 0

    def share_seen(self, tokens: int) -> float:
        """Of all pairs of so many tokens, those that a layer sees, on average."""
        windowed = min(self.window / tokens, 1.0) * (self.count - self.full)
        return (self.full + windowed) / self.count


@dataclass(frozen=True)
class RecurrentLayers(Layers):
    """Layers that carry a state along the text: Gated DeltaNet, as Qwen3.5 has it.

    ``kv_heads`` are its heads of keys, ``heads`` and ``head_dim`` those of values.

    Attributes:
        key_dim: numbers of a head of keys, and of queries.
        kernel: tokens that its convolution sees.
    """

    key_dim: int = 0
    kernel: int = 0

    @property
    def values(self) -> int:
        """Numbers of a token's values, and of what gates them."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return 2 * self.kv_heads * self.key_dim + self.values

    @property
    def query_parameters(self) -> int:
        """Weights of a layer: those of linear layers, convolution, decay and norm."""
        linear = self.channels + 2 * self.values + 2 * self.heads
        return self.hidden * linear + self._beside + self.mlp_parameters

    @property
    def key_parameters(self) -> int:
        """None: keys are made with the rest."""
        return 0

    @property
    def linear_parameters(self) -> int:
        """Weights of a layer's linear layers."""
        return super().linear_parameters - self._beside

    def lora_parameters(self, rank: int) -> int:
        """What LoRA of a rank adds to a layer, at what makes q, k, v and the gate, and at out."""
        return rank * (3 * self.hidden + self.channels + 2 * self.values)

    @property
    def _query_width(self) -> int:
        return self.channels

    @property
    def _beside(self) -> int:
        """Weights that are in no linear layer."""
        return self.channels * self.kernel + 2 * self.heads + self.head_dim


@dataclass(frozen=True)
class Model:
    """A multimodal model, with cross-attention or with visual tokens among the text's.

    Attributes:
        name: as on the Hugging Face hub.
        text: its self-attention layers.
        cross: its cross-attention layers; without an MLP where they sit inside text layers.
        vocabulary: of the text.
        tower: the vision tower's layers.
        tower_tokens: that the tower works on, a frame.
        frame_tokens: visual tokens that cross-attention sees, a frame.
        projector_parameters: between tower and cross-attention.
        tower_states: states of the tower's width that it keeps for each of its tokens, frozen too.
        source: of all these numbers.
        rows: of an encoder between projector and cross-attention; None: there is none.
        embeddings: tables of the vocabulary, for what goes in and what comes out.
        recomputes: cross-attention layers can project K and V again.
        among: visual tokens stand among the text's. All layers of the text are ``cross`` then, and
            ``text`` has none: they attend to both, each token to those before it.
        gathered: they are few, and in generation every rank has those of all.
        recurrent: layers of the text that carry a state instead of attending; None: there are none.
        windowed, window: where visual tokens stand among the text, layers of ``cross`` in which a
            token sees so many, with itself; the others see all before it.
    """

    name: str
    text: Layers
    cross: Layers
    vocabulary: int
    tower: Layers
    tower_tokens: int
    frame_tokens: int
    projector_parameters: int
    tower_states: int
    source: str
    rows: RowLayers | None = None
    embeddings: int = 2
    recomputes: bool = True
    among: bool = False
    gathered: bool = False
    recurrent: RecurrentLayers | None = None
    windowed: int = 0
    window: int = 0

    def share_seen(self, tokens: int) -> float:
        """Of all pairs of a query and a key of ``cross``, those that a layer sees, on average.

        Args:
            tokens: that attend to each other, where visual tokens stand among the text.
        """
        if not self.among:
            return 1.0
        full, part = self.cross.count - self.windowed, self.share_in_window(tokens)
        return (0.5 * full + part * self.windowed) / self.cross.count

    def share_in_window(self, tokens: int) -> float:
        """Likewise of a layer with a window."""
        part = min(self.window / tokens, 1.0)
        return (1 - 0.5 * part) * part

    @property
    def parameters(self) -> int:
        """Weights of the model, embeddings in and out included; norms and biases left out."""
        embeddings = self.embeddings * self.vocabulary * self.text.hidden
        layers = self.text.parameters + self.cross.parameters + self.tower.parameters
        layers += sum(each.parameters for each in (self.rows, self.recurrent) if each is not None)
        return layers + embeddings + self.projector_parameters

    def with_frames(self, frames: int) -> Model:
        """The same for samples of so many frames, of a model that makes many of them smaller."""
        return self

    @property
    def projector_tokens(self) -> int:
        """Of a frame, that the projector works on."""
        return self.tower_tokens

    @property
    def cross_parameters(self) -> int:
        """Weights of the cross-attention layers and the projector."""
        return sum(each.parameters for each in self.crossing) + self.projector_parameters

    @property
    def crossing(self) -> tuple[Layers, ...]:
        """The cross-attention layers, by kind: where visual tokens stand among the text's, all of
        the text."""
        return (self.cross,) if self.recurrent is None else (self.cross, self.recurrent)

    @property
    def decoding(self) -> tuple[Layers, ...]:
        """All layers behind tower and projector, by kind."""
        kinds = (self.text, self.cross, self.rows, self.recurrent)
        return tuple(each for each in kinds if each is not None and each.count)

    @property
    def largest_layer(self) -> int:
        """Weights of the largest layer, or of a table of the vocabulary."""
        layers = (each.largest_layer for each in (*self.decoding, self.tower))
        return max(self.vocabulary * self.text.hidden, *layers)

    @property
    def largest_weight(self) -> int:
        """Numbers of the largest tensor."""
        layers = (each.largest_weight for each in (*self.decoding, self.tower))
        return max(self.vocabulary * self.text.hidden, *layers)


def decoder(config: Mapping[str, Any], *, count: int) -> Layers:
    """A text model's layers, from the fields that most configs have."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Layers(
        count=count,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or hidden // heads,
        mlp=config["intermediate_size"],
    )


def text_config(
    layers: int, hidden: int, heads: int, mlp: int, *, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """A text model's config in the words that most have, which `decoder` reads, with ``more``."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        **more,
    }


def tower_config(
    layers: int, width: int, heads: int, mlp: int, *, side: int, patch: int
) -> dict[str, Any]:
    """Likewise a vision tower's, which `tower` reads, for frames of ``side`` pixels by side."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "image_size": side,
        "patch_size": patch,
    }


def among_text(layers: Layers) -> dict[str, Any]:
    """Fields of a `Model` whose visual tokens stand among the text's, which has such layers."""
    return {
        "text": replace(layers, count=0),
        "cross": replace(layers, features_dim=layers.hidden),
        "recomputes": False,
        "among": True,
    }


def encoder(depth: int, width: int, *, heads: int, mlp: int) -> Layers:
    """A vision tower's layers: two matrices an MLP, as many heads of keys as of queries."""
    return Layers(depth, width, heads, heads, width // heads, mlp, mlp_matrices=2)


def tower(config: Mapping[str, Any]) -> Layers:
    """The same, from the fields that most configs have."""
    heads, mlp = config["num_attention_heads"], config["intermediate_size"]
    return encoder(config["num_hidden_layers"], config["hidden_size"], heads=heads, mlp=mlp)
