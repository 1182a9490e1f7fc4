"""Train nano's super-resolution transformer: from a clip's noised, resized latents to those of twice the size.

    python as_package.py nano.train_super_resolution

It walks a straight path: at noise level 1 stands what the sampler starts from (`start_super_resolution`), at 0 the
latent of the large clip. Both come from the video VAE, so train that first. An error of the latent counts as much as
the pixels that it changes (`pixel_metric`).
"""

import argparse

import numpy as np
import torch

from ..model_loader.config import DiTConfig
from ..model_loader.dit import DiT
from ..model_loader.load import load_video_vae, save_part
from ..sampler.schedule import flow_sigmas
from ..sampler.super_resolution import AUDIO_NOISE_SHARE, NOISE_LEVEL, STEPS, noised_latent, upsample_latent
from .latents import encode_clips, encode_prompts
from .train_dit import draw_mode, initialise, to_bf16_linears
from .train_video_vae import CHANNELS
from .training import WEIGHTS, bf16_matmuls, plain_attention, train

CONFIG = DiTConfig(
    num_layers=4,
    hidden_size=128,
    head_dim=32,
    num_query_groups=1,
    video_in_channels=192,
    audio_in_channels=64,
    text_in_channels=96,
    expert_layers=(0,),
    gelu7_layers=(0,),
    local_attention_layers=(1, 2),
    frame_receptive_field=2,
    positions="v1",
)
BATCH = 8
# What nano's second stage starts from. The published level, 220, drowns all but the coarsest of its half-whitened
# channels; corners that are not aligned put each cell of the small latent under one patch of the large one.
OWN_START = {"noise_level": 20, "align_corners": False}
OWN_SHARE = 0.8  # of the batches, at levels up to twice that one; the others start as published


class Pairs:
    """Batches of one clip's latents at both sizes with its sound and a prompt, chosen by the step alone."""

    def __init__(self, clips):
        self.small, self.audio = (np.asarray(part) for part in encode_clips(clips))
        self.large, _ = encode_clips(clips, scale=2)
        self.prompts = encode_prompts(clips)
        self.lengths = sorted(self.prompts)
        counts = np.array([len(self.prompts[n][0]) for n in self.lengths], float)
        self.shares = counts / counts.sum()

    def draw(self, rng):
        """Return (small [B,48,13,6,6], large [B,48,13,12,12], audio [B,51,64], text [B,n,96]) fp32."""
        clips, features = self.prompts[rng.choice(self.lengths, p=self.shares)]
        rows = rng.integers(0, len(clips), BATCH)
        chosen = clips[rows]
        parts = (self.small[chosen], self.large[chosen], self.audio[chosen], features[rows])
        return tuple(torch.from_numpy(part.astype(np.float32)) for part in parts)


def on_the_path(start, large, sigma):
    """Return (x at noise level `sigma` [B], velocity) between what the sampler starts from and the large clip."""
    level = sigma.view(-1, 1, 1, 1, 1)
    return level * start + (1 - level) * large, start - large


def draw_start(rng, small, large):
    """Return what the sampler starts from, shaped as `large`: nano's own way, or for some batches the published one."""
    noise = torch.randn_like(large)
    noise[:, CHANNELS:] = 0
    own = rng.random() < OWN_SHARE
    level = int(rng.integers(1, 2 * OWN_START["noise_level"] + 1)) if own else NOISE_LEVEL
    return noised_latent(upsample_latent(small, *large.shape[-2:], not own), noise, level)


def draw_levels(rng, count):
    """Return noise levels [count] in (0,1]: half of them those of the sampler's steps, half anywhere."""
    of_steps = flow_sigmas(STEPS)[rng.integers(0, STEPS, count)]
    return torch.where(torch.arange(count) % 2 == 0, of_steps, torch.from_numpy(rng.random(count, dtype=np.float32)))


@torch.no_grad()
def pixel_metric(decode, latent, size=0.2):
    """Return M [CHANNELS,CHANNELS]: an error e of a cell's channels moves the pixels by e @ M @ e, on average.

    Measured around `latent` [1,48,T,h,w] by decoding it with every channel shifted by `size`, up or down at random the
    same for all; M is scaled to a mean of 1 on its diagonal.
    """
    way = torch.randint(0, 2, (1, 1, *latent.shape[2:])) * 2.0 - 1
    axes = torch.eye(latent.shape[1])[:CHANNELS, None, :, None, None, None]
    unchanged = decode(latent)
    changes = torch.stack([(decode(latent + size * way * axis) - unchanged).flatten() for axis in axes])
    metric = changes @ changes.T
    return metric / metric.diagonal().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--clips", type=int, default=800)
    options = parser.parse_args()
    pairs = Pairs(options.clips)
    vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
    probes = [torch.from_numpy(pairs.large[i : i + 1, :, :5].astype(np.float32)) for i in range(12)]
    metric = torch.stack([pixel_metric(vae.decode_raw, probe) for probe in probes]).mean(0)
    torch.manual_seed(0)
    dit = initialise(DiT(CONFIG, dtype=torch.float32))

    def loss_of_step(step):
        rng = np.random.default_rng((91, step))
        small, large, audio, text = pairs.draw(rng)
        image_given, _ = draw_mode(rng)
        x, wanted = on_the_path(draw_start(rng, small, large), large, draw_levels(rng, len(large)))
        first = 1 if image_given else 0
        x[:, :, :first] = large[:, :, :first]
        heard = AUDIO_NOISE_SHARE * torch.randn_like(audio) + (1 - AUDIO_NOISE_SHARE) * audio
        with bf16_matmuls():
            velocity, _ = dit(x, heard, text, attention=plain_attention)
        wrong = (velocity - wanted)[:, :CHANNELS, first:].movedim(1, -1)
        loss = ((wrong @ metric) * wrong).mean()
        return loss, {"plain": wrong.square().mean().item()}

    dit = train("super_resolution", dit, loss_of_step, steps=options.steps, peak_rate=2e-3, warmup=100, ema=0.998)
    save_part(WEIGHTS / "nano_sr.safetensors", to_bf16_linears(dit), "dit", CONFIG, "nano_sr")


if __name__ == "__main__":
    main()
