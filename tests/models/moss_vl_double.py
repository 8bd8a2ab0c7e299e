"""A compact double of MOSS-VL for tests: the same modules, names, inputs and numbers, dense masks.

Written from a description of the model, with one intended difference: the positions of a batch are
found sample by sample. Shapes: ``B`` samples, ``T`` text tokens, ``S`` visual tokens of a sample,
``F`` frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models.moss_vl_double_places import expanded, frames_of, xrope
from tests.models.moss_vl_double_vision import (
    MossVLPreTrainedModel,
    MossVLTextConfig,
    MossVLVisionModel,
    rotate,
)


def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Of ``[B, H, s, D]``; returns ``[B, s, H * D]``."""
    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out = function(module, q, k, v, mask, dropout=0.0, scaling=module.scaling)[0]
    return out.flatten(2)


class MossVLTextRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rope, self.dim = config.rope_parameters, config.head_dim
        exponents = torch.arange(0, self.dim, 2, device="cpu").float() / self.dim
        frequencies = 1 / self.rope["rope_theta"] ** exponents
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x, position_ids):
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, -1, -1)
        index = torch.arange(self.dim // 2)
        _, rows, columns = self.rope["mrope_section"]
        axis = torch.where((index % 3 == 1) & (index < 3 * rows), 1, 0)
        axis = torch.where((index % 3 == 2) & (index < 3 * columns), 2, axis)
        angles = position_ids.float()[axis].permute(1, 2, 0) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class MossVLTextRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MossVLTextSelfAttention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, config.attention_dropout
        hidden, width = config.hidden_size, config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(hidden, width // self.num_key_value_groups, bias=False) for _ in "kv"
        )
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.q_norm, self.k_norm = (
            MossVLTextRMSNorm(self.head_dim, config.rms_norm_eps) for _ in "qk"
        )

    def projected(self, x, source, of_x, of_source):
        def heads(y, rotary, norm=None):
            y = y.unflatten(2, (-1, self.head_dim))
            y = (y if norm is None else norm(y)).transpose(1, 2)
            return y if rotary is None else rotate(y, *(part[:, None] for part in rotary))

        return (
            heads(self.q_proj(x), of_x, self.q_norm),
            heads(self.k_proj(source), of_source, self.k_norm),
            heads(self.v_proj(source), None),
        )

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        rotary = position_embeddings
        q, k, v = self.projected(hidden_states, hidden_states, rotary, rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        return self.o_proj(attention(self, q, k, v, attention_mask)), None


class MossVLTextCrossAttention(MossVLTextSelfAttention):
    is_causal = False

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads

    def forward(
        self,
        hidden_states,
        cross_attention_states,
        attention_mask=None,
        query_position_embeddings=None,
        vision_position_embeddings=None,
        **kwargs,
    ):
        rotary = query_position_embeddings, vision_position_embeddings
        q, k, v = self.projected(hidden_states, cross_attention_states, *rotary)
        return self.o_proj(attention(self, q, k, v, attention_mask)), None


class MossVLTextMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MossVLSelfAttentionDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.mlp = MossVLTextMLP(config)
        self.input_layernorm, self.post_attention_layernorm = (
            MossVLTextRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in "ab"
        )
        self.add_attention(config, layer_idx)

    def add_attention(self, config, layer_idx):
        self.self_attn = MossVLTextSelfAttention(config, layer_idx)

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        hidden_states = (
            hidden_states
            + self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
            )[0]
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MossVLCrossAttentionDecoderLayer(MossVLSelfAttentionDecoderLayer):
    def add_attention(self, config, layer_idx):
        self.cross_attn = MossVLTextCrossAttention(config, layer_idx)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states,
        position_embeddings,
        cross_attention_states=None,
        cross_attention_mask=None,
        full_text_row_masked_out_mask=None,
        vision_position_embeddings=None,
        **kwargs,
    ):
        rows = 1 if full_text_row_masked_out_mask is None else full_text_row_masked_out_mask[:, 0]
        out, _ = self.cross_attn(
            hidden_states=self.input_layernorm(hidden_states),
            cross_attention_states=cross_attention_states,
            attention_mask=cross_attention_mask,
            query_position_embeddings=position_embeddings,
            vision_position_embeddings=vision_position_embeddings,
        )
        hidden_states = hidden_states + self.cross_attn_attn_gate.tanh() * rows * out
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.cross_attn_mlp_gate.tanh() * rows * out


class MossVLTextModel(MossVLPreTrainedModel):
    config_class = MossVLTextConfig

    def __init__(self, config):
        super().__init__(config)
        self.cross_attention_layers = config.cross_attention_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = (MossVLSelfAttentionDecoderLayer, MossVLCrossAttentionDecoderLayer)
        self.layers = nn.ModuleList(
            kinds[index in self.cross_attention_layers](config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = MossVLTextRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MossVLTextRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        full_text_row_masked_out_mask=None,
        position_ids=None,
        inputs_embeds=None,
        cross_attention_states=None,
        cross_attention_mask=None,
        vision_position_ids=None,
        use_cache=None,
        past_key_values=None,
        **kwargs,
    ):
        x = inputs_embeds
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary, of_vision = self.rotary_emb(x, position_ids), None
        if cross_attention_states is not None and vision_position_ids is not None:
            of_vision = self.rotary_emb(cross_attention_states, vision_position_ids)
        for index, layer in enumerate(self.layers):
            if index in self.cross_attention_layers and cross_attention_states is None:
                continue
            x = layer(
                x,
                attention_mask=attention_mask,
                full_text_row_masked_out_mask=full_text_row_masked_out_mask,
                position_embeddings=rotary,
                cross_attention_states=cross_attention_states,
                cross_attention_mask=cross_attention_mask,
                vision_position_embeddings=of_vision,
                past_key_values=past_key_values,
                **kwargs,
            )
        return self.norm(x)


# ---- both


class MossVLModel(MossVLPreTrainedModel):
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.visual = MossVLVisionModel._from_config(config.vision_config)
        self.language_model = MossVLTextModel._from_config(config.text_config)
        self.separator_token = nn.Parameter(torch.zeros(config.vision_config.out_hidden_size))
        self.post_init()

    def convert_packed_to_batch(self, hidden_states, grid_thw, media_nums_per_sample):
        """``[B, S, hidden]``, a separator behind each frame; and the ``(h, w)`` of the frames."""
        frames = frames_of(grid_thw, media_nums_per_sample, self.visual.spatial_merge_size)
        pieces = iter(hidden_states.split([h * w for sample in frames for h, w in sample]))
        rows = [
            torch.cat([x for _ in sample for x in (next(pieces), self.separator_token[None])])
            if sample
            else hidden_states[:0]
            for sample in frames
        ]
        multiple = self.config.vision_seq_pad_multiple
        length = -(-max(map(len, rows)) // multiple) * multiple
        padded = [F.pad(row, (0, 0, 0, length - len(row))) for row in rows]
        return torch.stack(padded), frames

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        pixel_values=None,
        grid_thw=None,
        media_nums_per_sample=None,
        vision_position_ids=None,
        cross_attention_mask=None,
        **kwargs,
    ):
        x = self.language_model.embed_tokens(input_ids)
        states, frames, rows = None, [()] * len(input_ids), None
        if pixel_values is not None:
            if media_nums_per_sample is None:
                assert len(input_ids) == 1, "media_nums_per_sample is missing"
                media_nums_per_sample = [len(grid_thw)]
            packed = self.visual(pixel_values, grid_thw=grid_thw)
            states, frames = self.convert_packed_to_batch(packed, grid_thw, media_nums_per_sample)
        if position_ids is None:
            pads = input_ids == self.config.image_token_id
            valid = torch.ones_like(pads) if attention_mask is None else attention_mask != 0
            length = 0 if states is None else states.shape[1]
            position_ids, vision_position_ids = xrope(pads, valid, frames, length)
        if cross_attention_mask is not None:
            tokens = [[h * w + 1 for h, w in sample] for sample in frames]
            hidden = expanded(cross_attention_mask, tokens, states.shape[1])
            rows = (~hidden).any(dim=-1, keepdim=True).to(x.dtype)
            cross_attention_mask = torch.zeros_like(hidden, dtype=x.dtype)
            cross_attention_mask.masked_fill_(hidden, torch.finfo(x.dtype).min)
            cross_attention_mask = cross_attention_mask * rows
        return self.language_model(
            input_ids=None,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=x,
            cross_attention_states=states,
            cross_attention_mask=cross_attention_mask,
            vision_position_ids=vision_position_ids,
            full_text_row_masked_out_mask=rows,
            **kwargs,
        )


class MossVLForConditionalGeneration(MossVLPreTrainedModel, GenerationMixin):
    accepts_loss_kwargs = False
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012  (a list, as in its own code)

    def __init__(self, config):
        super().__init__(config)
        self.model = MossVLModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @property
    def language_model(self):
        return self.model.language_model

    @property
    def visual(self):
        return self.model.visual

    def prepare_inputs_for_generation(self, input_ids, cache_position=None, **kwargs):
        """As its own code has it, which needs an argument that transformers 5 does not give."""
        raise TypeError(f"cache_position is {cache_position}")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        text = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits = self.lm_head(self.model(input_ids=input_ids, **text, **kwargs))
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)
