"""Every op of the network in plain, differentiable torch with fp32 accumulation: the specification of the kernels.

`out_dtype` is a float dtype, or `fp8.FP8`: then the result is `Fp8Rows`, scaled row by row over its last axis.
"""

import torch
import torch.nn.functional as F

from .fp8 import FP8, FP8_MAX, Fp8Rows, fp8_scores, padded_columns, quantise_rows

ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "silu": F.silu}  # of channel_norm
CHANNEL_NORM_BYTES = 2**24  # of the frames that it works on at a time, in fp32; a frame of 1080p has more


def narrowed(wide, out_dtype, padded=False):
    """Return fp32 results as `out_dtype`, its rows `padded` with zeros or not, or as Fp8Rows."""
    if out_dtype == FP8:
        return quantise_rows(wide)
    missing = padded_columns(wide.shape[-1]) - wide.shape[-1] if padded else 0
    return F.pad(wide.to(out_dtype), (0, missing)) if missing else wide.to(out_dtype)


def rms_norm(x, weight, eps=1e-6, out_dtype=None):
    """Normalise the last axis by its root mean square and scale it by `weight + 1`.

    x [..., D], weight [D] (stored as an offset from 1); computed in fp32, returned as `out_dtype` (default: x's dtype).
    """
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return narrowed((wide * inverse).mul_(weight.float() + 1), out_dtype or x.dtype)


def rms_norm_spans(x, weight, spans, eps=1e-6, out_dtype=None):
    """`rms_norm` with one weight for each contiguous span of tokens.

    x [B, N, ..., D], weight [E, D], spans: E lengths that sum to N; returned as `out_dtype` (default: x's dtype).
    """
    parts = zip(x.split(spans, dim=1), weight, spans, strict=True)
    out_dtype = out_dtype or x.dtype
    part_dtype = torch.float32 if out_dtype == FP8 else out_dtype
    normed = [rms_norm(part, row, eps, part_dtype) for part, row, length in parts if length]
    return narrowed(normed[0] if len(normed) == 1 else torch.cat(normed, dim=1), out_dtype)


def add(x, delta, out=None):
    """Add to the residual stream: x fp32, delta of its shape and any float dtype -> fp32; `out` takes it if given."""
    return torch.add(x, delta, out=out)


def add_rms_norm_spans(x, delta, weight, spans, eps=1e-6, out_dtype=None, total=None):
    """Add to the residual stream and norm the sum: (x + delta, `rms_norm_spans` of it).

    x [B, N, D] fp32, delta [B, N, D] any float dtype, weight [E, D]; the sum is fp32, the norm `out_dtype`. `total`
    takes the sum if given; it may be x.
    """
    total = torch.add(x, delta, out=total)
    return total, rms_norm_spans(total, weight, spans, eps, out_dtype)


def swiglu7(x, out_dtype=None, padded=False):
    """Gated activation of the published network: even columns gate, odd columns are gated, both clamped at 7.

    x [..., 2M] -> [..., M] as `out_dtype` (default: x's dtype), or with zeros up to a multiple of 16 columns where
    `padded`; computed in fp32.
    """
    numbers = x.float() if x.device.type == "cpu" else x  # which reads every other bf16 number at a third of the speed
    gate, linear = numbers.unflatten(-1, (-1, 2)).unbind(-1)
    gated = sigmoid_gelu(gate.clamp(max=7)).mul_(linear.clamp(-7, 7).float().add_(1))
    return narrowed(gated, out_dtype or x.dtype, padded)


def gelu7(x, out_dtype=None, padded=False):
    """Sigmoid-approximated GELU, clamped at 7 from above: x [...] -> [...], `padded` as in swiglu7; in fp32."""
    return narrowed(sigmoid_gelu(x.clamp(max=7)), out_dtype or x.dtype, padded)


def sigmoid_gelu(x):
    """x * sigmoid(1.702 x), in fp32; an x that is fp32 already is written over."""
    wide = x.float().mul_(1.702)
    return F.silu(wide, inplace=not torch.is_grad_enabled()).mul_(1 / 1.702)


def rotate(x, sin_cos):
    """Rotary embedding of the first three quarters of every head, halves paired as in NeoX; the last quarter stays.

    x [B, N, H, d], sin_cos [N, 6*(d//8)] fp32 (all sines, then all cosines); returned as x's dtype, computed in fp32.
    """
    half = sin_cos.shape[-1] // 2
    sin, cos = sin_cos[:, None, :half], sin_cos[:, None, half:]
    first, second, rest = x.float().tensor_split((half, 2 * half), dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*turned, rest], dim=-1).to(x.dtype)


def attention_inputs(rows, q_weight, k_weight, spans, sin_cos, heads, eps=1e-6, out=None, fp8=False):
    """Turn the rows of the fused projection into what attention reads: q and k normed head by head and rotated.

    rows [B, N, (Hq + 2 Hkv) d + Hq] = queries, keys, values, one gate logit a query head; q_weight and k_weight [E, d]
    with one row for each of the `spans`; sin_cos as `rotate`; heads = (Hq, Hkv). Returns contiguous q [B, Hq, N, d],
    k and v [B, Hkv, N, d] in rows' dtype and the gate's sigmoid [B, N, Hq] fp32; computed in fp32. `out` takes them if
    given. fp8: q and k come as `fp8.fp8_scores` gives them; no normed and rotated key has a number above sqrt(d) times
    its largest weight.
    """
    (query_heads, key_heads), head_dim = heads, q_weight.shape[-1]
    qk, v, gate = rows.split(((query_heads + key_heads) * head_dim, key_heads * head_dim, query_heads), dim=-1)
    weight = torch.stack([q_weight] * query_heads + [k_weight] * key_heads, dim=1)  # [E, Hq + Hkv, d]
    normed = rms_norm_spans(qk.unflatten(-1, (-1, head_dim)), weight, spans, eps, torch.float32)
    rotated = rotate(normed, sin_cos).transpose(1, 2)
    q, k = (part.contiguous() for part in (rotated if fp8 else rotated.to(rows.dtype)).split(heads, dim=1))
    if fp8:
        q, k = fp8_scores(q, k, head_dim**0.5 * (k_weight.float() + 1).abs().amax())
    made = q, k, v.unflatten(-1, (-1, head_dim)).transpose(1, 2).contiguous(), torch.sigmoid(gate.float())
    if out is None:
        return made
    for place, result in zip(out, made, strict=True):
        pairs = zip(place, result, strict=True) if isinstance(result, Fp8Rows) else [(place, result)]
        for to, tensor in pairs:
            to.copy_(tensor)
    return out


def empty_attention_inputs(x, dtype, heads, head_dim, fp8=False):
    """Return places for what `attention_inputs` gives for x [B, N, C]: q, k, v in `dtype`, q and k in fp8, the gate."""
    (batch, tokens, _), (query_heads, key_heads) = x.shape, heads
    shape, key_shape = (batch, query_heads, tokens, head_dim), (batch, key_heads, tokens, head_dim)
    q, k = (x.new_empty(shape, dtype=FP8 if fp8 else dtype) for shape in (shape, key_shape))
    if fp8:
        q = Fp8Rows(q, x.new_empty((*shape[:3], 1), dtype=torch.float32))
    return q, k, x.new_empty(key_shape, dtype=dtype), x.new_empty((batch, tokens, query_heads), dtype=torch.float32)


def gate_heads(x, gate, out_dtype=None):
    """Scale every head by its gate and lay the heads side by side, in fp32.

    x [B, H, N, d], gate [B, N, H] in [0, 1] -> [B, N, H*d] as `out_dtype` (default: x's dtype).
    """
    gated = x.transpose(1, 2).float() * gate.float().unsqueeze(-1)
    return narrowed(gated.flatten(2), out_dtype or x.dtype)


def attention(q, k, v, frame=0, frames=0, radius=0):
    """Softmax attention where query head h uses key/value head h // (Hq / Hkv), within a window of frames or not.

    q [B, Hq, N, d], k and v [B, Hkv, N, d]. The first `frames` * `frame` queries see the frames within `radius` of
    their own and all tokens after the frames, every other query sees all tokens. Softmax in fp32; returned in v's
    dtype. Both products take fp8 where q and k come as `fp8.fp8_scores` gives them; v is then scaled column by column.
    """
    if isinstance(q, Fp8Rows):
        q, k, v = multiplied_out(q, k, v)
    token = torch.arange(q.shape[2], device=q.device)
    at, video = token // max(frame, 1), token < frame * frames
    near = (at[:, None] - at[None, :]).abs() <= radius
    allowed = near | ~video[:, None] | ~video[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])


def multiplied_out(q, k, v):
    """Return in v's dtype what an attention in fp8 multiplies: q and k as `fp8.fp8_scores`, v [B, Hkv, N, d]."""
    wide = v.float()
    scale = wide.abs().amax(2, keepdim=True).clamp(min=1e-12) / FP8_MAX
    rounded = (wide / scale).to(FP8).float() * scale
    return (q.values.float() * q.scale).to(v.dtype), k.to(v.dtype), rounded.to(v.dtype)


def fp8_weights(exponents):
    """Return what attention_fp8_hopper.py takes for 2 ** exponents: e4m3 numbers in fp32, of their shape.

    exponents: fp32 up to 8.75, which gives 448. The number's byte is 8 (exponent + 7), rounded: right for whole ones, a
    straight line in between, 0 where the byte rounds to less than 1.
    """
    byte = (8 * (exponents + 7)).round().clamp(0, 126)
    return byte.to(torch.uint8).view(FP8).float()


def renoise_step(x, velocity, noise, sigma, sigma_next):
    """One step of the 8-step sampler: predict the clean latent, then noise it afresh to the next level.

    x, velocity, noise: same shape, fp32; sigma, sigma_next: floats or 0-dim fp32 tensors in [0, 1]. Returns x's shape.
    """
    denoised = x - sigma * velocity
    return sigma_next * noise + (1 - sigma_next) * denoised


def fp8_linear(x, weight, out_features, out_dtype):
    """Multiply quantised rows by a quantised weight: x Fp8Rows of [..., I], weight Fp8Rows of [O, I] -> [..., O].

    `out_features` is O: the weight's rows may be padded to a multiple of 16. Sums in fp32, returned as `out_dtype`.
    """
    out = F.linear(x.values.float(), weight.values[:out_features].float())
    return (out * x.scale * weight.scale[:out_features, 0]).to(out_dtype)


def scale_rows_and_columns(x, rows, columns):
    """Multiply x [R, C], any float dtype, by rows [R, 1] and columns [1, C], fp32, in place; return it."""
    return x.mul_(rows).mul_(columns)


def channel_norm(x, eps, activation=None, before=0, after=0, bias=None):
    """Divide every pixel of x [B, C, T, H, W] by its root mean square over the channels, then activate it.

    activation: a key of ACTIVATIONS. bias [C], x's dtype: added to x first. Returns [B, C, before + T + after, H, W]
    with the ends repeated as `repeat_ends` does, in x's dtype and memory format; norm and activation are computed in
    fp32 and rounded to x's dtype.
    """
    batch, channels, frames, *size = x.shape
    shape, end = (batch, channels, before + frames + after, *size), before + frames
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    step = max(1, CHANNEL_NORM_BYTES // x[:, :, 0].nbytes)
    for start in range(0, frames, step):
        wide = x[:, :, start : start + step].float()
        wide = wide if bias is None else wide + bias.float().view(-1, 1, 1, 1)
        normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
        out[:, :, before:end][:, :, start : start + step] = ACTIVATIONS[activation](normed.to(x.dtype))
    out[:, :, :before], out[:, :, end:] = out[:, :, before : before + 1], out[:, :, end - 1 : end]
    return out


def add_channels(x, delta, bias):
    """Add delta, of its shape and dtype, and bias [C] to x [B, C, T, H, W] in place, in fp32; return x."""
    return x.copy_(x.float() + delta.float() + bias.float().view(-1, 1, 1, 1))


def repeat_ends(x, before, after):
    """Repeat the first frame of x [B, C, T, H, W] `before` times in front of it, and the last one `after` times."""
    if not before and not after:
        return x
    ends = x[:, :, :1].expand(-1, -1, before, -1, -1), x[:, :, -1:].expand(-1, -1, after, -1, -1)
    return torch.cat([ends[0], x, ends[1]], dim=2).contiguous(memory_format=memory_format_of(x))


def memory_format_of(x):
    """Return whether the channels or the pixels of x [B, C, T, H, W], or of some of its frames, lie side by side."""
    return torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format


def restore_rows(values, scale, dtype):
    """Return values [R, C], int8 or float8_e4m3fn, times scale, fp32 [R, 1] or [], in `dtype`, rounded once.

    dtype holds every value; in place, so that memory is written twice and not three times.
    """
    return values.to(dtype).mul_(scale)
