"""What shall be trained, and how: the question that the planner answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_lvx.attention.shape import AttentionShape, evenly
from ds_lvx.models.dimensions import Layers, Model

TRAINED = ("all", "cross")


@dataclass(frozen=True)
class Scenario:
    """A model, a sample, and the settings of the training."""

    model: Model  # what is trained
    text_tokens: int  # of a sample
    frames: int  # of a sample
    zero_stage: int = 3  # of DeepSpeed
    recompute: bool = True  # lvx projects K and V again in backward
    checkpointing: bool = True  # of layers
    trains: str = "all"  # weights; or ``"cross"``: the cross-attention layers and the projector
    lora_r: int = 0  # LoRA of this rank trains, in the projections of the text's attention; 0: none
    load_in_4bit: bool = False  # the linear layers under it
    freeze_vision: bool = False  # the tower does not train
    element_bytes: int = 2  # of weights and activations
    loss_tiles: int = 1  # pieces of a rank's text, of which logits are made one after the other

    def __post_init__(self) -> None:
        for name in ("text_tokens", "frames", "loss_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.zero_stage not in range(4):
            raise ValueError(f"zero: got {self.zero_stage}; expected a stage from 0 to 3")
        if self.trains not in TRAINED:
            raise ValueError(f"train: got {self.trains!r}; expected one of {list(TRAINED)}")
        if self.lora_r < 0:
            raise ValueError(f"lora_r: got {self.lora_r}; expected a rank, or 0 for no LoRA")
        if self.load_in_4bit and not self.lora_r:
            raise ValueError("load_in_4bit: got no LoRA; expected its rank beside it: --lora_r 8")
        if self.lora_r and self.trains != "all":
            raise ValueError(f"train: got {self.trains!r} beside LoRA; leave one of them out")

    @property
    def visual_tokens(self) -> int:
        """Of a sample, as cross-attention sees them."""
        return self.frames * self.model.frame_tokens

    @property
    def sequence(self) -> int:
        """Tokens that the text's layers run on."""
        return self.text_tokens + (self.visual_tokens if self.model.among else 0)

    @property
    def attention(self) -> str:
        """What looks at the visual tokens."""
        return "self-attention" if self.model.among else "cross-attention"

    @property
    def pairs_seen(self) -> float:
        """Of all pairs of a query and a key of cross-attention, those that count."""
        return self.model.share_seen(self.sequence)

    @property
    def text_trains(self) -> bool:
        """Whether every weight of the text gets a gradient."""
        return self.trains == "all" and not self.lora_r

    @property
    def vision_trains(self) -> bool:
        """Whether the tower's weights do."""
        return self.text_trains and not self.freeze_vision

    @property
    def cross_trains(self) -> bool:
        """Whether those of projector and cross-attention do."""
        return not self.lora_r

    @property
    def features_train(self) -> bool:
        """Whether something before the keys of cross-attention trains: they want a gradient."""
        return self.cross_trains or self.model.among or self.model.rows is not None

    @property
    def lora_parameters(self) -> int:
        """Weights of LoRA."""
        return sum(each.count * each.lora_parameters(self.lora_r) for each in self.model.decoding)

    @property
    def trained_parameters(self) -> int:
        """Weights that get a gradient."""
        if not self.text_trains:
            return self.lora_parameters or self.model.cross_parameters
        return self.model.parameters - (0 if self.vision_trains else self.model.tower.parameters)

    @property
    def quantized_parameters(self) -> int:
        """Weights in 4 bits."""
        layers = self.model.decoding if self.load_in_4bit else ()
        return sum(each.count * each.linear_parameters for each in layers)

    @property
    def weight_bytes(self) -> int:
        """Of all weights, LoRA's too; of those in 4 bits without their scales."""
        quantized = self.quantized_parameters
        whole = self.model.parameters + self.lora_parameters - quantized
        return self.element_bytes * whole + quantized // 2

    @property
    def passes(self) -> int:
        """Products of a layer in a step: forward, backward through it, its weights' gradients, and
        forward again where it is checkpointed."""
        return 2 + self.text_trains + self.checkpointing

    def frames_of_a_rank(self, ranks: int) -> int:
        """Frames of the rank that holds most; a frame is not split."""
        return -(-self.frames // ranks)

    def recomputes(self, way: str) -> bool:
        """Whether cross-attention layers project K and V again; lvx alone can."""
        return self.recompute and self.model.recomputes and way.startswith("lvx")

    def visual_tokens_of_a_rank(self, ranks: int) -> int:
        """Those of the rank that holds most."""
        return self.frames_of_a_rank(ranks) * self.model.frame_tokens

    def cross_shape(self, ranks: int, way: str) -> AttentionShape:
        """One cross-attention layer."""
        keys = [count * self.model.frame_tokens for count in evenly(self.frames, ranks)]
        if self.model.among:
            keys = evenly(self.sequence, ranks)
        shape = self.shape(self.model.cross, evenly(self.sequence, ranks), keys)
        gradients = self.features_train + self.cross_trains
        return replace(shape, recompute=self.recomputes(way), gradients=gradients)

    def shape(self, layers: Layers, queries: Sequence[int], keys: Sequence[int]) -> AttentionShape:
        """One of some layers, on so many queries and keys by rank."""
        return AttentionShape(
            batch=1,
            q_lengths=tuple(queries),
            kv_lengths=tuple(keys),
            heads=layers.heads,
            kv_heads=layers.kv_heads,
            head_dim=layers.head_dim,
            element_bytes=self.element_bytes,
            features_dim=layers.features_dim,
        )
