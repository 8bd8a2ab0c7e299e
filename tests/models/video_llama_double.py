# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""A Video-LLaMA in few lines, with the names that the code of its repository has.

Tower, Q-Former and video Q-Former compute what that code computes; the language model is
transformers' own.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class BertSelfAttention(nn.Module):
    def __init__(self, width, keys_width, heads):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(keys_width, width), nn.Linear(keys_width, width)
        self.dropout = nn.Dropout(0.0)
        self.position_embedding_type = "absolute"

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        def heads(x):
            return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        keys, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            keys, mask = encoder_hidden_states, encoder_attention_mask
        q, k, v = heads(self.query(hidden_states)), heads(self.key(keys)), heads(self.value(keys))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.attention_head_size) + mask
        context = self.dropout(scores.softmax(-1)) @ v
        return context.transpose(1, 2).flatten(2), (k, v)


class BertOutput(nn.Module):
    def __init__(self, inside, width):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inside, width), nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertAttention(nn.Module):
    def __init__(self, width, keys_width, heads):
        super().__init__()
        self.self = BertSelfAttention(width, keys_width, heads)
        self.output = BertOutput(width, width)

    def forward(self, hidden_states, *args):
        outputs = self.self(hidden_states, *args)
        return self.output(outputs[0], hidden_states), *outputs[1:]


class BertLayer(nn.Module):
    def __init__(self, width, keys_width, heads, *, crosses):
        super().__init__()
        self.attention = BertAttention(width, width, heads)
        self.has_cross_attention = crosses
        if crosses:
            self.crossattention = BertAttention(width, keys_width, heads)
        self.intermediate = self.output = None
        self.intermediate_query = nn.Module()
        self.intermediate_query.dense = nn.Linear(width, 2 * width)
        self.output_query = BertOutput(2 * width, width)

    def forward(self, hidden_states, mask, encoder_hidden_states, encoder_mask):
        x = self.attention(hidden_states, mask, None, None, None, None, False)[0]
        if self.has_cross_attention:
            x = self.crossattention(
                x, mask, None, encoder_hidden_states, encoder_mask, None, False
            )[0]
        return self.output_query(nn.functional.gelu(self.intermediate_query.dense(x)), x)


class BertModel(nn.Module):
    def __init__(self, width, keys_width, heads, *, every):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings.dropout = nn.Dropout(0.0)
        self.encoder.layer = nn.ModuleList(
            BertLayer(width, keys_width, heads, crosses=index % every == 0) for index in range(2)
        )

    def forward(
        self, query_embeds, encoder_hidden_states, encoder_attention_mask, return_dict=True
    ):
        x = self.embeddings.dropout(self.embeddings.LayerNorm(query_embeds))
        mask = (1 - torch.ones(x.shape[:2], device=x.device))[:, None, None] * -10000.0
        encoder_mask = (1 - encoder_attention_mask.float())[:, None, None] * -10000.0
        for layer in self.encoder.layer:
            x = layer(x, mask, encoder_hidden_states, encoder_mask)
        return SimpleNamespace(last_hidden_state=x)


class QFormer(nn.Module):
    def __init__(self, width, keys_width, heads, *, every):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, gradient_checkpointing=False)
        self.bert, self.cls = BertModel(width, keys_width, heads, every=every), None


class VisionTransformer(nn.Module):
    def __init__(self, image_size, patch, width):
        super().__init__()
        self.image_size, self.num_features = image_size, width
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)

    def forward(self, x):
        return self.block(self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed)


class VideoLLAMA(nn.Module):
    def __init__(self, text: LlamaConfig, *, image_token: int, frame_rows=2, video_rows=3, most=8):
        super().__init__()
        width, tower = 16, 12
        self.visual_encoder = VisionTransformer(28, 14, tower)
        self.ln_vision = nn.LayerNorm(tower)
        self.Qformer = QFormer(width, tower, 2, every=2)
        self.query_tokens = nn.Parameter(torch.zeros(1, frame_rows, width))
        self.llama_model = LlamaForCausalLM(text)
        self.IMAGE_PATCH_TOKEN_ID, self.AUDIO_PATCH_TOKEN_ID = image_token, image_token + 1
        self.llama_proj = nn.Linear(width, text.hidden_size)
        self.video_frame_position_embedding = nn.Embedding(most, width)
        self.num_video_query_token = video_rows
        self.video_Qformer = QFormer(width, width, 2, every=1)
        self.video_query_tokens = nn.Parameter(torch.zeros(1, video_rows, width))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """``[B, 3, t, height, width]`` to ``[B, P, hidden of the text]``."""
        batch, frames = image.shape[0], image.shape[2]
        x = self.ln_vision(self.visual_encoder(image.transpose(1, 2).flatten(0, 1)))
        x = self.Qformer.bert(
            query_embeds=self.query_tokens.expand(len(x), -1, -1),
            encoder_hidden_states=x,
            encoder_attention_mask=torch.ones(x.shape[:2]),
        ).last_hidden_state.unflatten(0, (batch, frames))
        x = x + self.video_frame_position_embedding(torch.arange(frames))[:, None]
        x = x.flatten(1, 2)
        x = self.video_Qformer.bert(
            query_embeds=self.video_query_tokens.expand(batch, -1, -1),
            encoder_hidden_states=x,
            encoder_attention_mask=torch.ones(x.shape[:2]),
        ).last_hidden_state
        return self.llama_proj(x)

    def language(self, input_ids, rows, attention_mask, labels) -> Any:
        """The language model's output, with rows in the places of the text."""
        places = input_ids == self.IMAGE_PATCH_TOKEN_ID
        x = self.llama_model.model.embed_tokens(input_ids.masked_fill(places, 0))
        x = x.masked_scatter(places[..., None], rows)
        return self.llama_model(inputs_embeds=x, attention_mask=attention_mask, labels=labels)

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        image = samples["images"]
        image = image[:, :, None] if image.ndim == 4 else image
        rows = self.encode(image)
        out = self.language(
            samples["input_ids"], rows, samples["attention_mask"], samples["labels"]
        )
        return {"loss": out.loss}
