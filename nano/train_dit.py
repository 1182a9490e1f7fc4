"""Train nano's transformer by flow matching on the latents of the world: the many-step teacher of the distilled one.

python as_package.py nano.latents; python as_package.py nano.train_dit
"""

import argparse

import numpy as np
import torch

from ..model_loader.config import DiTConfig
from ..model_loader.dit import DiT
from .latents import LATENTS, SOUNDS, empty_prompt, encode_clips, encode_prompts
from .training import train

CONFIG = DiTConfig(
    num_layers=8,
    hidden_size=160,
    head_dim=32,
    num_query_groups=1,
    video_in_channels=192,
    audio_in_channels=64,
    text_in_channels=96,
    expert_layers=(0, 7),
    gelu7_layers=(0,),
    local_attention_layers=(),
    frame_receptive_field=11,
    positions="v2",
)
# what is given besides the prompt -> share of the batches
MODES = {"text": 0.60, "image": 0.28, "sound": 0.08, "image and sound": 0.04}


class Examples:
    """Batches of clean latents with their text features, chosen by the step alone."""

    def __init__(self, clips):
        self.video, self.audio = (np.asarray(part) for part in encode_clips(clips))
        self.prompts = encode_prompts(clips)
        self.lengths = sorted(self.prompts)
        counts = np.array([len(self.prompts[n][0]) for n in self.lengths], float)
        self.shares = counts / counts.sum()
        self.empty = empty_prompt()

    def draw(self, rng, without_text=0.0):
        """Return (video [B,48,T,6,6], audio [B,L,64], text [B,n,96]) fp32: two-second clips, or their first second."""
        short = rng.random() < 0.5
        clips, features = self.prompts[rng.choice(self.lengths, p=self.shares)]
        rows = rng.integers(0, len(clips), 24 if short else 16)
        frames, sounds = (7, 26) if short else (LATENTS, SOUNDS)
        video = torch.from_numpy(self.video[clips[rows], :, :frames].astype(np.float32))
        audio = torch.from_numpy(self.audio[clips[rows], :sounds].astype(np.float32))
        text = torch.from_numpy(features[rows].astype(np.float32))
        if rng.random() < without_text:
            text = self.empty.expand(len(rows), -1, -1)
        return video, audio, text


def draw_mode(rng):
    """Return (image given, sound given)."""
    mode = rng.choice(list(MODES), p=list(MODES.values()))
    return "image" in mode, "sound" in mode


def noised(clean, sigma, given=None):
    """Return (x at `sigma` [B], velocity); `given`: index of what stays clean, with velocity 0 not asked for."""
    noise = torch.randn_like(clean)
    level = sigma.view(-1, *[1] * (clean.ndim - 1))
    x = level * noise + (1 - level) * clean
    if given is not None:
        x[given] = clean[given]
    return x, noise - clean


FIRST_FRAME = (slice(None), slice(None), slice(0, 1))
EVERYTHING = (slice(None),)


def draw_sigmas(rng, count):
    """Return noise levels [count] in (0,1): half from the sampler's shifted schedule, half from a flatter one."""
    u = torch.from_numpy(rng.random(count).astype(np.float32)) * 0.998 + 0.001
    shift = torch.where(torch.arange(count) % 2 == 0, 5.0, 1.5)
    return shift * u / (1 + (shift - 1) * u)


def initialise(dit):
    """Start small: every layer adds little, the final linears nothing."""
    for name, weight in dit.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if "proj" in name and "up_gate" not in name:
                weight.data *= (2 * CONFIG.num_layers) ** -0.5
            if "final_linear" in name:
                weight.data.zero_()
    return dit


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--clips", type=int, default=2000)
    options = parser.parse_args()
    examples = Examples(options.clips)
    torch.manual_seed(0)
    dit = initialise(DiT(CONFIG, dtype=torch.float32))

    def loss_of_step(step):
        rng = np.random.default_rng((51, step))
        video, audio, text = examples.draw(rng, without_text=0.1)
        image_given, sound_given = draw_mode(rng)
        sigma = draw_sigmas(rng, len(video))
        x_video, v_video = noised(video, sigma, FIRST_FRAME if image_given else None)
        x_audio, v_audio = noised(audio, sigma, EVERYTHING if sound_given else None)
        got_video, got_audio = dit(x_video, x_audio, text)
        wrong_video = (got_video - v_video)[:, :, 1 if image_given else 0 :].square().mean()
        wrong_audio = (got_audio - v_audio).square().mean()
        loss = wrong_video + (0.0 if sound_given else 0.5) * wrong_audio
        return loss, {"video": wrong_video.item(), "audio": wrong_audio.item() if not sound_given else 0.0}

    train("dit_teacher", dit, loss_of_step, steps=options.steps, peak_rate=2e-3, warmup=200, ema=0.999)


if __name__ == "__main__":
    main()
