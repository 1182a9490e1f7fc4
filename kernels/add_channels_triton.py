"""The last step of the video decoder's residual blocks in Triton: adding a convolution's result and bias in place."""

import torch
import triton
import triton.language as tl

from .channel_norm_triton import blocks, rows_of_channels


@triton.jit
def add_channels_kernel(
    x, delta, bias,
    x_batch, x_frame, x_pixel,
    delta_batch, delta_frame, delta_pixel,
    frames, pixels,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each program adds to BLOCK_PIXELS pixels of a frame of x [batch, frames, pixels, CHANNELS]."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    frame = tl.program_id(1).to(tl.int64) % frames
    batch = tl.program_id(1).to(tl.int64) // frames
    channel = tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    x_at = x + (batch * x_batch + frame * x_frame + pixel * x_pixel)[:, None] + channel[None, :]
    delta_at = delta + (batch * delta_batch + frame * delta_frame + pixel * delta_pixel)[:, None] + channel[None, :]
    total = tl.load(x_at, mask=inside).to(tl.float32) + tl.load(delta_at, mask=inside).to(tl.float32)
    total += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    tl.store(x_at, total.to(x.dtype.element_ty), mask=inside)


def add_channels(x, delta, bias):
    """`reference.add_channels` of x and delta whose channels lie side by side, x's pixels in rows of one distance."""
    batch, channels, frames, height, width = x.shape
    pixels, at_once = height * width, blocks(height * width, channels)
    rows = x.permute(0, 2, 3, 4, 1).view(batch, frames, pixels, channels)
    rows_of_delta = rows_of_channels(delta)
    with torch.cuda.device_of(x):
        add_channels_kernel[(triton.cdiv(pixels, at_once["BLOCK_PIXELS"]), batch * frames)](
            rows, rows_of_delta, bias, *rows.stride()[:3], *rows_of_delta.stride()[:3],
            frames, pixels,
            CHANNELS=channels, **at_once,
        )  # fmt: skip
    return x
