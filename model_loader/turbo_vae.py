"""TurboVAED, the fast video decoder: normalised latent in, pixels out, in windows of a few latent frames."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import channel_norm, memory_format_of, takes_biases
from .turbo_pieces import Apart, in_pieces, normed, plain

NORM_EPS = 1e-8  # of every norm but the shortcut's, which the configuration gives


def preferred_format(device):
    """Return the memory format that convolutions on `device` run in without conversions: NVIDIA's read channels last.

    On a CPU the two were equally fast; elsewhere nothing was measured.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.channels_last_3d if nvidia else torch.contiguous_format


class Conv3(nn.Module):
    """3-D convolution of stride 1, padded with zeros in space; in time it uses up the `margin` of `in_pieces`."""

    def __init__(self, cin, cout, kernel, *, operations, **factory):
        super().__init__()
        self.margin = (kernel[0] - 1) // 2
        self.conv = operations.Conv3d(cin, cout, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2), **factory)

    @property
    def last(self):
        """The convolution whose bias is this layer's."""
        return self.conv

    def forward(self, x):
        """x [B, cin, T + 2 margin, H, W] -> [B, cout, T, H, W]."""
        return self.conv(x)


class SeparableConv3(nn.Module):
    """Conv3 split into one kernel per channel and a mix of channels."""

    def __init__(self, cin, cout, kernel, *, operations, **factory):
        super().__init__()
        self.margin = (kernel[0] - 1) // 2
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.depthwise_conv = operations.Conv3d(cin, cin, kernel, padding=padding, groups=cin, **factory)
        self.pointwise_conv = operations.Conv3d(cin, cout, 1, **factory)

    @property
    def last(self):
        """The convolution whose bias is this layer's."""
        return self.pointwise_conv

    def forward(self, x):
        """x [B, cin, T + 2 margin, H, W] -> [B, cout, T, H, W]."""
        return self.pointwise_conv(self.depthwise_conv(x))


class Residual(nn.Module):
    """Two normed and activated convolutions around a skip; ReLU comes first in blocks that up-sample."""

    def __init__(self, cin, cout, config, depthwise, relu, **factory):
        super().__init__()
        conv, size = (SeparableConv3, config.depthwise_kernel_size) if depthwise else (Conv3, 3)
        self.shortcut_eps = config.norm_eps
        self.first_activation = "relu" if relu else "silu"
        self.conv1 = conv(cin, cout, (size,) * 3, **factory)
        self.conv2 = conv(cout, cout, (size,) * 3, **factory)
        self.conv_shortcut = conv(cin, cout, (1, 1, 1), **factory) if cin != cout else None

    def forward(self, x):
        """x [B, cin, T, H, W] -> [B, cout, T, H, W], in place where the widths are equal."""
        if takes_biases(x):
            return self.with_biases_in_passing(x)
        h = in_pieces(normed(self.conv1, NORM_EPS, self.first_activation), x, self.conv1.margin)
        if self.conv_shortcut is not None:
            x = in_pieces(normed(self.conv_shortcut, self.shortcut_eps, None), x)
        return in_pieces(normed(self.conv2, NORM_EPS, "silu"), h, self.conv2.margin, added_to=x)

    def with_biases_in_passing(self, x):
        """`forward` with conv1's bias added by the norm after it, the others' by the last addition."""
        conv1, conv2 = Apart(self.conv1), Apart(self.conv2)
        ends_with = [conv2]
        h = in_pieces(normed(conv1, NORM_EPS, self.first_activation), x, self.conv1.margin)
        if self.conv_shortcut is not None:
            ends_with.append(Apart(self.conv_shortcut))
            x = in_pieces(normed(ends_with[1], self.shortcut_eps, None), x)
        layer = normed(conv2, NORM_EPS, "silu", conv1.bias)
        return in_pieces(layer, h, self.conv2.margin, added_to=x, bias=lambda: sum(conv.bias for conv in ends_with))


class Upsampler(nn.Module):
    """Twice the frames (unless space only), then twice the height and width."""

    def __init__(self, channels, space_only, *, operations, **factory):
        super().__init__()
        self.time_conv = None
        if not space_only:
            self.time_conv = Conv3(channels, 2 * channels, (3, 1, 1), operations=operations, **factory)
        # Published as entry 1 of a pair whose entry 0, the enlargement, holds no weights.
        self.resample = nn.Sequential(nn.Identity(), operations.Conv2d(channels, channels, 3, padding=1, **factory))

    def forward(self, x, first):
        """x [B, C, T, H, W] -> [B, C, 2T, 2H, 2W]; `first` drops the new frame before the clip's first one."""
        if self.time_conv is not None:
            pairs = in_pieces(plain(self.time_conv), x, self.time_conv.margin)
            x = interleave(*pairs.chunk(2, dim=1), memory_format_of(x))[:, :, 1 if first else 0 :]
        return in_pieces(
            lambda frames, *_: per_frame(lambda f: self.resample(F.interpolate(f, scale_factor=2)), frames),
            x,
            growth=4,
        )


def interleave(even, odd, memory_format):
    """Put the frames of two [B, C, T, H, W] in turn: [B, C, 2T, H, W]."""
    batch, channels, frames, *size = even.shape
    shape = batch, channels, 2 * frames, *size
    out = torch.empty(shape, dtype=even.dtype, device=even.device, memory_format=memory_format)
    out[:, :, 0::2], out[:, :, 1::2] = even, odd
    return out


def per_frame(operation, x):
    """Run an image operation on every frame of x [B, C, T, H, W]."""
    # Flattened with the channels last: else a single frame gets strides that do not show that they lie side by side.
    frames = operation(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1))
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Block(nn.Module):
    """Width change, up-sampling and residual blocks of one stage, in that order; each but the last optional."""

    def __init__(self, cin, cout, layers, config, depthwise, upsample, space_only, **factory):
        super().__init__()
        self.conv_in = Residual(cin, cout, config, depthwise, relu=False, **factory) if cin != cout else None
        self.upsamplers = nn.ModuleList([Upsampler(cout, space_only, **factory)] if upsample else [])
        self.resnets = nn.ModuleList(
            Residual(cout, cout, config, depthwise, relu=upsample, **factory) for _ in range(layers)
        )

    def layers(self, first):
        """Yield what runs in turn on x [B, cin, T, H, W]; `first` as in Upsampler."""
        if self.conv_in is not None:
            yield self.conv_in
        for upsampler in self.upsamplers:
            yield partial(upsampler, first=first)
        yield from self.resnets


class TurboVAE(nn.Module):
    """TurboVAED decoder as released with MagiHuman; weights and arithmetic in `dtype` (default: torch's)."""

    def __init__(self, config, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        dtype = dtype or torch.get_default_dtype()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        widths = (config.block_out_channels[0], *config.block_out_channels)
        self.conv_in = Conv3(config.latent_channels, widths[0], (3, 3, 3), **factory)
        self.mid_block = Block(
            widths[0], widths[0], config.layers_per_block[0], config, config.depthwise[0], False, False, **factory
        )
        self.up_blocks = nn.ModuleList(
            Block(
                widths[i],
                widths[i + 1],
                config.layers_per_block[i + 1],
                config,
                config.depthwise[i + 1],
                config.upsample[i],
                config.upsample_space_only[i],
                **factory,
            )
            for i in range(len(config.block_out_channels))
        )
        last, pixels = widths[-1], config.out_channels * 4
        if not config.unpatchify:
            self.upsampler2d_1 = nn.Module()
            self.upsampler2d_1.conv = operations.Conv2d(last, last, 3, padding=1, dtype=dtype, device=device)
            last, pixels = last // 4, config.out_channels
        self.conv_out = Conv3(last, pixels, (3, 3, 3), **factory)

    @property
    def dtype(self):
        """Dtype of the weights and of the arithmetic."""
        return self.conv_in.conv.weight.dtype

    def decode(self, latent):
        """Decode a normalised latent [B, C, T, h, w] -> pixels [B, 3, 4T-3, 16h, 16w] fp32, not clamped."""
        return torch.cat(list(self.decode_steps(latent)), dim=2).float()

    def decode_steps(self, latent):
        """Yield what `decode` returns a window at a time, in `dtype`.

        Windows overlap by one latent frame and are cut hard, as published, so nothing is kept between them.
        """
        z = self.denormalise(latent)
        length, first, step = z.shape[2], self.config.first_chunk_size, self.config.step_size
        ratio = self.config.temporal_compression
        padded = first + step * math.ceil(max(0, length - first) / step)
        z = torch.cat([z, z[:, :, -1:].expand(-1, -1, padded - length, -1, -1)], dim=2)
        left = length * ratio - (ratio - 1)
        for start in (0, *range(first, padded, step)):
            is_first = start == 0
            end = first if is_first else start + step
            skipped = 0 if is_first else ratio
            kept = min(left, (end - start) * ratio - (ratio - 1 if is_first else 0))
            left -= kept
            yield self.decode_window(z[:, :, max(0, start - 1) : end + 1], is_first)[:, :, skipped : skipped + kept]

    def denormalise(self, latent):
        """Undo the latent's normalisation in fp32; returned in `dtype`."""
        mean = torch.tensor(self.config.latent_mean, device=latent.device).view(1, -1, 1, 1, 1)
        inverse_std = (1.0 / torch.tensor(self.config.latent_std, device=latent.device)).view(1, -1, 1, 1, 1)
        return (latent.to(self.dtype) / inverse_std + mean).to(self.dtype)

    def decode_window(self, z, first):
        """Decode raw latent frames [B, C, T, h, w] at once -> 4T-3 pixel frames if they are the `first`, else 4T."""
        z = z.contiguous(memory_format=preferred_format(z.device))  # all that follows keeps the format
        x = in_pieces(plain(self.conv_in), z, self.conv_in.margin)
        for block in (self.mid_block, *self.up_blocks):
            for layer in block.layers(first):  # one loop, so that nothing else holds a layer's input
                x = layer(x)
        if not self.config.unpatchify:
            x = in_pieces(self.enlarged, x)
        pixels = in_pieces(normed(self.conv_out, NORM_EPS, "silu"), x, self.conv_out.margin)
        return unpatchify(pixels) if self.config.unpatchify else pixels

    def enlarged(self, x, *ends):
        """Twice the height and width of x [B, C, T, H, W], a quarter of its channels: the option without unpatchify."""
        x = channel_norm(x, NORM_EPS, "silu", *ends)
        return per_frame(lambda frame: F.pixel_shuffle(self.upsampler2d_1.conv(frame), 2), x)


def unpatchify(x):
    """Spread channels (c, column, row) of x [B, 4c, T, H, W] over 2x2 pixels -> [B, c, T, 2H, 2W]."""
    x = x.unflatten(1, (-1, 2, 2))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
