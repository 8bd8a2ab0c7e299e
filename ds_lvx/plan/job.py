"""What shall be trained, and how: the question that the planner answers."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvx.attention.shape import AttentionShape, evenly
from ds_lvx.plan.models import Model

TRAINED = ("all", "cross")


@dataclass(frozen=True)
class Job:
    """One training step of a model.

    Attributes:
        model: what is trained.
        text_tokens: of a sample.
        frames: of a sample.
        zero_stage: of DeepSpeed.
        recompute: lvx projects K and V again in backward.
        checkpointing: layers are checkpointed.
        trains: ``"all"`` weights, or ``"cross"``: the cross-attention layers and the projector.
        element_bytes: of weights and activations.
    """

    model: Model
    text_tokens: int
    frames: int
    zero_stage: int = 3
    recompute: bool = True
    checkpointing: bool = True
    trains: str = "all"
    element_bytes: int = 2

    def __post_init__(self) -> None:
        for name in ("text_tokens", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.zero_stage not in range(4):
            raise ValueError(f"zero: got {self.zero_stage}; expected a stage from 0 to 3")
        if self.trains not in TRAINED:
            raise ValueError(f"train: got {self.trains!r}; expected one of {list(TRAINED)}")

    @property
    def visual_tokens(self) -> int:
        """Of a sample, as cross-attention sees them."""
        return self.frames * self.model.frame_tokens

    @property
    def trained_parameters(self) -> int:
        """Weights that get a gradient."""
        model = self.model
        return model.parameters if self.trains == "all" else model.cross_parameters

    def frames_of_a_rank(self, ranks: int) -> int:
        """Frames of the rank that holds most; a frame is not split."""
        return -(-self.frames // ranks)

    def cross_shape(self, ranks: int, *, recompute: bool) -> AttentionShape:
        """One cross-attention layer."""
        cross = self.model.cross
        frames = evenly(self.frames, ranks)
        return AttentionShape(
            batch=1,
            q_lengths=tuple(evenly(self.text_tokens, ranks)),
            kv_lengths=tuple(count * self.model.frame_tokens for count in frames),
            heads=cross.heads,
            kv_heads=cross.kv_heads,
            head_dim=cross.head_dim,
            element_bytes=self.element_bytes,
            recompute=recompute,
            features_dim=cross.features_dim,
        )

    def text_shape(self, ranks: int) -> AttentionShape:
        """One self-attention layer of the text."""
        text, lengths = self.model.text, tuple(evenly(self.text_tokens, ranks))
        return AttentionShape(
            batch=1,
            q_lengths=lengths,
            kv_lengths=lengths,
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            element_bytes=self.element_bytes,
        )
