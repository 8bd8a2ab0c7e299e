"""A compact double of the package open_flamingo for tests: the same modules, names, inputs and
numbers, written from a description of it.

Shapes: ``B`` samples, ``T`` text tokens, ``N`` images of a sample, ``n`` latents of an image.
"""

from __future__ import annotations

import torch
from torch import nn


def feed_forward(size):
    return nn.Sequential(
        nn.LayerNorm(size),
        nn.Linear(size, 4 * size, bias=False),
        nn.GELU(),
        nn.Linear(4 * size, size, bias=False),
    )


def attention(q, k, v, heads, scale, unseen=None):
    """Of ``[..., s, H * D]``; ``unseen [B, s, s_kv]`` gets the lowest score there is."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))
    scores = (q * scale) @ k.mT
    if unseen is not None:
        scores = scores.masked_fill(unseen.unsqueeze(1), -torch.finfo(scores.dtype).max)
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


class Projections(nn.Module):
    def __init__(self, size, source, dim_head, heads):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        inner = dim_head * heads
        self.to_q = nn.Linear(size, inner, bias=False)
        self.to_kv = nn.Linear(source, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, size, bias=False)


class PerceiverAttention(Projections):
    def __init__(self, size, dim_head, heads):
        super().__init__(size, size, dim_head, heads)
        self.norm_media, self.norm_latents = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x, latents):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(latents), k, v, self.heads, self.scale))


class PerceiverResampler(nn.Module):
    def __init__(self, *, dim, depth=6, dim_head=64, heads=8, num_latents=64):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = self.media_time_embs = None
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), feed_forward(dim)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = x.flatten(2, 3)  # frames and patches
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attends, feeds in self.layers:
            latents = attends(x, latents) + latents
            latents = feeds(latents) + latents
        return self.norm(latents)


class MaskedCrossAttention(Projections):
    def __init__(self, *, dim, dim_visual, dim_head, heads, only_attend_immediate_media=True):
        super().__init__(dim, dim_visual, dim_head, heads)
        self.norm = nn.LayerNorm(dim)
        self.only_attend_immediate_media = only_attend_immediate_media

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        assert media_locations.shape == x.shape[:2]
        assert not use_cached_media
        time = media_locations.cumsum(-1)[..., None]
        number = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        seen = time == number if self.only_attend_immediate_media else time >= number
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
        out = attention(self.to_q(self.norm(x)), k, v, self.heads, self.scale, ~seen)
        if self.only_attend_immediate_media:
            out = out.masked_fill(time == 0, 0)
        return self.to_out(out)


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, *, dim, **settings):
        super().__init__()
        self.attn = MaskedCrossAttention(dim=dim, **settings)
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.tensor([0.0])) for _ in "af")
        self.ff = feed_forward(dim)

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        attended = self.attn(
            x, media, media_locations=media_locations, use_cached_media=use_cached_media
        )
        x = attended * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x


class FlamingoLayer(nn.Module):
    def __init__(self, gated, layer):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = gated, layer
        self.vis_x = self.media_locations = None

    def condition_vis_x(self, vis_x):
        self.vis_x = vis_x

    def condition_media_locations(self, media_locations):
        self.media_locations = media_locations

    def condition_use_cached_media(self, use_cached_media):
        self.use_cached_media = use_cached_media

    def forward(self, lang_x, attention_mask=None, **decoder_layer_kwargs):
        if self.gated_cross_attn_layer is not None:
            lang_x = self.gated_cross_attn_layer(
                lang_x,
                self.vis_x,
                media_locations=self.media_locations,
                use_cached_media=self.use_cached_media,
            )
        return self.decoder_layer(lang_x, attention_mask=attention_mask, **decoder_layer_kwargs)


class FlamingoLMMixin(nn.Module):
    def _get_decoder_layers(self):
        return self.get_submodule(self.decoder_layers_attr_name)

    def init_flamingo(self, *, media_token_id, every, **settings):
        self.media_token_id = media_token_id
        self.old_decoder_blocks = self._get_decoder_layers()
        self.gated_cross_attn_layers = nn.ModuleList(
            GatedCrossAttentionBlock(**settings) if (index + 1) % every == 0 else None
            for index, _ in enumerate(self.old_decoder_blocks)
        )
        pairs = zip(self.gated_cross_attn_layers, self.old_decoder_blocks, strict=True)
        layers = nn.ModuleList(FlamingoLayer(*pair) for pair in pairs)
        parent, _, name = self.decoder_layers_attr_name.rpartition(".")
        setattr(self.get_submodule(parent), name, layers)

    def forward(self, input_ids, attention_mask, **kwargs):
        for layer in self._get_decoder_layers():
            layer.condition_media_locations(input_ids == self.media_token_id)
            layer.condition_use_cached_media(False)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def clear_conditioned_layers(self):
        for layer in self._get_decoder_layers():
            layer.condition_vis_x(None)
            layer.condition_media_locations(None)
            layer.condition_use_cached_media(None)


class Flamingo(nn.Module):
    def __init__(self, vision_encoder, lang_encoder, media_token_id, *, width, latents, **settings):
        super().__init__()
        self.media_token_id, self.vision_encoder = media_token_id, vision_encoder
        heads = {"dim_head": settings["dim_head"], "heads": settings["heads"]}
        self.perceiver = PerceiverResampler(dim=width, depth=2, num_latents=latents, **heads)
        self.lang_encoder = lang_encoder
        dim = lang_encoder.config.hidden_size
        lang_encoder.init_flamingo(
            media_token_id=media_token_id, dim=dim, dim_visual=width, **settings
        )

    def forward(
        self, vision_x, lang_x, attention_mask=None, labels=None, past_key_values=None,
        use_cache=False,
    ):  # fmt: skip
        shape = vision_x.shape[:3]
        with torch.no_grad():
            tokens = self.vision_encoder(vision_x.flatten(0, 2))[1]
        features = self.perceiver(tokens.unflatten(0, shape))
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(features)
        output = self.lang_encoder(
            input_ids=lang_x,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        self.lang_encoder.clear_conditioned_layers()
        return output


class VisionTransformer(nn.Module):
    """In the place of open_clip's: pooled, and all tokens."""

    def __init__(self, size, patch, width):
        super().__init__()
        self.image_size = (size, size)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x):
        tokens = self.ln_post(self.conv1(x).flatten(2).transpose(1, 2).tanh())
        return tokens.mean(1), tokens
