"""Configuration and vision tower of the double of MOSS-VL (`tests.models.moss_vl_double`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


class MossVLVisionConfig(PreTrainedConfig):
    model_type = "moss_vl_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        depth=4,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        in_channels=3,
        patch_size=4,
        temporal_patch_size=1,
        spatial_merge_size=2,
        out_hidden_size=64,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0, 1, 2),
        initializer_range=0.02,
        **kwargs,
    ):
        for key, value in locals().copy().items():
            if key not in ("self", "kwargs", "__class__"):
                setattr(self, key, value)
        super().__init__(**kwargs)


class MossVLTextConfig(PreTrainedConfig):
    model_type = "moss_vl_text"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        rope_parameters=None,
        attention_dropout=0.0,
        cross_attention_layers=(2, 6),
        pad_token_id=None,
        **kwargs,
    ):
        for key, value in locals().copy().items():
            if key not in ("self", "kwargs", "__class__"):
                setattr(self, key, value)
        if rope_parameters is None:
            self.rope_parameters = {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            }
        self.cross_attention_layers = list(cross_attention_layers)
        super().__init__(**kwargs)


class MossVLConfig(PreTrainedConfig):
    model_type = "moss_vl"
    sub_configs = {"vision_config": MossVLVisionConfig, "text_config": MossVLTextConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        image_token_id=195,
        vision_seq_pad_multiple=8,
        **kwargs,
    ):
        def made(kind, given):
            return given if isinstance(given, kind) else kind(**(given or {}))

        self.text_config = made(MossVLTextConfig, text_config)
        self.vision_config = made(MossVLVisionConfig, vision_config)
        self.image_token_id = image_token_id
        self.vision_seq_pad_multiple = vision_seq_pad_multiple
        super().__init__(**kwargs)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MossVLVisionPatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.shape = (config.in_channels, config.temporal_patch_size, *[config.patch_size] * 2)
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, self.shape[1:], stride=self.shape[1:]
        )

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype).view(-1, *self.shape)).flatten(1)


class MossVLVisionRotaryEmbedding(nn.Module):
    def __init__(self, dim, theta=1e4):
        super().__init__()
        exponents = torch.arange(0, dim, 2, device="cpu").float() / dim
        self.register_buffer("inv_freq", 1 / theta**exponents, persistent=False)

    def forward(self, places):
        angles = (places[..., None].float() * self.inv_freq).flatten(1)
        return torch.cat((angles, angles), dim=-1)


class MossVLVisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, lengths, rotary):
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        cos, sin = rotary.cos()[:, None], rotary.sin()[:, None]
        q, k = (rotate(x.float(), cos, sin).to(x.dtype) for x in (q, k))
        frames = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*(t[None] for t in frame))[0] for frame in frames]
        return self.proj(torch.cat(out, dim=1).transpose(0, 1).flatten(1))


class MossVLVisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class MossVLVisionBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn, self.mlp = MossVLVisionAttention(config), MossVLVisionMLP(config)

    def forward(self, x, lengths=None, rotary=None):
        x = x + self.attn(self.norm1(x), lengths, rotary)
        return x + self.mlp(self.norm2(x))


class MossVLVisionPatchMerger(nn.Module):
    def __init__(self, config):
        super().__init__()
        levels = 1 + len(config.deepstack_visual_indexes)
        width = levels * config.hidden_size * config.spatial_merge_size**2
        self.norms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=1e-6) for _ in range(levels)
        )
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, config.out_hidden_size)

    def forward(self, last, levels):
        normed = [norm(level) for norm, level in zip(self.norms, (last, *levels), strict=True)]
        x = torch.cat(normed, dim=-1).view(-1, self.linear_fc1.in_features)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class MossVLPreTrainedModel(PreTrainedModel):
    config_class = MossVLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        std = self.config.get_text_config().initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
            nn.init.normal_(module.weight, std=std)


class MossVLVisionModel(MossVLPreTrainedModel):
    config_class = MossVLVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.patch_embed = MossVLVisionPatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.rotary_pos_emb = MossVLVisionRotaryEmbedding(
            config.hidden_size // config.num_heads // 2
        )
        self.blocks = nn.ModuleList(MossVLVisionBlock(config) for _ in range(config.depth))
        self.merger = MossVLVisionPatchMerger(config)

    def forward(self, hidden_states, grid_thw):
        """Rows of pixels ``[patches, 3 * patch ** 2]`` -> ``[merged patches, out_hidden_size]``."""
        device = hidden_states.device
        table = self.pos_embed(torch.arange(self.pos_embed.num_embeddings, device=device))
        side, merge = int(len(table) ** 0.5), self.spatial_merge_size
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        added, places, lengths = [], [], []
        for t, h, w in grid_thw.tolist():
            blocks = torch.arange(h * w, device=device)
            blocks = blocks.view(h // merge, merge, w // merge, merge)
            order = blocks.permute(0, 2, 1, 3).flatten()
            sized = F.interpolate(square, (h, w), mode="bilinear", align_corners=True)
            added += [sized[0].flatten(1).T[order]] * t
            places += [torch.stack((order // w, order % w), dim=-1)] * t
            lengths += [h * w] * t
        x = self.patch_embed(hidden_states) + torch.cat(added)
        rotary, levels = self.rotary_pos_emb(torch.cat(places)), []
        for index, block in enumerate(self.blocks):
            x = block(x, lengths=lengths, rotary=rotary)
            if index in self.config.deepstack_visual_indexes:
                levels.append(x)
        return self.merger(x, levels)
