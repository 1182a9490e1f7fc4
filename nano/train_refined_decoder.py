"""Train the decoder of nano's video VAE once more: on what super-resolution leaves, beside clips of both sizes.

    python as_package.py nano.train_refined_decoder

Edges that the second stage puts a little off are what it did not see before. The encoder, and so every latent that a
transformer learned, stays as it is. Train super-resolution first.
"""

import argparse

import numpy as np
import torch

from ..model_loader.load import load_dit, load_video_vae
from ..sampler.denoise import denoise_unipc
from ..sampler.schedule import flow_sigmas
from ..sampler.super_resolution import STEPS, start_super_resolution
from .train_super_resolution import OWN_START, Pairs, decode_window, draw_window, pixels_of
from .train_video_vae import CLIPS, LARGE_CLIPS, batch, distance, psnr, save, with_noise
from .training import WEIGHTS, bf16_matmuls, plain_attention, train

WINDOW = 5  # latents of a clip that are decoded: 17 frames where it begins


@torch.no_grad()
def refined(network, pairs, rng):
    """Return (latent [1,48,13,12,12] where the sampler ends, a window of it, its true pixels) of a training clip."""
    small, large, audio, text, scenes = pairs.draw(rng, 1)
    start, heard = start_super_resolution(small, audio, *large.shape[-2:], torch.randn_like, **OWN_START)

    def velocity(x, heard, sigma):
        with bf16_matmuls():
            return network(x, heard, text, attention=plain_attention)

    end, _ = denoise_unipc(velocity, start, heard, flow_sigmas(STEPS), keep_audio=True)
    window = draw_window(rng, WINDOW)
    return end, window, pixels_of(scenes[0], window)


def lesson(step, whole, network, pairs):
    """Return the name of a step's kind, a latent, a window of it and the pixels there: every other step is refined."""
    if step % 2:
        return "refined", *refined(network, pairs, np.random.default_rng((92, step)))
    (frames, size), scale, name = (CLIPS, 1, "96") if step % 4 else (LARGE_CLIPS, 2, "192")
    pixels = batch(4 * 10**6 + step, size, frames, scale)
    with torch.no_grad(), bf16_matmuls():
        return name, with_noise(whole.encode(pixels)), range(WINDOW), pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--clips", type=int, default=8000)
    options = parser.parse_args()
    path = WEIGHTS / "nano_video_vae.safetensors"
    whole, pairs = load_video_vae(path), Pairs(options.clips)
    network = load_dit(WEIGHTS / "nano_sr.safetensors", dtype=torch.float32)
    whole.requires_grad_(False)
    whole.vae.decoder.requires_grad_(True)

    def loss_of_step(step):
        name, latent, window, pixels = lesson(step, whole, network, pairs)
        result = decode_window(whole, latent, window)
        return distance(result, pixels), {f"psnr_{name}": psnr(result.detach(), pixels)}

    refit = {"steps": options.steps, "peak_rate": 1.5e-4, "ema": 0.995, "save_every": 50}
    save(train("refined_decoder", whole, loss_of_step, **refit), path)


if __name__ == "__main__":
    main()
