"""ComfyUI core's own VAE classes, built at any size: Wan2.2 for video, Oobleck for sound."""

import importlib
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

PLAYBACK_RATE = 44100  # Hz of every soundtrack we hand out


def core_class(module, name):
    """Import a class or function of ComfyUI core; ImportError with advice where there is no ComfyUI."""
    try:
        options = importlib.import_module("comfy.cli_args").args
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} comes from ComfyUI, which is not on sys.path ({error}); set COMFYUI_PATH to its folder"
        ) from None
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    if not gpu and "comfy.model_management" not in sys.modules:
        options.cpu = True  # outside its own server core would look for a GPU and fail
    return getattr(importlib.import_module(module), name)


def quicken_on_cpu(network):
    """Let core's Wan2.2 VAE compute what a processor is slow at in another way, to fp32's precision.

    Small fp32 convolutions over clips, as all of nano's are, run in oneDNN, where torch takes only large ones: by
    itself it takes 3 to 6 times as long. Core's norm, `normalize` over 16 channels, takes 15 times as long as a sum of
    squares, with its backward 5 times.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d) and torch.backends.mkldnn.is_available():
            layer._conv_forward = types.MethodType(_convolve, layer)
        if isinstance(layer, core_class("comfy.ldm.wan.vae", "RMS_norm")) and layer.bias is None:
            layer.forward = types.MethodType(_norm, layer)


def _convolve(layer, x, weight, bias, **options):
    """Do what core's `Conv3d._conv_forward` does; its autopad "causal_zero": the past that the weight sees is zero."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    known = options.get("autopad") in (None, "causal_zero") and set(options) <= {"autopad"}
    if not plain or not known or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return type(layer)._conv_forward(layer, x, weight, bias, **options)
    if options.get("autopad"):
        weight = weight[:, :, -x.shape[2] :]
    return torch.mkldnn_convolution(x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups)


def _norm(layer, x):
    """Do what core's `RMS_norm.forward` does over axis 1."""
    if x.device.type != "cpu":
        return type(layer).forward(layer, x)
    power = x.float().square().sum(1, keepdim=True).clamp(min=1e-24)
    return x * (power.rsqrt() * layer.scale).to(x.dtype) * layer.gamma.to(x.dtype)


class VideoVAE(nn.Module):
    """Core's Wan2.2 VAE between pixels in [-1, 1] and the normalised latent; 16x16 pixels and 4 frames to a latent."""

    def __init__(self, config, *, dtype=None, device=None):
        """Build uninitialised weights (see `initialise`) in `dtype`, default fp32."""
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.vae = core_class("comfy.ldm.wan.vae2_2", "WanVAE")(
                dim=config.dim,
                dec_dim=config.dec_dim,
                z_dim=config.z_dim,
                dim_mult=list(config.dim_mult),
                num_res_blocks=config.num_res_blocks,
                temperal_downsample=list(config.temporal_downsample),
            ).to(dtype or torch.float32)
        quicken_on_cpu(self.vae)

    @property
    def dtype(self):
        """Dtype of the weights and of the arithmetic."""
        return self.vae.conv2.weight.dtype

    def encode(self, pixels):
        """Encode pixels [B, 3, F, H, W] in [-1, 1] -> normalised latent [B, z, k+1, H/16, W/16] fp32.

        F must be 4k+1, H and W multiples of 16: ValueError otherwise.
        """
        mean, inverse_std = self.statistics(pixels.device)
        return ((self.encode_raw(pixels) - mean) * inverse_std).float()

    def encode_raw(self, pixels):
        """Encode as `encode`, without normalising: the mean of the latent in `dtype`."""
        frames, height, width = pixels.shape[2:]
        if frames % 4 != 1 or height % 16 or width % 16:
            raise ValueError(
                f"video of {frames} frames, {height} x {width}: expected 4k+1 frames and sides that are multiples of "
                "16; crop or resize it first"
            )
        return self.vae.encode(pixels.to(self.dtype))

    def decode(self, latent):
        """Decode a normalised latent [B, z, T, h, w] -> pixels [B, 3, 4T-3, 16h, 16w] fp32, clamped to [-1, 1]."""
        return self.decode_raw(latent).clamp(-1, 1)

    def decode_raw(self, latent):
        """Decode as `decode`, without the clamp."""
        return torch.cat(list(self.decode_steps(latent)), dim=2).float()

    def decode_steps(self, latent):
        """Iterate over what `decode_raw` returns, a latent frame at a time, in `dtype`: 1 pixel frame, then 4 and 4.

        Exact, because the decoder is causal: between steps each convolution keeps the last two frames that it saw.
        """
        mean, inverse_std = self.statistics(latent.device)
        return self._steps(self.vae.conv2(latent.to(self.dtype) / inverse_std + mean))

    def _steps(self, z):
        unpatchify, count = (core_class("comfy.ldm.wan.vae2_2", name) for name in ("unpatchify", "count_conv3d"))
        kept = [None] * count(self.vae.decoder)
        for t in range(z.shape[2]):
            frame = z[:, :, t : t + 1]
            yield unpatchify(self.vae.decoder(frame, feat_cache=kept, feat_idx=[0], first_chunk=t == 0), 2)

    def statistics(self, device):
        """Return the latent's mean and 1/std, each [1, z, 1, 1, 1], in `dtype` as in the published pipeline."""
        mean = torch.tensor(self.config.latent_mean, dtype=self.dtype, device=device)
        std = torch.tensor(self.config.latent_std, dtype=self.dtype, device=device)
        return mean.view(1, -1, 1, 1, 1), (1.0 / std).view(1, -1, 1, 1, 1)


class AudioVAE(nn.Module):
    """Core's Oobleck VAE between stereo at `config.sample_rate` (51200 Hz) and 25 latents a second; fp32 throughout."""

    def __init__(self, config, *, device=None):
        """Build uninitialised weights (see `initialise`)."""
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.vae = core_class("comfy.ldm.audio.autoencoder", "AudioOobleckVAE")(
                channels=config.channels,
                latent_dim=config.latent_dim,
                c_mults=list(config.c_mults),
                strides=list(config.strides),
            )

    @property
    def hop(self):
        """Samples to a latent."""
        return math.prod(self.config.strides)

    def encode(self, waveform, noise=None):
        """Encode stereo [B, 2, n] at `sample_rate` -> [B, 64, L]: the mean, or mean + noise * std for such noise."""
        mean, scale = self.encode_raw(waveform)
        return mean if noise is None else mean + noise * stdev(scale)

    def encode_raw(self, waveform):
        """Encode as `encode` -> mean and scale, each [B, 64, L]."""
        return self.vae.encoder(waveform.float()).chunk(2, dim=1)

    def decode(self, latent):
        """Decode [B, 64, L] -> stereo [B, 2, hop * L] at `sample_rate`."""
        return self.vae.decoder(latent.float())

    def decode_for_playback(self, latent):
        """Decode [B, 64, L] -> stereo [B, 2, n] at 44100 Hz."""
        waveform = self.decode(latent)
        return resample(waveform, waveform.shape[-1] * PLAYBACK_RATE // self.config.sample_rate)


def with_plain_weights(network):
    """Compute the weights of weight-normed convolutions once and for all: streaming cannot follow computed ones."""
    for layer in network.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return network


def stdev(scale):
    """Standard deviation of the audio latent, from the second half of the encoder's output."""
    return F.softplus(scale) + 1e-4


def resample(waveform, samples):
    """Resample [..., n] to [..., samples] by cutting or padding its spectrum (what scipy.signal.resample computes)."""
    length = waveform.shape[-1]
    spectrum = torch.fft.rfft(waveform.float())
    kept = min(length, samples)
    out = torch.zeros(*waveform.shape[:-1], samples // 2 + 1, dtype=spectrum.dtype, device=waveform.device)
    out[..., : kept // 2 + 1] = spectrum[..., : kept // 2 + 1]
    if kept % 2 == 0 and samples != length:  # the bin at half the smaller rate stands for two frequencies
        out[..., kept // 2] *= 2.0 if samples < length else 0.5
    return torch.fft.irfft(out, n=samples) * (samples / length)


@torch.no_grad()
def initialise(module):
    """Give core's convolutions torch's usual random start; their class skips it because it expects a checkpoint."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            weight = torch.empty_like(layer.weight)
            nn.init.kaiming_uniform_(weight, a=5**0.5)
            if parametrize.is_parametrized(layer):
                layer.weight = weight  # splits it into direction and length
            else:
                layer.weight.copy_(weight)
            if layer.bias is not None:
                bound = weight[0].numel() ** -0.5
                layer.bias.uniform_(-bound, bound)
    return module
