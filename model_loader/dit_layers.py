"""The pieces of the transformer: linears and norms with one expert per modality, attention, MLP, layer.

Tokens travel as x [B, N, D] in the order video, audio, text; `layout.spans` are the three lengths. The residual stream
is fp32, matmuls and attention run in the linears' dtype, norms, rotation, gate and activation in fp32.
"""

import torch
from torch import nn

from ..kernels import gate_heads, gelu7, rms_norm, rms_norm_spans, rotate, swiglu7
from .attention import local_attention

MODALITIES = ("video", "audio", "text")


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis, weight fp32 [experts * size] with the experts stacked as in the published files.

    The weight is a plain fp32 parameter: ComfyUI keeps such small modules whole on the compute device.
    """

    def __init__(self, size, experts=1, eps=1e-6, device=None):
        super().__init__()
        self.experts = experts
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(experts * size, dtype=torch.float32, device=device))

    def forward(self, x, spans=None, out_dtype=None):
        """Normalise x [B, N, ..., size]; `spans` are needed where there is more than one expert."""
        weight = self.weight.to(x.device)
        if self.experts == 1:
            return rms_norm(x, weight, self.eps, out_dtype)
        return rms_norm_spans(x, weight.view(self.experts, -1), spans, self.eps, out_dtype)


class ExpertLinear(nn.Module):
    """Three Linears, one for each modality's span; the published files stack their rows in this order."""

    def __init__(self, in_features, out_features, *, operations, **factory):
        super().__init__()
        for modality in MODALITIES:
            setattr(self, modality, operations.Linear(in_features, out_features, bias=False, **factory))

    def forward(self, x, spans):
        """x [B, N, in_features] -> [B, N, out_features]."""
        parts = x.split(spans, dim=1)
        return torch.cat([getattr(self, m)(part) for m, part in zip(MODALITIES, parts, strict=True)], dim=1)


def linear(in_features, out_features, experts, *, operations, **factory):
    """Build a bias-free Linear, or one for each modality where `experts` is 3."""
    if experts == 1:
        return operations.Linear(in_features, out_features, bias=False, **factory)
    return ExpertLinear(in_features, out_features, operations=operations, **factory)


def project(layer, x, spans):
    """Run a layer made by `linear` on x [B, N, C]."""
    return layer(x, spans) if isinstance(layer, ExpertLinear) else layer(x)


class Attention(nn.Module):
    """Gated self-attention: one matmul gives queries, keys, values and a gate logit for every query head."""

    def __init__(self, config, layer, *, operations, dtype, device):
        super().__init__()
        experts = len(MODALITIES) if layer in config.expert_layers else 1
        width, groups = config.hidden_size, config.num_query_groups
        self.dtype = dtype
        self.head_dim = config.head_dim
        self.rows = (width, groups * config.head_dim, groups * config.head_dim, config.num_heads)
        self.radius = config.frame_receptive_field if layer in config.local_attention_layers else None
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.pre_norm = RMSNorm(width, experts, device=device)
        self.linear_qkv = linear(width, sum(self.rows), experts, **factory)
        self.q_norm = RMSNorm(config.head_dim, experts, device=device)
        self.k_norm = RMSNorm(config.head_dim, experts, device=device)
        self.linear_proj = linear(width, width, experts, **factory)

    def forward(self, x, layout, rotary, attend):
        """x [B, N, D] fp32 -> what to add to it, [B, N, D] in the linears' dtype."""
        spans = layout.spans
        qkvg = project(self.linear_qkv, self.pre_norm(x, spans, self.dtype), spans)
        *qkv, gate_logits = qkvg.split(self.rows, dim=-1)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in qkv)
        q = rotate(self.q_norm(q, spans, torch.float32), rotary).to(v.dtype)
        k = rotate(self.k_norm(k, spans, torch.float32), rotary).to(v.dtype)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if self.radius is None:
            out = attend(q, k, v)
        else:
            out = local_attention(q, k, v, layout, self.radius, attend)
        out = gate_heads(out.transpose(1, 2), gate_logits).flatten(2)
        return project(self.linear_proj, out, spans)


class MLP(nn.Module):
    """Norm, up, activation, down: gelu7 at 4x width in the layers the configuration names, swiglu7 elsewhere."""

    def __init__(self, config, layer, *, operations, dtype, device):
        super().__init__()
        experts = len(MODALITIES) if layer in config.expert_layers else 1
        width, inner = config.hidden_size, config.mlp_width(layer)
        self.dtype = dtype
        self.gated = layer not in config.gelu7_layers
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.pre_norm = RMSNorm(width, experts, device=device)
        self.up_gate_proj = linear(width, 2 * inner if self.gated else inner, experts, **factory)
        self.down_proj = linear(inner, width, experts, **factory)

    def forward(self, x, layout):
        """x [B, N, D] fp32 -> what to add to it, [B, N, D] in the linears' dtype."""
        spans = layout.spans
        up = project(self.up_gate_proj, self.pre_norm(x, spans, self.dtype), spans)
        return project(self.down_proj, swiglu7(up) if self.gated else gelu7(up), spans)


class Layer(nn.Module):
    """One transformer layer on the fp32 residual stream."""

    def __init__(self, config, layer, **factory):
        super().__init__()
        self.attention = Attention(config, layer, **factory)
        self.mlp = MLP(config, layer, **factory)

    def forward(self, x, layout, rotary, attend):
        """x [B, N, D] fp32 -> the same; rotary [N, 6*(head_dim//8)] fp32; attend(q, k, v) as `grouped_attention`."""
        x = x + self.attention(x, layout, rotary, attend)
        return x + self.mlp(x, layout)


class Adapter(nn.Module):
    """Three fp32 Linears that bring video patches, audio latents and text features to the model's width."""

    def __init__(self, config, *, operations, device):
        super().__init__()
        for modality in MODALITIES:
            channels = getattr(config, f"{modality}_in_channels")
            embedder = operations.Linear(channels, config.hidden_size, bias=True, dtype=torch.float32, device=device)
            setattr(self, f"{modality}_embedder", embedder)

    def forward(self, video, audio, text):
        """video [B, Nv, 4C], audio [B, L, Ca], text [B, n, Ct], any float dtype -> packed x [B, N, D] fp32."""
        tokens = (
            self.video_embedder(video.float()),
            self.audio_embedder(audio.float()),
            self.text_embedder(text.float()),
        )
        return torch.cat(tokens, dim=1)
