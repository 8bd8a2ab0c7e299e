"""The contract of a model family: what ds_lvx asks of a model that it shards.

A family is a class derived from `Family` (or a class or module with the same names), made known by
`ds_lvx.register_family`; ``docs/adding-a-model.md`` has a whole one that runs. It says what only
the model can know. All else is shared code of this package: cutting the text, labels and positions,
balancing images over ranks, agreeing on all ranks, blank frames, refusing what cannot be sharded,
carrying the keyword ``ds_lvx`` to the layers.

Two kinds of models exist. In a *cross* model text attends to visual features that its layers get
beside the text; they stay on the rank that encoded them. The parts below are for those. Where an
encoder makes these features of one sequence of text and images, its layers are of kind ``"self"``,
with layouts of their own (`ds_lvx.models.visual.Visual.layouts`). In a *concatenated* model visual
tokens stand among the text's; such a family has layers of kind ``"self"`` and ``"local"`` only, or
``"recurrent"`` ones that carry a state along the text, and its `Visual` is not ``attended``. It
derives from `ds_lvx.models.concatenated.family.Concatenated`, whose tokens stay on the rank that
encodes them; where an adapter makes only a few of an image, they are gathered
(``ds_lvx/models/adapters/``).

Shapes: ``B`` samples, ``T`` text tokens of the whole sequence. A *unit* is a piece of the visual
input that no rank cuts: an image, or a frame of a video.

The parts about users' images and videos are in `ds_lvx.models.media`; `Family` has them all.

This module imports no torch: `ds-lvx plan` asks for dimensions without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ds_lvx.models.media import TakesMedia
from ds_lvx.models.size import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ds_lvx.models.batch import ShardedBatch
    from ds_lvx.models.dimensions import Model
    from ds_lvx.models.layers import Layer, LayerPlan
    from ds_lvx.models.patch import PatchedAttention
    from ds_lvx.models.text import Text
    from ds_lvx.models.visual import Visual


class Family(TakesMedia, ABC):
    """What a family offers. Abstract parts are required; a tool names an optional one it misses.

    Attributes:
        keys: what a batch may hold beside ``input_ids``, ``attention_mask``, ``position_ids`` and
            ``labels``.
        features_key: the keyword by which the text model gets its visual features; empty where
            they stand among the text.
        always: arguments that every shard carries.
        patterns: the pattern of each kind of layer (``"local"``, ``"cross"``, ``"self"``), in this
            order, for the rules of a ds_config that a tool writes.
        skips_vision: a batch without images leaves out tower and cross-attention; else it has a
            blank one that nobody sees, as models want it whose layers run for every token.
        splits_prompt: a long prompt is split, and a long text behind a cache: text layers `fill`
            the cache, then attend.
        zigzag: ``text_order`` may cut its text: its code asks `ShardedBatch.places`, position ids.
        shares_prefixes: one row is made of those that begin alike: by `ds_lvx.models.visual.Visual.
            share` where images stand beside the text, else by `share_prefixes`.
        without: methods that cross-attention of some of its models cannot run, and why; a tool
            leaves them out.
    """

    keys: tuple[str, ...] = ()
    features_key: str = "features"
    always: Mapping[str, Any] = {"use_cache": False}
    patterns: Mapping[str, str] = {}
    skips_vision: bool = True
    splits_prompt: bool = False
    zigzag: bool = False
    shares_prefixes: bool = False
    without: Mapping[str, str] = {}

    # ---- required: patching a model

    @abstractmethod
    def find(self, model: nn.Module) -> Any:
        """The family's model inside ``model``, out of wrappers such as peft's; or None."""

    @abstractmethod
    def attention_layers(self, model: Any) -> list[Layer]:
        """Every attention module of the model, by its qualified name, in order."""

    @abstractmethod
    def forward(self, layer: Layer, plan: LayerPlan) -> PatchedAttention:
        """What takes the place of an attention module's forward; not asked for ``"local"`` layers.

        A `ds_lvx.models.patch.ShardedForward` whose ``sharded`` hands ``q [B, s, heads, head_dim]``
        to `ds_lvx.models.attend.attend`; or, for text that calls transformers' attention interface
        and whose K and V autograd keeps, `ds_lvx.models.dispatch.Dispatched`.
        """

    @abstractmethod
    def text_model(self, model: Any) -> nn.Module:
        """The module that runs the text's layers. It must be called with keywords, get the features
        as `features_key`, and hand keywords that it does not know on to its attention."""

    # ---- required: cutting a batch

    @abstractmethod
    def visual(self, batch: Mapping[str, Any], text: Text, model: Any) -> Visual:
        """The visual part of a batch: its units, and which of them each text token sees.

        Args:
            batch: what the caller gave; entries that are None are left out.
            text: its text, checked.
            model: the model that will get the shard; in the data workers of `launch/finetune.py`
                something that has its ``config`` and nothing else.

        Raises:
            ValueError: entries that contradict each other or the model.
        """

    @abstractmethod
    def blank(self, model: Any) -> dict[str, Tensor]:
        """Model arguments for one sample of one blank unit. A rank without units runs it through
        the tower and drops the result, so that it takes part in ZeRO-3's gathers and its gradients
        are 0, not absent."""

    # ---- with defaults

    def text(self, batch: Mapping[str, Any], model: Any) -> Text:
        """The text that looks at visual features, checked. It is cut evenly over the ranks; one of
        a class of its own may stay whole on each.

        Args:
            batch, model: as of `visual`.

        Raises:
            ValueError: it is missing, or its entries have different shapes.
        """
        from ds_lvx.models.text import Text

        return Text.of(batch)

    def share_prefixes(
        self,
        text: Text,
        batch: Mapping[str, Any],
        model: Any,
        *,
        together: Sequence[int] | None = None,
    ) -> Text:
        """The text with rows that begin alike, images among it included, as one row; here as it is.

        Args:
            text: of the batch, before it is dealt.
            batch, model: as of `visual`.
            together: `ds_lvx.models.prefixes.TOGETHER` of a batch of local frames; None: the pixels
                are those of all samples, and say whose images are the same.
        """
        return text

    def complete(self, visual: Visual, model: Any) -> Visual:
        """The visual part of a batch with what only the model itself says of it: a draft of a data
        worker's has none of that. Nothing that ranks tell each other of a draft may depend on it.

        Args:
            visual: as `visual` made it, and cut to what this rank holds.
            model: that will get the shard.
        """
        return visual

    def check(self, model: Any, *, sp_size: int) -> None:
        """Refuse a model that cannot be sharded over ``sp_size`` ranks.

        Raises:
            NotImplementedError: says what of it, and what serves.
        """
        return

    def prepare(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of the text model for a sharded batch: masks that it would miss.

        Args:
            batch: the keyword.
            arguments: of the text model; the features are ``[B, s_kv, hidden]`` already.
        """
        return {}

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        """Put further hooks on the model, of classes derived from `ds_lvx.models.patch.Hook`."""
        return

    def encoders(self, model: Any) -> Sequence[nn.Module]:
        """Encoders of images with ``layers``, whose checkpointing transformers leaves undone."""
        return ()

    # ---- for generating

    def generator(self, model: Any) -> Any:
        """The module whose ``generate`` runs, transformers' own, and whose forward gets keywords.

        Raises:
            NotImplementedError: a model that cannot generate with its keys sharded; says why.
        """
        raise self.lacks("generator", "ds_lvx.generate")

    def decode(self, batch: ShardedBatch, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of the text model for a forward of generation, as `prepare`.

        Args:
            batch: the keyword. Every rank has the whole text (else it is `prepare` that is asked);
                after the prompt a forward has one token a row.
            arguments: of the text model; its features are kept elsewhere, and there is a tensor
                ``[rows, 0, hidden]`` in their place.
        """
        return {}

    # ---- for the planner

    def dimensions(self, config: Mapping[str, Any], name: str, source: str) -> Model:
        """What `ds-lvx plan` has to know of a model, from the fields of its ``config.json``.

        Args:
            config: the file's contents.
            name, source: go into the result.
        """
        raise self.lacks("dimensions", "ds-lvx plan")

    def frame_tokens(self, config: Any) -> int:
        """Visual tokens that cross-attention sees of a frame, padding included."""
        raise self.lacks("frame_tokens", "the report of tokens a second")

    # ---- for models with random weights

    def config(self, size: Size) -> Any:
        """The configuration of a model cut to a size."""
        raise self.lacks("config", "a model with random weights")

    def size(self, config: Any = None) -> Size:
        """The size of a configuration; None is the published model's own."""
        raise self.lacks("size", "ds-lvx compare --model")

    def build(self, config: Any, *, gate: float, dtype: torch.dtype) -> Any:
        """A model with random weights, by torch's generator, its gates opened to ``gate``.

        Shut, as in a new model, the gradients of K and V would be zeros.
        """
        raise self.lacks("build", "a model with random weights")

    def tiny(self) -> tuple[Any, Any]:
        """Configuration and processor of a tiny model for trying out; nothing is downloaded."""
        raise self.lacks("tiny", "--model tiny")

    def pixel_batch(self, config: Any, input_ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """What the processor returns for frames whose pixels are ready.

        Args:
            config: of the model.
            input_ids: ``[B, T]`` with an image token for each frame.
            pixels: ``[B, N, 3, image_size, image_size]``, normalised; a frame fills one tile.

        Returns:
            A batch for `ds_lvx.shard_batch` as for the model itself.
        """
        raise self.lacks("pixel_batch", "a batch of ready pixels")

    def random_frames(
        self, config: Any, *, text_tokens: int, total: int, frames: Iterable[int], seed: int
    ) -> dict[str, Tensor]:
        """One sample of random text and frames whose every token sees every frame, for measuring.

        Args:
            config: of the model.
            text_tokens: T.
            total: frames of the sample, over all ranks.
            frames: which of them this rank holds; a frame is the same whoever makes it.
            seed: of text and frames.

        Returns:
            A batch for ``ds_lvx.shard_batch(..., frames="local")``, pixels in float32.
        """
        raise self.lacks("random_frames", "ds-lvx compare")

    def regions(self) -> Mapping[str, str]:
        """Part of a step (``"vision"``, ``"text"``, ``"cross_attention"``) by a regular expression
        for the whole name of a module."""
        raise self.lacks("regions", "the breakdown of a step")

    # ---- for training on users' data

    lora_targets: str = r".*\.(q_proj|k_proj|v_proj|o_proj)"
    """The text's attention projections, a regular expression for the whole name of a module."""

    def config_class(self) -> Any:
        """The class of its configurations where transformers knows none; else None."""
        return None

    def load(
        self, name: str, dtype: torch.dtype, *, trust_remote_code: bool = False, **more: Any
    ) -> Any:
        """A checkpoint's model, from a folder or the hub.

        Args:
            name: of the folder, or on the hub.
            dtype: of the weights.
            trust_remote_code: code that comes with the checkpoint may run.
            more: for transformers' ``from_pretrained``: how to quantize, with --load_in_4bit.
        """
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, **more
        )

    def load_processor(self, name: str) -> Any:
        """A checkpoint's processor, with ``tokenizer``, ``image_token`` and ``image_token_id``."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(name)

    def vision_tower(self, model: Any) -> nn.Module:
        """What ``--freeze_vision`` leaves untrained."""
        raise self.lacks("vision_tower", "--freeze_vision")

    def has(self, part: str) -> bool:
        """Whether this family has an optional part."""
        return getattr(type(self), part) is not getattr(Family, part)
