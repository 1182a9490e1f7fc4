"""Grouped-head attention for every network, and the local attention of 1080p super-resolution without an N x N mask."""

import functools

import torch
import torch.nn.functional as F

from ..kernels import Fp8Rows, attention_kernel, multiplied_out


@torch.compiler.assume_constant_result  # which it would not be with a cache of its own
def takes_groups(device, dtype, head_dim):
    """Tell whether torch's attention takes fewer heads of keys than of queries without keeping N x N scores.

    On cards FlashAttention alone does, which RTX 20 and some builds of torch for Windows lack.
    """
    return device.type != "cuda" or _flash_attention_serves(device, dtype, head_dim)


@functools.cache
def _flash_attention_serves(device, dtype, head_dim):
    q = torch.empty(1, 2, 16, head_dim, dtype=dtype, device=device)
    k = q[:, :1]
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, False, True))


def grouped_attention(q, k, v, mask=None, scale=None):
    """Softmax attention where query head h uses key/value head h // (Hq / Hkv).

    q [B, Hq, N, d], k and v [B, Hkv, M, d], any float dtype (softmax in fp32); mask: bool [..., N, M], True where a
    query may look; scale: default d ** -0.5. Returns [B, Hq, N, d] in q's dtype.
    """
    if mask is None and q.device.type == "cpu":  # torch's CPU kernel is quicker with the queries of a group in one head
        out = F.scaled_dot_product_attention(q.reshape(*k.shape[:2], -1, q.shape[-1]), k, v, scale=scale)
        return out.view(q.shape)
    group = q.shape[1] // k.shape[1]
    if group > 1 and not takes_groups(q.device, q.dtype, q.shape[-1]):
        k, v = (heads.repeat_interleave(group, 1) for heads in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def frame_windows(frames, radius):
    """Return for every latent frame the half-open range of frames within `radius` of it."""
    return tuple((max(0, f - radius), min(frames, f + radius + 1)) for f in range(frames))


def local_attention(q, k, v, layout, radius, attend=grouped_attention):
    """Attention in which a video query sees the frames within `radius`, all audio and all text; other queries see all.

    q [B, Hq, N, d], k and v [B, Hkv, N, d] in the token order of `layout`; `attend(q, k, v)` runs one block. Exact; its
    cost grows with the frames times the window. Returns [B, Hq, N, d] in q's dtype.
    """
    if radius >= layout.frames - 1:
        return attend(q, k, v)
    frame, video = layout.frame, layout.video
    k_rest, v_rest = k[:, :, video:], v[:, :, video:]
    out = torch.empty_like(q)
    for f, (first, last) in enumerate(frame_windows(layout.frames, radius)):
        near = slice(first * frame, last * frame)
        keys = torch.cat([k[:, :, near], k_rest], dim=2)
        values = torch.cat([v[:, :, near], v_rest], dim=2)
        queries = slice(f * frame, (f + 1) * frame)
        out[:, :, queries] = attend(q[:, :, queries], keys, values)
    out[:, :, video:] = attend(q[:, :, video:], k, v)
    return out


def by_frames(attend):
    """Turn attend(q, k, v) into what layers call: attention(q, k, v, layout, radius), which takes fp8 too."""

    def attention(q, k, v, layout, radius=None):
        if isinstance(q, Fp8Rows):
            q, k, v = multiplied_out(q, k, v)
        return attend(q, k, v) if radius is None else local_attention(q, k, v, layout, radius, attend)

    return attention


def joint_attention(q, k, v, layout, radius=None):
    """Attention of the transformer by the quickest way here: our own kernel, or torch with local layers frame by frame.

    q [B, Hq, N, d], k and v [B, Hkv, N, d] in the token order of `layout`; radius: of a local layer, in frames. Both
    products take fp8 where q and k come in it (`kernels.reference.attention`), or else what that leaves of q, k and v.
    """
    window = () if radius is None or radius >= layout.frames - 1 else (layout.frame, layout.frames, radius)
    kernel = attention_kernel(q, k, v)
    if kernel is not None:
        return kernel(q, k, v, *window)
    return by_frames(grouped_attention)(q, k, v, layout, radius)
