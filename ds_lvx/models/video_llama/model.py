"""Video-LLaMA as a model of transformers, with one config and one file of weights.

Names and numbers are those of its repository, so that its checkpoints fit
(`ds_lvx.models.video_llama.convert`). Nothing drops out.

Shapes: ``n`` frames, ``Q`` rows of a frame, ``P`` rows of a video.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)

from ds_lvx.models.video_llama.dimensions import MODEL_TYPE, QFORMER, VISION

_EPS = 1e-12  # of a BERT's norms


class VideoLlamaConfig(PreTrainedConfig):
    """What a model is built from.

    Args:
        text_config: of the language model, a Llama.
        vision: of the tower: ``width``, ``layers``, ``heads``, ``mlp``, ``image_size``,
            ``patch_size``.
        qformer: of both Q-Formers: ``width``, ``heads``, ``mlp``; and of the frames' ``layers`` and
            ``every``: each how manieth of them attends to patches.
        image_token_id: of the places that a video has in the text.
        queries, video_queries: Q and P.
        video_layers: of the video Q-Former.
        frames: that a video may have.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[Mapping[str, Any]] = {"text_config": LlamaConfig}

    def __init__(
        self,
        text_config: Any = None,
        vision: Mapping[str, int] | None = None,
        qformer: Mapping[str, int] | None = None,
        *,
        image_token_id: int = 0,
        queries: int = 32,
        video_queries: int = 32,
        video_layers: int = 2,
        frames: int = 32,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, Mapping):
            text_config = LlamaConfig(**text_config)
        self.text_config = text_config
        self.vision, self.qformer = {**VISION, **(vision or {})}, {**QFORMER, **(qformer or {})}
        self.image_token_id, self.frames = image_token_id, frames
        self.queries, self.video_queries, self.video_layers = queries, video_queries, video_layers
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)


# ---- the tower


class TowerAttention(nn.Module):
    """Of patches, with biases of queries and values alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, patches, width]``."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        made = (self.qkv(x) + bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = made.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(2)))


class TowerMlp(nn.Module):
    """Of two matrices."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]``."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class TowerBlock(nn.Module):
    """A layer of the tower."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = TowerAttention(width, heads), TowerMlp(width, mlp)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, patches, width]``."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Tower(nn.Module):
    """EVA's ViT-g, all of whose states go on."""

    def __init__(self, *, width: int, layers: int, heads: int, mlp: int, **sides: int) -> None:
        super().__init__()
        self.image_size, patch = sides["image_size"], sides["patch_size"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        patches = (self.image_size // patch) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.ModuleList(TowerBlock(width, heads, mlp) for _ in range(layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, side, side]`` to ``[n, patches + 1, width]``."""
        x = cast(Any, self.patch_embed).proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, x)


# ---- the Q-Formers, with a BERT's names


class Heads(nn.Module):
    """Attention to the queries themselves, or to other rows."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(source, width), nn.Linear(source, width)

    def forward(
        self, hidden_states: Tensor, *, encoder_hidden_states: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """``[n, Q, width]`` over ``[n, rows, source]``."""
        rows = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        made = (self.query(hidden_states), self.key(rows), self.value(rows))
        heads = self.num_attention_heads
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in made)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None


class Output(nn.Module):
    """A projection, what it is added to, and a norm."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inside, width), nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """``[n, Q, inside]`` to ``[n, Q, width]``."""
        return cast(Tensor, self.LayerNorm(self.dense(x) + before))


class Attention(nn.Module):
    """With its output."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.self, self.output = Heads(width, source, heads), Output(width, width)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """As of `Heads`."""
        return cast(Tensor, self.output(self.self(x, encoder_hidden_states=rows)[0], x))


class QFormerLayer(nn.Module):
    """Queries attend to themselves, and some layers' to other rows."""

    def __init__(self, width: int, source: int, *, heads: int, mlp: int, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads)
        self.crossattention = Attention(width, source, heads) if crosses else None
        self.intermediate_query = nn.Module()
        self.intermediate_query.dense = nn.Linear(width, mlp)
        self.output_query = Output(mlp, width)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """As of `Heads`."""
        x = self.attention(x)
        if self.crossattention is not None:
            x = self.crossattention(x, rows)
        inside = F.gelu(cast(Any, self.intermediate_query).dense(x))
        return cast(Tensor, self.output_query(inside, x))


class Bert(nn.Module):
    """The layers behind a norm of the queries."""

    def __init__(self, source: int, *, width: int, layers: int, every: int, **sizes: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=_EPS)
        self.encoder.layer = nn.ModuleList(
            QFormerLayer(width, source, **sizes, crosses=number % every == 0)
            for number in range(layers)
        )

    def forward(
        self, query_embeds: Tensor, encoder_hidden_states: Tensor, **_others: Any
    ) -> SimpleNamespace:
        """``last_hidden_state [n, Q, width]`` of queries over ``[n, rows, source]``."""
        x = cast(Any, self.embeddings).LayerNorm(query_embeds)
        for layer in cast(nn.ModuleList, self.encoder.layer):
            x = layer(x, encoder_hidden_states)
        return SimpleNamespace(last_hidden_state=x)


class QFormer(nn.Module):
    """As the repository's, whose layers are in ``bert``."""

    def __init__(self, source: int, **sizes: int) -> None:
        super().__init__()
        self.bert = Bert(source, **sizes)


# ---- the whole


class VideoLlamaModel(PreTrainedModel):
    """The video branch and its language model."""

    config_class = VideoLlamaConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: Any = ("LlamaDecoderLayer",)

    def __init__(self, config: VideoLlamaConfig) -> None:
        super().__init__(config)
        sizes, width, tower = config.qformer, config.qformer["width"], config.vision["width"]
        self.IMAGE_PATCH_TOKEN_ID = config.image_token_id
        self.visual_encoder, self.ln_vision = Tower(**config.vision), nn.LayerNorm(tower)
        self.Qformer = QFormer(tower, **sizes)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, width))
        self.video_frame_position_embedding = nn.Embedding(config.frames, width)
        self.video_Qformer = QFormer(width, **{**sizes, "layers": config.video_layers, "every": 1})
        self.video_query_tokens = nn.Parameter(torch.zeros(1, config.video_queries, width))
        self.llama_proj = nn.Linear(width, config.text_config.hidden_size)
        self.llama_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            initialization.normal_(self.query_tokens, std=0.02)
            initialization.normal_(self.video_query_tokens, std=0.02)
        elif isinstance(module, Tower):
            initialization.normal_(module.cls_token, std=0.02)
            initialization.normal_(module.pos_embed, std=0.02)
        elif isinstance(module, TowerAttention):
            initialization.zeros_(module.q_bias)
            initialization.zeros_(module.v_bias)

    def get_input_embeddings(self) -> nn.Module:
        """The text's."""
        return self.llama_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The text's."""
        return cast(nn.Module, self.llama_model.get_output_embeddings())

    def encode(self, video: Tensor) -> Tensor:
        """The rows of a video, ``[P, hidden]``, of its frames ``[n, 3, side, side]``."""
        patches = self.ln_vision(self.visual_encoder(video.to(self.dtype)))
        rows = self.Qformer.bert(self.query_tokens.expand(len(video), -1, -1), patches)
        numbers = torch.arange(len(video), device=video.device)
        rows = rows.last_hidden_state + self.video_frame_position_embedding(numbers)[:, None]
        made = self.video_Qformer.bert(self.video_query_tokens, rows.flatten(0, 1)[None])
        return cast(Tensor, self.llama_proj(made.last_hidden_state[0]))

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        images_per_sample: Tensor | None = None,
        **text: Any,
    ) -> Any:
        """The language model's output.

        Args:
            input_ids: ``[B, T]``, with P places for a video.
            images: ``[frames, 3, side, side]``, of all samples one after the other; or as the
                repository has them, ``[B, 3, frames, side, side]``.
            images_per_sample: ``[B]``, frames of each sample in the first form.
            text: of the language model: ``attention_mask``, ``labels`` and others.
        """
        places = input_ids == self.config.image_token_id
        x = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if images is not None:
            if images_per_sample is None:
                videos = [each.transpose(0, 1) for each in images]
            else:
                counts = [int(count) for count in images_per_sample]
                videos = [each for each in images.split(counts) if len(each) > 0]
            rows = torch.cat([self.encode(video) for video in videos])
            x = x.masked_scatter(places[..., None].expand_as(x), rows.to(x.dtype))
        return self.llama_model(inputs_embeds=x, **text)
