"""Layers of TurboVAED run piece by piece: as many frames at once as have a size, with their neighbours in time."""

import torch

from ..kernels import add_channels, channel_norm, memory_format_of, repeat_ends

# A layer works on as many frames at once as have this size: a window of 36 at 1920x1088 has 4.8 GB.
PIECE_BYTES = 2**30


def pieces(x, size):
    """Yield the (first, last + 1) frames of x [B, C, T, H, W] in pieces of at most `size` bytes, or one frame."""
    frames = max(1, size // x[:, :, 0].nbytes)
    yield from ((start, min(start + frames, x.shape[2])) for start in range(0, x.shape[2], frames))


def in_pieces(layer, x, margin=0, added_to=None, growth=1, bias=None):
    """Run layer(frames, before, after) on x [B, C, T, H, W] in pieces: with `margin` frames more on either side.

    At the ends of x some of them are missing: the layer is to repeat the first frame `before` times, the last one
    `after` times. growth: how many times larger than its input the layer's tensors get. Returns [B, C', T, H', W'] in
    x's memory format, or `added_to` with that added in place, and with what bias() returns.
    """
    frames, out = x.shape[2], added_to
    for start, end in pieces(x, PIECE_BYTES // growth):
        first, last = max(0, start - margin), min(frames, end + margin)
        result = layer(x[:, :, first:last], margin - (start - first), margin - (last - end))
        if out is None and end - start == frames:
            return result.contiguous(memory_format=memory_format_of(x))
        if out is None:
            shape = *result.shape[:2], frames, *result.shape[3:]
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
        if added_to is None:
            out[:, :, start:end] = result
        elif bias is not None:
            add_channels(out[:, :, start:end], result, bias())
        else:
            out[:, :, start:end].add_(result)  # += would also copy the sum onto itself
        del result  # the next one needs the room
    return out


def normed(conv, eps, activation, bias=None):
    """Return the layer of `in_pieces` that adds a bias, norms, activates (`kernels.channel_norm`), then convolves."""
    return lambda frames, *ends: conv(channel_norm(frames, eps, activation, *ends, bias=bias))


def plain(conv):
    """Return the layer of `in_pieces` that convolves."""
    return lambda frames, *ends: conv(repeat_ends(frames, *ends))


class Apart:
    """A convolution without its bias, which what comes after adds in passing: torch takes a pass of its own for it.

    conv: called with x; its bias is that of `conv.last`.
    """

    def __init__(self, conv):
        self.conv, self.last = conv, conv.last
        self.bias = None  # [C], known once the convolution has run

    def __call__(self, x):
        """See Conv3; less its bias."""
        self.last._conv_forward = self.convolve  # which torch's and ComfyUI's convolutions both end in
        try:
            return self.conv(x)
        finally:
            del self.last._conv_forward

    def convolve(self, x, weight, bias, *args, **kwargs):
        """Stand in for the convolution's method of that place."""
        self.bias = bias.clone()  # ComfyUI may take back what it brings over as soon as the convolution has run
        return type(self.last)._conv_forward(self.last, x, weight, None, *args, **kwargs)
