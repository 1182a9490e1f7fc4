"""The video decoder's norm over the channels of every pixel, with its activation, in one read and one write."""

import torch
import triton
import triton.language as tl

ELEMENTS_PER_PROGRAM = 8192  # many pixels of few channels: 128 of 64


@triton.jit
def channel_norm_kernel(
    x, bias, out,
    x_batch, x_frame, x_pixel,
    out_batch, out_frame, out_pixel,
    frames, out_frames, pixels, before,
    eps,
    CHANNELS: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each program norms BLOCK_PIXELS pixels of a frame of out [batch, out_frames, pixels, CHANNELS].

    BIASED: bias [CHANNELS] is added to x first.

    Frames of out before the first of x, of which there are `before`, and after its last one are that one again.
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    frame = tl.program_id(1).to(tl.int64) % out_frames
    batch = tl.program_id(1).to(tl.int64) // out_frames
    source = tl.minimum(tl.maximum(frame - before, 0), frames - 1)
    channel = tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]

    x_rows = x + batch * x_batch + source * x_frame + pixel * x_pixel
    values = tl.load(x_rows[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        values += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / CHANNELS + eps)
    result = (values * inverse[:, None]).to(out.dtype.element_ty)
    if ACTIVATION == "relu":
        result = tl.maximum(result.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "silu":
        result = result.to(tl.float32)
        result = result * tl.sigmoid(result)
    out_rows = out + batch * out_batch + frame * out_frame + pixel * out_pixel
    tl.store(out_rows[:, None] + channel[None, :], result.to(out.dtype.element_ty), mask=inside)


def rows_of_channels(x):
    """View x [B, C, T, H, W] as [B, T, H * W, C]; pixels that do not lie in rows of one distance are copied."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3)


def blocks(pixels, channels):
    """Return {BLOCK_PIXELS, BLOCK_CHANNELS, num_warps} for so many of both."""
    block_channels = triton.next_power_of_2(channels)
    block_pixels = max(1, min(ELEMENTS_PER_PROGRAM // block_channels, triton.next_power_of_2(pixels)))
    warps = 8 if block_pixels * block_channels >= 4096 else 4
    return {"BLOCK_PIXELS": block_pixels, "BLOCK_CHANNELS": block_channels, "num_warps": warps}


def channel_norm(x, eps, activation=None, before=0, after=0, bias=None, out=None):
    """`reference.channel_norm` of x whose channels lie side by side; `out`, laid out so too, takes the result if given.

    Frames may lie anywhere; their pixels are copied first if they do not lie in rows of one distance.
    """
    batch, channels, frames, height, width = x.shape
    out_frames, pixels = before + frames + after, height * width
    if out is None:
        shape = batch, channels, out_frames, height, width
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    assert activation in (None, "relu", "silu") and out.shape[2] == out_frames
    assert out.stride(1) == 1 or channels == 1
    rows_in, rows_out = rows_of_channels(x), out.permute(0, 2, 3, 4, 1).view(batch, out_frames, pixels, channels)
    at_once = blocks(pixels, channels)
    with torch.cuda.device_of(x):
        channel_norm_kernel[(triton.cdiv(pixels, at_once["BLOCK_PIXELS"]), batch * out_frames)](
            rows_in, x if bias is None else bias, rows_out,
            *rows_in.stride()[:3], *rows_out.stride()[:3],
            frames, out_frames, pixels, before,
            eps,
            CHANNELS=channels, BIASED=bias is not None, ACTIVATION=activation, **at_once,
        )  # fmt: skip
    return out
