"""A compact double of Qwen-VL for tests: the same modules, names, inputs and numbers, dense masks.

Written from a description of the model, with one intended difference: what its tower opens is no
file. Shapes: ``B`` samples, ``T`` text tokens, ``P`` places of an image.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


def opened(path, side):
    """The pixels of an image "file", ``[3, side, side]``."""
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    return torch.randn(3, side, side, generator=generator)


class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, **kwargs):
        settings = {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "kv_channels": 8,
            "intermediate_size": 48,
            "seq_length": 64,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "attn_dropout_prob": 0.0,
            "emb_dropout_prob": 0.0,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "layer_norm_epsilon": 1e-6,
            "visual": {
                "image_size": 28,
                "patch_size": 14,
                "width": 16,
                "layers": 2,
                "heads": 2,
                "mlp_ratio": 1.5,
                "n_queries": 4,
                "output_dim": 32,
                "image_start_id": 120,
            },
        }
        for key, value in settings.items():
            setattr(self, key, kwargs.pop(key, value))
        super().__init__(**kwargs)


# ---- images


class Resampler(nn.Module):
    def __init__(self, queries, size, source, heads):
        super().__init__()
        positions = torch.linspace(-1, 1, queries * size).view(queries, size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.query = nn.Parameter(torch.randn(queries, size))
        self.kv_proj = nn.Linear(source, size, bias=False)
        self.attn = nn.MultiheadAttention(size, heads)
        self.ln_q, self.ln_kv = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x)).transpose(0, 1)
        places = self.pos_embed.unsqueeze(1)
        q = self.ln_q(self.query).unsqueeze(1).repeat(1, x.shape[1], 1)
        return self.attn(q + places, x + places[: len(x)], x)[0].transpose(0, 1)


class VisualAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.hidden_size_per_attention_head = embed_dim // num_heads
        self.in_proj, self.out_proj = (
            nn.Linear(embed_dim, 3 * embed_dim),
            nn.Linear(*[embed_dim] * 2),
        )

    def forward(self, query, key, value, attn_mask=None):
        heads = self.in_proj(query).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(*heads.chunk(3, dim=-1))
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2))


class VisualAttentionBlock(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        inner = int(width * ratio)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = VisualAttention(width, heads)
        parts = {"c_fc": nn.Linear(width, inner), "gelu": nn.GELU()}
        self.mlp = nn.Sequential(OrderedDict(**parts, c_proj=nn.Linear(inner, width)))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y)
        return x + self.mlp(self.ln_2(x))


class TransformerBlock(nn.Module):
    def __init__(self, width, layers, heads, ratio):
        super().__init__()
        blocks = (VisualAttentionBlock(width, heads, ratio) for _ in range(layers))
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    def __init__(
        self, image_size, patch_size, width, layers, heads, mlp_ratio, n_queries, output_dim, **_
    ):
        super().__init__()
        self.image_size = image_size, image_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        patches = (image_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(patches, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(output_dim)
        self.transformer = TransformerBlock(width, layers, heads, mlp_ratio)
        self.attn_pool = Resampler(n_queries, output_dim, width, output_dim // 16)
        self.proj = nn.Parameter(torch.randn(output_dim, output_dim))

    def forward(self, x):
        x = self.conv1(x.to(self.transformer.resblocks[0].mlp.c_fc.weight.dtype))
        x = self.ln_pre(x.flatten(2).transpose(1, 2) + self.positional_embedding)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_post(self.attn_pool(x)) @ self.proj

    def encode(self, image_paths):
        return self(torch.stack([opened(path, self.image_size[0]) for path in image_paths]))


# ---- text


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, length, ntk_alpha=1.0):
        base = self.base * ntk_alpha ** (self.dim / (self.dim - 2))
        frequencies = 1.0 / base ** (torch.arange(0, self.dim, 2).float() / self.dim)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)[None, :, None]
        return [angles.cos(), angles.sin()]


def rotate(x, cos, sin):
    size = cos.shape[-1]
    turns, stays = x[..., :size], x[..., size:]
    first, second = turns.chunk(2, dim=-1)
    turns = turns * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turns, stays), dim=-1)


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.seq_length, self.hidden_size = config.seq_length, config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        size = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * size)
        self.c_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.use_dynamic_ntk, self.use_logn_attn = config.use_dynamic_ntk, config.use_logn_attn
        self.attn_dropout = nn.Dropout(config.attn_dropout_prob)

    def forward(
        self, hidden_states, rotary_pos_emb=None, registered_causal_mask=None, layer_past=None,
        attention_mask=None, head_mask=None, encoder_hidden_states=None,
        encoder_attention_mask=None, output_attentions=False, use_cache=False,
    ):  # fmt: skip
        parts = self.c_attn(hidden_states).split(self.hidden_size, dim=2)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in parts)
        q, k = rotate(q, *rotary_pos_emb), rotate(k, *rotary_pos_emb)
        if self.use_logn_attn and not self.training:
            lengths = range(1, q.shape[1] + 1)
            factors = [max(math.log(n, self.seq_length), 1.0) if n > 1 else 1.0 for n in lengths]
            q = q * torch.tensor(factors)[None, :, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT / self.head_dim**0.5 + attention_mask).softmax(dim=-1)
        out = self.attn_dropout(weights) @ v
        return self.c_proj(out.transpose(1, 2).flatten(2)), None


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1, self.w2 = (nn.Linear(config.hidden_size, inner, bias=False) for _ in "12")
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.ln_1, self.ln_2 = RMSNorm(size, eps), RMSNorm(size, eps)
        self.attn, self.mlp = QWenAttention(config), QWenMLP(config)

    def forward(
        self, hidden_states, rotary_pos_emb=None, registered_causal_mask=None, layer_past=None,
        attention_mask=None, head_mask=None, encoder_hidden_states=None,
        encoder_attention_mask=None, use_cache=False, output_attentions=False,
    ):  # fmt: skip
        attended = self.attn(
            self.ln_1(hidden_states),
            rotary_pos_emb,
            registered_causal_mask=registered_causal_mask,
            layer_past=layer_past,
            attention_mask=attention_mask,
            head_mask=head_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        x = hidden_states + attended[0]
        return (x + self.mlp(self.ln_2(x)),)


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("QWenBlock",)

    def _init_weights(self, module):
        pass

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, QWenModel):
            module.gradient_checkpointing = value


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.gradient_checkpointing = False  # itself it has no use for it
        self.use_dynamic_ntk, self.seq_length = config.use_dynamic_ntk, config.seq_length
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        turning = int(config.kv_channels * config.rotary_pct)
        self.rotary_emb = RotaryEmbedding(turning, config.rotary_emb_base)
        self.h = nn.ModuleList(QWenBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTransformer(**config.visual)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None,
        position_ids=None, head_mask=None, inputs_embeds=None, encoder_hidden_states=None,
        encoder_attention_mask=None, use_cache=None, output_attentions=None,
        output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        start = self.config.visual["image_start_id"]
        firsts, lasts = (input_ids == start).nonzero(), (input_ids == start + 1).nonzero()
        spans = [
            (row, a, b) for (row, a), (_, b) in zip(firsts.tolist(), lasts.tolist(), strict=True)
        ]
        x = self.drop(self.wte(input_ids)).clone()
        if spans:
            names = [input_ids[row, a + 1 : b - 1].tolist() for row, a, b in spans]
            paths = [bytes(name[: name.index(start + 2)]).decode() for name in names]
            for (row, a, b), image in zip(spans, self.visual.encode(paths), strict=True):
                x[row, a + 1 : b] = image
        elif self.training:
            x = x + self.visual(torch.zeros(1, 3, *self.visual.image_size)).mean() * 0
        length, alpha = input_ids.shape[1], 1.0
        if self.use_dynamic_ntk and not self.training:
            alpha = max(2 ** math.ceil(math.log(length / self.seq_length, 2) + 1) - 1, 1)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & (attention_mask[:, None, None] != 0)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        for block in self.h:
            x = block(x, self.rotary_emb(length, ntk_alpha=alpha), attention_mask=mask)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x))


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None,
        position_ids=None, head_mask=None, inputs_embeds=None, encoder_hidden_states=None,
        encoder_attention_mask=None, labels=None, use_cache=None, output_attentions=None,
        output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        states = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )[0]
        logits, loss = self.lm_head(states), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
