"""Train nano's audio VAE: core's Oobleck class, narrow, on the sounds of the world at 51200 Hz.

    python as_package.py nano.train_audio_vae
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from ..model_loader.config import OobleckConfig
from ..model_loader.core_vae import AudioVAE, initialise
from ..model_loader.load import save_part
from . import world
from .training import WEIGHTS, train

CONFIG = OobleckConfig(channels=4, latent_dim=64, c_mults=(2, 4, 8, 16, 24), strides=(8, 8, 4, 4, 2), sample_rate=51200)
WINDOW = 16  # frames of 2048 samples
FFTS = (256, 1024, 4096)


def sounds(count, frames=51):
    """Return the sounds of `count` scenes, float32 [count, frames*2048]; those of faces are two in three, being harder."""
    rng = np.random.default_rng(21)
    kinds = [("ball", "face", "cube", "face", "face", "face")[i % 6] for i in range(count)]
    return np.stack([world.render_sound(world.draw_scene(rng, kind=kind), frames) for kind in kinds])


def batch(pool, step, size):
    """Return stereo windows [size, 2, WINDOW*2048] chosen by `step` alone, levels from 0.5 to 1, half shifted off the frames."""
    rng = np.random.default_rng((22, step))
    width = WINDOW * world.HOP
    frames = rng.integers(0, pool.shape[1] // world.HOP - WINDOW, size)
    starts = frames * world.HOP + np.where(rng.random(size) < 0.25, rng.integers(0, world.HOP, size), 0)
    picked = np.stack([pool[i, s:s + width] for i, s in zip(rng.integers(0, len(pool), size), starts)])
    levels = np.where(rng.random(size) < 0.5, 1.0, rng.uniform(0.5, 1.0, size))
    mono = torch.from_numpy((picked * levels[:, None]).astype(np.float32))
    return mono[:, None].repeat(1, 2, 1)


def spectral_distance(a, b):
    """Return the mean L1 distance of the log magnitudes of [B,2,n] waveforms over three FFT sizes."""
    total = 0.0
    for size in FFTS:
        window = torch.hann_window(size)
        one, two = (torch.stft(x.flatten(0, 1), size, size // 4, window=window, return_complex=True).abs() for x in (a, b))
        total = total + F.l1_loss((one + 1e-3).log(), (two + 1e-3).log()) + 0.5 * F.l1_loss(one, two)
    return total / len(FFTS)


def reconstruct(vae, sound):
    """Return (reconstruction, mean, deviation) of stereo [B,2,n]."""
    mean, scale = vae.encoder(sound).chunk(2, dim=1)
    deviation = F.softplus(scale) + 1e-4
    return vae.decoder(mean + deviation * torch.randn_like(mean)), mean, deviation


def fold_statistics(vae, latents):
    """Rescale the layers around the latent so that each of its channels has mean 0 and deviation 1 ([B,64,L] given)."""
    mean, std = latents.mean((0, 2)), latents.std((0, 2))
    std = std.clamp(min=0.5 * std.median().item())
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    half = CONFIG.latent_dim
    with torch.no_grad():
        weight = last.weight.clone()
        weight[:half] /= std[:, None, None]
        last.weight = weight
        last.bias[:half] = (last.bias[:half] - mean) / std
        inner = first.weight.clone()
        first.bias += (inner * mean[None, :, None]).sum((1, 2))
        first.weight = inner * std[None, :, None]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pool", type=int, default=600, help="sounds rendered for training")
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = initialise(AudioVAE(CONFIG)).vae
    pool = sounds(options.pool)

    def loss_of_step(step):
        sound = batch(pool, step, 6)
        result, mean, deviation = reconstruct(vae, sound)
        divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
        shape, wave = spectral_distance(result, sound), F.l1_loss(result, sound)
        snr = 10 * torch.log10(sound.square().mean() / (result - sound).square().mean())
        return shape + 8 * wave + 2e-3 * divergence, {"shape": shape.item(), "wave": wave.item(),
                                                      "snr": snr.item(), "kl": divergence.item()}

    vae = train("audio_vae", vae, loss_of_step, steps=options.steps, peak_rate=1.5e-3).eval()
    with torch.no_grad():
        fold_statistics(vae, torch.cat([reconstruct(vae, batch(pool, 10**6 + k, 16))[1] for k in range(8)]))
    save_part(WEIGHTS / "nano_audio_vae.safetensors", vae, "audio_vae", CONFIG, "nano")


if __name__ == "__main__":
    main()
