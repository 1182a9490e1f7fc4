"""Train nano's super-resolution transformer: from a clip's noised, resized latents to those of twice the size.

    python as_package.py nano.train_super_resolution
    python as_package.py nano.train_super_resolution --go-on    walks alone, from the weights that are there

It walks a straight path: at noise level 1 stands what the sampler starts from (`start_super_resolution`), at 0 the
latent of the large clip. Both come from the video VAE, so train that first. Then it learns from its own mistakes: the
sampler itself walks, and at each of its steps, wherever the last ones led, the large clip is where to go. An error of
the latent counts as much as the pixels that it moves, on average (nano/pixel_metric.py), and where a walk ends a
window of the clip is decoded and compared with the picture itself.
"""

import argparse
import math

import numpy as np
import torch

from ..model_loader.config import DiTConfig
from ..model_loader.dit import DiT
from ..model_loader.load import load_dit, load_video_vae, save_part
from ..sampler.conditioning import with_first_image
from ..sampler.denoise import denoise_unipc
from ..sampler.schedule import flow_sigmas
from ..sampler.super_resolution import AUDIO_NOISE_SHARE, NOISE_LEVEL, STEPS, noised_latent, upsample_latent
from . import world
from .latents import LATENTS, encode_clips, encode_prompts, scene_of
from .pixel_metric import nano_metric, weighted_square
from .train_dit import draw_mode, initialise, to_bf16_linears
from .train_video_vae import CHANNELS
from .training import WEIGHTS, bf16_matmuls, plain_attention, train

CONFIG = DiTConfig(
    num_layers=6,
    hidden_size=128,
    head_dim=32,
    num_query_groups=2,
    video_in_channels=192,
    audio_in_channels=64,
    text_in_channels=96,
    expert_layers=(),
    gelu7_layers=(0,),
    local_attention_layers=(1, 2, 3, 4),
    frame_receptive_field=2,
    positions="v1",
)
BATCH, OWN_BATCH = 8, 4  # clips a step; a step of the second kind is a whole walk
# What nano's second stage starts from. The published level, 220, drowns all but the coarsest of its half-whitened
# channels; corners that are not aligned put each cell of the small latent under one patch of the large one.
OWN_START = {"noise_level": 5, "align_corners": False}
OWN_LEVELS, OWN_SHARE = 20, 0.97  # trained at levels up to this one; the other batches start as published
SEEN, SEEN_WEIGHT = (2, 3), 80.0  # clips, and latents of each, that are decoded where a walk ends; weight of the pixels
CONTEXT = 3  # latents before a window that are decoded for what the decoder remembers: at 36 to 46 dB the whole clip's


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
        """Return (small [B,48,13,6,6], large [B,48,13,12,12], audio [B,51,64], text [B,n,96]) fp32, scenes [B]."""
        clips, features = self.prompts[rng.choice(self.lengths, p=self.shares)]
        rows = rng.integers(0, len(clips), count)
        chosen = clips[rows]
        parts = (self.small[chosen], self.large[chosen], self.audio[chosen], features[rows])
        return *(torch.from_numpy(part.astype(np.float32)) for part in parts), chosen


def on_the_path(start, large, sigma):
    """Return (x at noise level `sigma` [B], velocity) between what the sampler starts from and the large clip."""
    level = sigma.view(-1, 1, 1, 1, 1)
    return level * start + (1 - level) * large, start - large


def draw_start(rng, small, large):
    """Return what the sampler starts from, shaped as `large`: nano's own way, or for some batches the published one."""
    noise = torch.randn_like(large)
    noise[:, CHANNELS:] = 0
    own = rng.random() < OWN_SHARE
    level = int(rng.integers(1, OWN_LEVELS + 1)) if own else NOISE_LEVEL
    return noised_latent(upsample_latent(small, *large.shape[-2:], not own), noise, level)


def draw_levels(rng, count):
    """Return noise levels [count] in (0,1]: half of them those of the sampler's steps, half anywhere."""
    of_steps = flow_sigmas(STEPS)[rng.integers(0, STEPS, count)]
    return torch.where(torch.arange(count) % 2 == 0, of_steps, torch.from_numpy(rng.random(count, dtype=np.float32)))


def own_walk(velocity, start, heard, large, image_given, metric):
    """Return the mean loss over the steps of the sampler's walk from `start`, and the clip where it ends, as `large`.

    Each step is taught, none the one before; the clip hangs on the last. velocity: function(x, heard) -> both
    velocities, with gradients. Error in units of velocity, by `metric`.
    """
    losses, ends, first = [], [], 1 if image_given else 0

    def taught(x, audio, sigma):
        got, sound = velocity(x, audio)
        losses.append(weighted_square((got - (x - large) / sigma)[:, :, first:], metric))
        ends.append(x - sigma * got)
        return got.detach(), sound.detach()

    image = large[:, :, :1] if image_given else None
    denoise_unipc(taught, start, heard, flow_sigmas(STEPS), image=image, keep_audio=True)
    return torch.stack(losses).mean(), with_first_image(ends[-1], image)


def pixels_of(scene, window):
    """Return pixels [1,3,F,192,192] in [-1,1] of the latent frames `window`, a range, of training scene `scene`."""
    first, stop = max(0, 4 * window.start - 3), 4 * window.stop - 3
    frames = world.render_frames(scene_of(scene), stop - first, 2, first)
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1


def draw_window(rng, latents):
    """Return a range of `latents` latent frames somewhere in a clip."""
    first = int(rng.integers(0, LATENTS - latents + 1))
    return range(first, first + latents)


def decode_window(vae, latent, window):
    """Return the pixels [B,3,F,H,W], not clamped, of the latent frames `window`, a range, of a clip's `latent`.

    Gradients reach these latent frames alone; the CONTEXT before them is decoded without.
    """
    begin = max(0, window.start - CONTEXT)
    with bf16_matmuls():
        steps = vae.decode_steps(latent[:, :, begin : window.stop])
        with torch.no_grad():
            for _ in range(begin, window.start):
                next(steps)
        return torch.cat(list(steps), dim=2).float()


def with_pixels(walk, end, scenes, vae, rng):
    """Return the loss of a walk: its mean over the steps, `walk`, and the pixels of where it ends; and both as numbers.

    Of the first clips of `end` [B,48,13,12,12] a window is decoded and compared with the `scenes` [B] themselves.
    """
    clips, latents = SEEN
    errors = []
    for clip, scene in zip(end[:clips].split(1), scenes[:clips], strict=True):
        window = draw_window(rng, latents)
        errors.append((decode_window(vae, clip, window) - pixels_of(scene, window)).square().mean())
    error = torch.stack(errors).mean()
    return walk + SEEN_WEIGHT * error, {"walk": walk.item(), "psnr": -10 * math.log10(error.item() / 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--own-steps", type=int, default=5500, help="then so many walks of the sampler's own")
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument(
        "--go-on", action="store_true", help="from nano/weights, no steps but walks, at a quarter of the rate"
    )
    options = parser.parse_args()
    name, straight, peak_rate = "super_resolution", options.steps, 1.2e-3
    if options.go_on:
        name, straight, peak_rate = "super_resolution_on", 0, 3e-4
    path = WEIGHTS / "nano_sr.safetensors"
    pairs = Pairs(options.clips)
    metric = nano_metric(pairs.large)
    vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors").requires_grad_(False)
    torch.manual_seed(0)
    dit = load_dit(path, dtype=torch.float32) if options.go_on else initialise(DiT(CONFIG, dtype=torch.float32))
    dit.requires_grad_(True)

    def velocity(x, heard, text):
        with bf16_matmuls():
            return dit(x, heard, text, attention=plain_attention)

    def lesson(step, count):
        """Return the sampler's start, what it hears, text, large clip, whether its first frame is given, the scenes."""
        rng = np.random.default_rng((91, step))
        small, large, audio, text, scenes = pairs.draw(rng, count)
        image_given, _ = draw_mode(rng)
        heard = AUDIO_NOISE_SHARE * torch.randn_like(audio) + (1 - AUDIO_NOISE_SHARE) * audio
        return rng, draw_start(rng, small, large), heard, text, large, image_given, scenes

    def on_the_straight_path(step):
        rng, start, heard, text, large, image_given, _ = lesson(step, BATCH)
        x, wanted = on_the_path(start, large, draw_levels(rng, len(large)))
        first = 1 if image_given else 0
        x[:, :, :first] = large[:, :, :first]
        return weighted_square((velocity(x, heard, text)[0] - wanted)[:, :, first:], metric), {}

    def on_its_own_walk(step):
        rng, start, heard, text, large, image_given, scenes = lesson(step, OWN_BATCH)
        walk, end = own_walk(lambda x, audio: velocity(x, audio, text), start, heard, large, image_given, metric)
        return with_pixels(walk, end, scenes, vae, rng)

    def loss_of_step(step):
        return (on_the_straight_path if step < straight else on_its_own_walk)(step)

    dit = train(
        name, dit, loss_of_step,
        steps=straight + options.own_steps, peak_rate=peak_rate, warmup=100, ema=0.998, muon=dit.block,
    )  # fmt: skip
    save_part(path, to_bf16_linears(dit), "dit", CONFIG, "nano_sr")


if __name__ == "__main__":
    main()
