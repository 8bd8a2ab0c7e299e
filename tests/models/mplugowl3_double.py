"""A compact double of mPLUG-Owl3 for tests, release 241101 or, ``gated``, 240728: its modules,
names, inputs and numbers, dense masks. Written from a description of the model, with two intended
differences: hyper layers, too, do not see the padding of a batch, and the gated one takes the other
one's ``media_offset``. ``B`` samples, ``T`` text tokens, ``P`` visual tokens of an image.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class SiglipVisionConfig(PreTrainedConfig):
    model_type = "siglip_vision_model"

    def __init__(self, **kwargs):
        self.hidden_size, self.num_attention_heads, self.num_hidden_layers = 16, 2, 3
        self.image_size, self.patch_size, self.intermediate_size = 8, 4, 24
        super().__init__(**kwargs)


class mPLUGOwl3Config(PreTrainedConfig):  # noqa: N801  (the model's own name)
    model_type = "mplugowl3"

    def __init__(self, vision_config=None, vision_batch_size=2, gated=False, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = 96, 32, 48
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 4, 4, 2
        self.hyper_layers, self.rope_theta, self.rms_norm_eps = [1, 3], 1e4, 1e-6
        self.attention_dropout, self.max_position_embeddings = 0.0, 512
        self.vision_batch_size, self.gated = vision_batch_size, gated
        given = isinstance(vision_config, SiglipVisionConfig)
        self.vision_config = vision_config if given else SiglipVisionConfig(**(vision_config or {}))
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def rope(x, positions, theta):
    """Of ``[B, H, s, D]``, by halves."""
    half = x.shape[-1] // 2
    angles = positions[..., None].float() / theta ** (torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class SiglipAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in "qkvo"
        )

    def forward(self, x):
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SiglipEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.self_attn = SiglipAttention(config)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        inner = config.intermediate_size
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        layers = (SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(self, x):
        states = [x]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states.append(self._gradient_checkpointing_func(layer.__call__, states[-1]))
            else:
                states.append(layer(states[-1]))
        return states


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        side, width = config.patch_size, config.hidden_size
        self.patch_embedding = nn.Conv2d(3, width, side, stride=side)
        self.position_embedding = nn.Embedding((config.image_size // side) ** 2, width)
        places = torch.arange(self.position_embedding.num_embeddings)[None]
        self.register_buffer("position_ids", places, persistent=False)
        self.encoder = SiglipEncoder(config)

    def forward(self, pixel_values, output_hidden_states=False):
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = x + self.position_embedding(self.position_ids)
        states = self.encoder(x)
        return SimpleNamespace(hidden_states=states if output_hidden_states else None)


class Qwen2RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class HyperQwen2SdpaAttention(nn.Module):
    def __init__(self, config, hyper):
        super().__init__()
        self.config, self.attention_dropout = config, config.attention_dropout
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size
        self.head_dim = width // self.heads
        narrow = self.kv_heads * self.head_dim
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = nn.Linear(width, narrow), nn.Linear(width, narrow)
        if hyper:
            self.v_kv_proj = nn.Linear(width, 2 * narrow)
            if config.gated:
                self.gate = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        image_embeds=None,
        media_offset=None,
        use_cache=False,
    ):
        def split(x):
            return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        x, theta = hidden_states, self.config.rope_theta
        index = torch.arange(x.shape[1])
        q = rope(split(self.q_proj(x)), index, theta)
        k, v = rope(split(self.k_proj(x)), index, theta), split(self.v_proj(x))
        outs, first = [], 0
        for sample in range(len(x)):
            keys, values = k[sample : sample + 1], v[sample : sample + 1]
            sees = index <= index[:, None]
            if attention_mask is not None:
                sees = sees & (attention_mask[sample] != 0)
            if image_embeds is not None and len(media_offset[sample]):
                starts = media_offset[sample]
                images = image_embeds[first : first + len(starts)]
                first += len(starts)
                each = images.shape[1]
                both = self.v_kv_proj(images).flatten(0, 1)
                both = both.unflatten(1, (self.kv_heads, 2, self.head_dim)).permute(2, 1, 0, 3)
                places = starts.repeat_interleave(each)
                if self.config.gated:
                    keys = rope(both[0], places + 1, theta)[None], keys
                    values, sees = (both[1][None], values), (places < index[:, None], sees)
                    outs.append(self.mixed(q[sample : sample + 1], keys, values, sees))
                    continue
                keys = torch.cat((rope(both[0], places, theta)[None], keys), dim=2)
                values = torch.cat((both[1][None], values), dim=2)
                sees = torch.cat((places <= index[:, None], sees), dim=1)
            out = F.scaled_dot_product_attention(
                q[sample : sample + 1], keys, values, attn_mask=sees, enable_gqa=True
            )
            outs.append(out)
        out = torch.cat(outs).transpose(1, 2).flatten(2)
        return self.o_proj(out), None, None

    def mixed(self, q, keys, values, sees):
        """Attention to images, then to text, by the gate; before the first image text alone."""
        images, text = (
            F.scaled_dot_product_attention(q, *kv, attn_mask=mask, enable_gqa=True)
            for *kv, mask in zip(keys, values, sees, strict=True)
        )
        gate = self.gate.sigmoid().view(self.heads, 1, self.head_dim)
        return torch.where(sees[0].any(1)[:, None], text * (1 - gate) + images * gate, text)


class Qwen2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HyperQwen2DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.is_hyper_enabled = (layer_idx + 1) in config.hyper_layers
        self.self_attn = HyperQwen2SdpaAttention(config, self.is_hyper_enabled)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config)
        self.post_attention_layernorm = Qwen2RMSNorm(config)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        image_embeds=None,
        media_offset=None,
        use_cache=False,
    ):
        residual, media = hidden_states, {}
        hidden_states = self.input_layernorm(hidden_states)
        if image_embeds is not None and self.is_hyper_enabled:
            image_embeds = self.input_layernorm(image_embeds)
            media = {"image_embeds": image_embeds, "media_offset": media_offset}
        hidden_states = (
            residual
            + self.self_attn(
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **media,
            )[0]
        )
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class mPLUGOwl3PreTrainedModel(PreTrainedModel):  # noqa: N801
    config_class = mPLUGOwl3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyperQwen2DecoderLayer"]  # noqa: RUF012


class HyperQwen2Model(mPLUGOwl3PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (HyperQwen2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = Qwen2RMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids, attention_mask=None, image_embeds=None, media_offset=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            given = x, attention_mask, None, image_embeds, media_offset
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, *given)[0]
            else:
                x = layer(*given)[0]
        return self.norm(x)


class HyperQwen2ForCausalLM(mPLUGOwl3PreTrainedModel, GenerationMixin):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012  (a list, as in its own code)

    def __init__(self, config):
        super().__init__(config)
        self.model = HyperQwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_embeds=None,
        media_offset=None,
        labels=None,
        use_cache=None,
    ):
        x = self.model(input_ids, attention_mask, image_embeds, media_offset)
        logits = self.lm_head(x).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class mPLUGOwl3Model(mPLUGOwl3PreTrainedModel):  # noqa: N801
    def __init__(self, config):
        super().__init__(config)
        self.language_model = HyperQwen2ForCausalLM(config)
        self.vision_model = SiglipVisionTransformer(config.vision_config)
        inner, outer = config.vision_config.hidden_size, config.hidden_size
        self.vision2text_model = nn.Sequential(
            nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, outer)
        )
        self.vision_batch_size = config.vision_batch_size
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.model.embed_tokens

    def _small_batched_forward(self, pixel_values):
        parts = pixel_values.split(self.vision_batch_size)
        return torch.cat([self._encoded(part) for part in parts])

    def _encoded(self, pixel_values):
        return self.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2]

    def forward_image(self, pixel_values):
        if pixel_values is None:
            return None
        dtype = self.language_model.model.embed_tokens.weight.dtype
        return self.vision2text_model(self._small_batched_forward(pixel_values.to(dtype)))

    def forward(self, pixel_values=None, **kwargs):
        return self.language_model(image_embeds=self.forward_image(pixel_values), **kwargs)
