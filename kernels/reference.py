"""Every op of the network in plain, differentiable torch with fp32 accumulation: the specification of the kernels."""

import torch


def rms_norm(x, weight, eps=1e-6, out_dtype=None):
    """Normalise the last axis by its root mean square and scale it by `weight + 1`.

    x [..., D], weight [D] (stored as an offset from 1); computed in fp32, returned as `out_dtype` (default: x's dtype).
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + 1)
    return normed.to(out_dtype or x.dtype)


def rms_norm_spans(x, weight, spans, eps=1e-6, out_dtype=None):
    """`rms_norm` with one weight for each contiguous span of tokens.

    x [B, N, ..., D], weight [E, D], spans: E lengths that sum to N; returned as `out_dtype` (default: x's dtype).
    """
    parts = x.split(spans, dim=1)
    return torch.cat([rms_norm(part, w, eps, out_dtype) for part, w in zip(parts, weight, strict=True)], dim=1)


def swiglu7(x, out_dtype=None):
    """Gated activation of the published network: even columns gate, odd columns are gated, both clamped at 7.

    x [..., 2M] -> [..., M] as `out_dtype` (default: x's dtype); computed in fp32.
    """
    gate, linear = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    gate = gate.clamp(max=7)
    linear = linear.clamp(-7, 7)
    return (gate * torch.sigmoid(1.702 * gate) * (linear + 1)).to(out_dtype or x.dtype)


def gelu7(x, out_dtype=None):
    """Sigmoid-approximated GELU, clamped at 7 from above: x [...] -> [...] as `out_dtype`; computed in fp32."""
    wide = x.float().clamp(max=7)
    return (wide * torch.sigmoid(1.702 * wide)).to(out_dtype or x.dtype)


def rotate(x, sin_cos):
    """Rotary embedding of the first three quarters of every head, halves paired as in NeoX; the last quarter stays.

    x [B, N, H, d], sin_cos [N, 6*(d//8)] fp32 (all sines, then all cosines); returned as x's dtype, computed in fp32.
    """
    half = sin_cos.shape[-1] // 2
    sin, cos = sin_cos[:, None, :half], sin_cos[:, None, half:]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def gate_heads(x, gate_logits):
    """Scale every head by the sigmoid of its logit, in fp32: x [B, N, H, d], gate_logits [B, N, H] -> x's dtype."""
    return (x.float() * torch.sigmoid(gate_logits.float()).unsqueeze(-1)).to(x.dtype)


def renoise_step(x, velocity, noise, sigma, sigma_next):
    """One step of the 8-step sampler: predict the clean latent, then noise it afresh to the next level.

    x, velocity, noise: same shape, fp32; sigma, sigma_next: floats or 0-dim fp32 tensors in [0, 1]. Returns x's shape.
    """
    denoised = x - sigma * velocity
    return sigma_next * noise + (1 - sigma_next) * denoised
