"""Train nano's super-resolution transformer: from a clip's noised, resized latents to those of twice the size.

    python as_package.py nano.train_super_resolution

It walks a straight path: at noise level 1 stands what the sampler starts from (`start_super_resolution`), at 0 the
latent of the large clip. Both come from the video VAE, so train that first. Then it learns from its own mistakes: the
sampler itself walks, and at each of its steps, wherever the last ones led, the large clip is where to go. An error of
the latent counts as much as the pixels that it moves, see nano/pixel_metric.py.
"""

import argparse

import numpy as np
import torch

from ..model_loader.config import DiTConfig
from ..model_loader.dit import DiT
from ..model_loader.load import save_part
from ..sampler.denoise import denoise_unipc
from ..sampler.schedule import flow_sigmas
from ..sampler.super_resolution import AUDIO_NOISE_SHARE, NOISE_LEVEL, STEPS, noised_latent, upsample_latent
from .latents import encode_clips, encode_prompts
from .pixel_metric import nano_metric, weighted_square
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
BATCH, OWN_BATCH = 8, 4  # clips a step; a step of the second kind is a whole walk
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

    def draw(self, rng, count=BATCH):
        """Return (small [B,48,13,6,6], large [B,48,13,12,12], audio [B,51,64], text [B,n,96]) fp32."""
        clips, features = self.prompts[rng.choice(self.lengths, p=self.shares)]
        rows = rng.integers(0, len(clips), count)
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


def own_walk(velocity, start, heard, large, image_given, metric):
    """Return the mean loss over the steps of the sampler's walk from `start`; each step is taught, none the one before.

    velocity: function(x, heard) -> both velocities, with gradients. Error in units of velocity, by `metric`.
    """
    losses, first = [], 1 if image_given else 0

    def taught(x, audio, sigma):
        got, sound = velocity(x, audio)
        losses.append(weighted_square((got - (x - large) / sigma)[:, :, first:], metric))
        return got.detach(), sound.detach()

    image = large[:, :, :1] if image_given else None
    denoise_unipc(taught, start, heard, flow_sigmas(STEPS), image=image, keep_audio=True)
    return torch.stack(losses).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--own-steps", type=int, default=2000, help="then so many walks of the sampler's own")
    parser.add_argument("--clips", type=int, default=800)
    options = parser.parse_args()
    pairs = Pairs(options.clips)
    metric = nano_metric(pairs.large)
    torch.manual_seed(0)
    dit = initialise(DiT(CONFIG, dtype=torch.float32))

    def velocity(x, heard, text):
        with bf16_matmuls():
            return dit(x, heard, text, attention=plain_attention)

    def lesson(step, count):
        """Return the sampler's start, what it hears, the text, the large clip, whether its first frame is given."""
        rng = np.random.default_rng((91, step))
        small, large, audio, text = pairs.draw(rng, count)
        image_given, _ = draw_mode(rng)
        heard = AUDIO_NOISE_SHARE * torch.randn_like(audio) + (1 - AUDIO_NOISE_SHARE) * audio
        return rng, draw_start(rng, small, large), heard, text, large, image_given

    def on_the_straight_path(step):
        rng, start, heard, text, large, image_given = lesson(step, BATCH)
        x, wanted = on_the_path(start, large, draw_levels(rng, len(large)))
        first = 1 if image_given else 0
        x[:, :, :first] = large[:, :, :first]
        return weighted_square((velocity(x, heard, text)[0] - wanted)[:, :, first:], metric)

    def on_its_own_walk(step):
        _, start, heard, text, large, image_given = lesson(step, OWN_BATCH)
        return own_walk(lambda x, audio: velocity(x, audio, text), start, heard, large, image_given, metric)

    def loss_of_step(step):
        return (on_the_straight_path if step < options.steps else on_its_own_walk)(step), {}

    dit = train(
        "super_resolution", dit, loss_of_step,
        steps=options.steps + options.own_steps, peak_rate=2e-3, warmup=100, ema=0.998,
    )  # fmt: skip
    save_part(WEIGHTS / "nano_sr.safetensors", to_bf16_linears(dit), "dit", CONFIG, "nano_sr")


if __name__ == "__main__":
    main()
