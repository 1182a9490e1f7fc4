"""Train nano's transformer by flow matching on the latents of the world: the many-step teacher of the distilled one.

    python as_package.py nano.latents; python as_package.py nano.train_dit

The error of a picture's latent counts as much as the pixels that it moves, see nano/pixel_metric.py.
"""

import argparse

import numpy as np
import torch

from ..model_loader.config import DiTConfig
from ..model_loader.dit import DiT
from ..model_loader.load import load_dit
from .latents import LATENTS, SOUNDS, empty_prompt, encode_clips, encode_prompts
from .pixel_metric import nano_metric, weighted_square
from .train_video_vae import CHANNELS
from .training import WEIGHTS, bf16_matmuls, plain_attention, train

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
# (latent frames, audio latents, clips a batch): beginnings of clips cost less and teach what a prompt names as well
LENGTHS = ((3, 10, 32), (7, 26, 24), (LATENTS, SOUNDS, 16))
SHARES_FIRST, SHARES_LAST = np.array([0.5, 0.35, 0.15]), np.array([0.1, 0.3, 0.6])  # of the steps, changing linearly


class Examples:
    """Batches of clean latents with their text features, chosen by the step alone."""

    def __init__(self, clips, first=0):
        self.video, self.audio = (np.asarray(part) for part in encode_clips(clips, first=first))
        self.prompts = encode_prompts(clips, first=first)
        self.lengths = sorted(self.prompts)
        counts = np.array([len(self.prompts[n][0]) for n in self.lengths], float)
        self.shares = counts / counts.sum()
        self.empty = empty_prompt()

    def draw(self, rng, progress, without_text=0.0):
        """Return (video [B,48,T,6,6], audio [B,L,64], text [B,n,96]) fp32, of one of LENGTHS; progress: 0 to 1."""
        frames, sounds, size = LENGTHS[rng.choice(3, p=SHARES_FIRST + progress * (SHARES_LAST - SHARES_FIRST))]
        clips, features = self.prompts[rng.choice(self.lengths, p=self.shares)]
        rows = rng.integers(0, len(clips), size)
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
    """Return (x at `sigma` [B], velocity); `given`: index of what stays clean, its velocity not asked for.

    Video channels that hold nothing get no noise: the transformer's weights for them stay zero, in and out.
    """
    noise = torch.randn_like(clean)
    if clean.ndim == 5:
        noise[:, CHANNELS:] = 0
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
                weight.data *= (2 * dit.config.num_layers) ** -0.5
            if "final_linear" in name:
                weight.data.zero_()
            if name == "adapter.video_embedder.weight":
                weight.data.unflatten(1, (-1, 4))[:, CHANNELS:] = 0  # patches have their channel slowest
    return dit


def to_bf16_linears(dit):
    """Return the state dict in the published precision: bf16 linears; fp32 adapter, norms, final linears."""
    reference = DiT(dit.config, dtype=torch.bfloat16, device="meta").state_dict()
    return {name: tensor.to(reference[name].dtype) for name, tensor in dit.state_dict().items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument("--first", type=int, default=0, help="number of the first clip: 12000 for some never seen")
    parser.add_argument(
        "--from-weights",
        action="store_true",
        help="from nano/weights, by Muon, mostly on whole clips",
    )
    options = parser.parse_args()
    examples = Examples(options.clips, options.first)
    metric = nano_metric(examples.video)
    torch.manual_seed(0)
    if options.from_weights:
        dit = load_dit(WEIGHTS / "nano_dit.safetensors", dtype=torch.float32).train().requires_grad_(True)
    else:
        dit = initialise(DiT(CONFIG, dtype=torch.float32))

    def loss_of_step(step):
        rng = np.random.default_rng((51, step))
        progress = 1.0 if options.from_weights else step / options.steps
        video, audio, text = examples.draw(rng, progress, without_text=0.1)
        image_given, sound_given = draw_mode(rng)
        sigma = draw_sigmas(rng, len(video))
        x_video, v_video = noised(video, sigma, FIRST_FRAME if image_given else None)
        x_audio, v_audio = noised(audio, sigma, EVERYTHING if sound_given else None)
        with bf16_matmuls():
            got_video, got_audio = dit(x_video, x_audio, text, attention=plain_attention)
        wrong_video = weighted_square((got_video - v_video)[:, :, 1 if image_given else 0 :], metric)
        wrong_audio = (got_audio - v_audio).square().mean()
        loss = wrong_video + (0.0 if sound_given else 0.5) * wrong_audio
        return loss, {"video": wrong_video.item(), "audio": wrong_audio.item() if not sound_given else 0.0}

    how = {"peak_rate": 7e-4, "muon": dit.block} if options.from_weights else {"peak_rate": 2e-3}
    train("dit_teacher", dit, loss_of_step, steps=options.steps, warmup=200, ema=0.999, **how)


if __name__ == "__main__":
    main()
