"""TurboVAED, the fast video decoder: normalised latent in, pixels out, in windows of a few latent frames."""

import math

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-8  # of every norm but the shortcut's, which the configuration gives


def channel_norm(x, eps):
    """Divide x [B, C, ...] by its root mean square over the channels, in fp32; returned as x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)).to(x.dtype)


class Conv3(nn.Module):
    """3-D convolution of stride 1: in time the end frames repeat, in space zeros pad."""

    def __init__(self, cin, cout, kernel, *, operations, **factory):
        super().__init__()
        self.pad_time = (kernel[0] - 1) // 2
        self.conv = operations.Conv3d(cin, cout, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2), **factory)

    def forward(self, x):
        """x [B, cin, T, H, W] -> [B, cout, T, H, W]."""
        return self.conv(repeat_ends(x, self.pad_time))


def repeat_ends(x, count):
    """Repeat the first and the last frame of x [B, C, T, H, W] `count` times."""
    if count == 0:
        return x
    return torch.cat([x[:, :, :1].expand(-1, -1, count, -1, -1), x, x[:, :, -1:].expand(-1, -1, count, -1, -1)], dim=2)


class SeparableConv3(nn.Module):
    """Conv3 split into one kernel per channel and a mix of channels."""

    def __init__(self, cin, cout, kernel, *, operations, **factory):
        super().__init__()
        self.pad_time = (kernel[0] - 1) // 2
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.depthwise_conv = operations.Conv3d(cin, cin, kernel, padding=padding, groups=cin, **factory)
        self.pointwise_conv = operations.Conv3d(cin, cout, 1, **factory)

    def forward(self, x):
        """x [B, cin, T, H, W] -> [B, cout, T, H, W]."""
        return self.pointwise_conv(self.depthwise_conv(repeat_ends(x, self.pad_time)))


class Residual(nn.Module):
    """Two normed and activated convolutions around a skip; ReLU comes first in blocks that up-sample."""

    def __init__(self, cin, cout, config, depthwise, relu, **factory):
        super().__init__()
        conv, size = (SeparableConv3, config.depthwise_kernel_size) if depthwise else (Conv3, 3)
        self.shortcut_eps = config.norm_eps
        self.first_activation = F.relu if relu else F.silu
        self.conv1 = conv(cin, cout, (size,) * 3, **factory)
        self.conv2 = conv(cout, cout, (size,) * 3, **factory)
        self.conv_shortcut = conv(cin, cout, (1, 1, 1), **factory) if cin != cout else None

    def forward(self, x):
        """x [B, cin, T, H, W] -> [B, cout, T, H, W]."""
        h = self.conv1(self.first_activation(channel_norm(x, NORM_EPS)))
        h = self.conv2(F.silu(channel_norm(h, NORM_EPS)))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(channel_norm(x, self.shortcut_eps))
        return h + skip


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
            even, odd = self.time_conv(x).chunk(2, dim=1)
            x = torch.stack([even, odd], dim=3).flatten(2, 3)
            x = x[:, :, 1:] if first else x
        return per_frame(lambda frame: self.resample(F.interpolate(frame.float(), scale_factor=2).to(x.dtype)), x)


def per_frame(operation, x):
    """Run an image operation on every frame of x [B, C, T, H, W]."""
    frames = operation(x.transpose(1, 2).flatten(0, 1))
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

    def forward(self, x, first):
        """x [B, cin, T, H, W] -> [B, cout, T', H', W']."""
        x = x if self.conv_in is None else self.conv_in(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, first)
        for resnet in self.resnets:
            x = resnet(x)
        return x


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
        x = self.mid_block(self.conv_in(z), first)
        for block in self.up_blocks:
            x = block(x, first)
        x = F.silu(channel_norm(x, NORM_EPS))
        if self.config.unpatchify:
            return unpatchify(self.conv_out(x))
        x = per_frame(lambda frame: F.pixel_shuffle(self.upsampler2d_1.conv(frame), 2), x)
        return self.conv_out(F.silu(channel_norm(x, NORM_EPS)))


def unpatchify(x):
    """Spread channels (c, column, row) of x [B, 4c, T, H, W] over 2x2 pixels -> [B, c, T, 2H, 2W]."""
    x = x.unflatten(1, (-1, 2, 2))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
