"""T5Gemma encoder: token ids in, features of the last layer out (any size of the family)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention import grouped_attention
from .dit_layers import RMSNorm


class SelfAttention(nn.Module):
    """Bidirectional grouped-head attention with rotary positions; even layers see only a window of tokens."""

    def __init__(self, config, *, operations, dtype, device):
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attention_softcap
        inner, inner_kv = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        factory = {"bias": False, "dtype": dtype, "device": device}
        self.q_proj = operations.Linear(config.hidden_size, inner, **factory)
        self.k_proj = operations.Linear(config.hidden_size, inner_kv, **factory)
        self.v_proj = operations.Linear(config.hidden_size, inner_kv, **factory)
        self.o_proj = operations.Linear(inner, config.hidden_size, **factory)

    def forward(self, x, cos, sin, allowed):
        """x [B, n, D], cos and sin [n, head_dim] of x's dtype, allowed: bool [B or 1, 1, n, n] or None -> [B, n, D]."""
        projected = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for heads in projected)
        q, k = q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin
        if self.softcap is None:
            out = _masked_attention(q, k, v, allowed, self.scale)
        else:
            out = _softcapped_attention(q, k, v, allowed, self.scale, self.softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _half_turn(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _masked_attention(q, k, v, allowed, scale):
    if allowed is None:
        return grouped_attention(q, k, v, scale=scale)
    sees = allowed.any(-1, keepdim=True)  # a query that may see nothing gives 0, not the NaN of an empty softmax
    return grouped_attention(q, k, v, mask=allowed | ~sees, scale=scale) * sees


def _softcapped_attention(q, k, v, allowed, scale, cap):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


class MLP(nn.Module):
    """Gated MLP with the tanh-approximated GELU."""

    def __init__(self, config, *, operations, dtype, device):
        super().__init__()
        factory = {"bias": False, "dtype": dtype, "device": device}
        self.gate_proj = operations.Linear(config.hidden_size, config.intermediate_size, **factory)
        self.up_proj = operations.Linear(config.hidden_size, config.intermediate_size, **factory)
        self.down_proj = operations.Linear(config.intermediate_size, config.hidden_size, **factory)

    def forward(self, x):
        """x [B, n, D] -> [B, n, D]."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class EncoderLayer(nn.Module):
    """Attention and MLP, each normed before and after."""

    def __init__(self, config, **factory):
        super().__init__()
        norm = {"eps": config.norm_eps, "device": factory["device"]}
        self.self_attn = SelfAttention(config, **factory)
        self.mlp = MLP(config, **factory)
        self.pre_self_attn_layernorm = RMSNorm(config.hidden_size, **norm)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, **norm)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, **norm)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, **norm)

    def forward(self, x, cos, sin, allowed):
        """x [B, n, D] -> [B, n, D]."""
        attended = self.self_attn(self.pre_self_attn_layernorm(x), cos, sin, allowed)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TextEncoder(nn.Module):
    """T5Gemma encoder (arXiv 2504.06225), differentiable and batched.

    `operations` supplies Linear and Embedding (torch.nn, or comfy.ops.*). The residual stream runs in `dtype` (default:
    torch's default dtype) as in the published pipeline; norm weights stay fp32.
    """

    def __init__(self, config, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        factory = {"operations": operations, "dtype": self.dtype, "device": device}
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, dtype=self.dtype, device=device)
        self.layers = nn.ModuleList(EncoderLayer(config, **factory) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, device=device)

    def forward(self, ids, mask=None):
        """Encode ids [B, n] int64 < vocab_size; mask [B, n], 1 for tokens that count -> [B, n, hidden] in `dtype`."""
        x = self.embed_tokens(ids).to(self.dtype)
        x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=self.dtype, device=x.device)
        cos, sin = self.rotary(ids.shape[1], x)
        allowed = self.allowed(ids.shape[1], mask, x.device)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, allowed[i % 2])
        return self.norm(x)

    def rotary(self, length, x):
        """Return cos and sin of every position, each [length, head_dim] in x's dtype (computed in fp32)."""
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=x.device) / self.config.head_dim
        positions = torch.arange(length, dtype=torch.float32, device=x.device)
        angles = torch.outer(positions, 1.0 / self.config.rope_theta**half).repeat(1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def allowed(self, length, mask, device):
        """Return what a query may see in even and in odd layers: bool [B or 1, 1, n, n], None for everything."""
        every = None if mask is None else mask.bool()[:, None, None, :].expand(-1, 1, length, length)
        if length <= self.config.sliding_window:
            return every, every
        position = torch.arange(length, device=device)
        near = ((position[:, None] - position).abs() < self.config.sliding_window)[None, None]
        return near if every is None else every & near, every
