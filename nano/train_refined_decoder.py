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
from .train_super_resolution import OWN_START, Pairs, pixels_of
from .train_video_vae import CLIPS, LARGE_CLIPS, batch, distance, psnr, save, with_noise
from .training import WEIGHTS, bf16_matmuls, plain_attention, quicken_video_vae, train

LATENTS = 5  # of a refined clip that are decoded: 17 frames


@torch.no_grad()
def refined(network, pairs, rng):
    """Return (latents [1,48,5,12,12] where the sampler ends, pixels [1,3,17,192,192] in [-1,1]) of a training clip."""
    small, large, audio, text, scenes = pairs.draw(rng, 1)
    start, heard = start_super_resolution(small, audio, *large.shape[-2:], torch.randn_like, **OWN_START)

    def velocity(x, heard, sigma):
        with bf16_matmuls():
            return network(x, heard, text, attention=plain_attention)

    end, _ = denoise_unipc(velocity, start, heard, flow_sigmas(STEPS), keep_audio=True)
    return end[:, :, :LATENTS], pixels_of(scenes, LATENTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--clips", type=int, default=8000)
    options = parser.parse_args()
    quicken_video_vae()
    path = WEIGHTS / "nano_video_vae.safetensors"
    whole, pairs = load_video_vae(path), Pairs(options.clips)
    network = load_dit(WEIGHTS / "nano_sr.safetensors", dtype=torch.float32)
    whole.requires_grad_(False)
    whole.vae.decoder.requires_grad_(True)

    def lesson(step):
        """Return the name of a step's kind, latents and the pixels they should give: every other step is refined."""
        if step % 2:
            return "refined", *refined(network, pairs, np.random.default_rng((92, step)))
        (frames, size), scale, name = (CLIPS, 1, "96") if step % 4 else (LARGE_CLIPS, 2, "192")
        pixels = batch(4 * 10**6 + step, size, frames, scale)
        with torch.no_grad(), bf16_matmuls():
            return name, with_noise(whole.encode(pixels)), pixels

    def loss_of_step(step):
        name, latents, pixels = lesson(step)
        with bf16_matmuls():
            result = whole.decode_raw(latents)
        return distance(result, pixels), {f"psnr_{name}": psnr(result.detach(), pixels)}

    refit = {"steps": options.steps, "peak_rate": 1.5e-4, "ema": 0.995, "save_every": 50}
    save(train("refined_decoder", whole, loss_of_step, **refit), path)


if __name__ == "__main__":
    main()
