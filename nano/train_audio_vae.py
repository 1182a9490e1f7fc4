"""Make nano's audio VAE: core's Oobleck class, narrow, begun as principal components, refined on the world's sounds.

    python as_package.py nano.train_audio_vae

Trained from a random start, such a narrow network falls silent and stays so. But every stage of it cuts its signal into
segments and describes each by a few numbers, as principal components do: with those as the weights of the strided
convolutions, and everything between them passing the signal on, it reconstructs well before the first step.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from ..model_loader.config import OobleckConfig
from ..model_loader.core_vae import AudioVAE
from ..model_loader.load import save_part
from . import world
from .training import WEIGHTS, train

CONFIG = OobleckConfig(channels=4, latent_dim=64, c_mults=(2, 4, 8, 16, 24), strides=(8, 8, 4, 4, 2), sample_rate=51200)
WINDOW = 8  # frames of 2048 samples
FFTS = (256, 1024, 4096)
LATENT_NOISE = 0.05  # deviation of the latent, whose own is 1


def sounds(count, frames=51):
    """Return the sounds of `count` scenes, float32 [count, frames*2048]; faces, being harder, are two in three."""
    rng = np.random.default_rng(21)
    kinds = [("ball", "face", "cube", "face", "face", "face")[i % 6] for i in range(count)]
    return np.stack([world.render_sound(world.draw_scene(rng, kind=kind), frames) for kind in kinds])


def batch(pool, step, size):
    """Return stereo windows [size, 2, WINDOW*2048] chosen by `step` alone, at levels from 0.5 to 1."""
    rng = np.random.default_rng((22, step))
    frames = rng.integers(0, pool.shape[1] // world.HOP - WINDOW, size)
    clips = rng.integers(0, len(pool), size)
    starts = frames * world.HOP
    picked = np.stack([pool[i, s : s + WINDOW * world.HOP] for i, s in zip(clips, starts, strict=True)])
    levels = np.where(rng.random(size) < 0.5, 1.0, rng.uniform(0.5, 1.0, size))
    mono = torch.from_numpy((picked * levels[:, None]).astype(np.float32))
    return mono[:, None].repeat(1, 2, 1)


def segment_components(pool):
    """Return one matrix [outputs, inputs, stride] a stage: principal components of the segments that it describes."""
    signal = torch.from_numpy(pool)[:, None]  # [clips, channels, time]
    widths = [CONFIG.channels * mult for mult in CONFIG.c_mults]
    stages = []
    for stride, width in zip(CONFIG.strides, widths, strict=True):
        clips, channels, time = signal.shape
        segments = signal.reshape(clips, channels, time // stride, stride).permute(0, 2, 1, 3).flatten(2)
        flat = segments.flatten(0, 1)
        _, vectors = torch.linalg.eigh(flat.T.double() @ flat.double())
        components = vectors.flip(1)[:, : min(width, vectors.shape[1])].T.float()
        signal = F.pad((segments @ components.T).transpose(1, 2), (0, 0, 0, width - len(components)))
        stages.append(F.pad(components, (0, 0, 0, width - len(components))).reshape(width, channels, stride))
    return stages, signal


@torch.no_grad()
def start_from_components(vae, pool):
    """Set an Oobleck VAE to describe and rebuild the sounds of `pool` by nested principal components."""
    stages, codes = segment_components(pool)
    deviation = codes[:, : CONFIG.latent_dim].std((0, 2))
    deviation = deviation.clamp(min=0.03 * deviation.max().item())  # what hardly ever sounds is not blown up
    for name, parameter in vae.named_parameters():
        if name.endswith(("alpha", "beta")):
            parameter.fill_(-4.0 if name.endswith("alpha") else 0.0)  # log scale: the snakes begin almost straight

    def put(layer, centre):
        """Give a layer the weights `centre` in its middle taps and small random ones elsewhere."""
        weight = 1e-3 * torch.randn_like(layer.weight)
        first = (weight.shape[2] - centre.shape[2]) // 2
        weight[: centre.shape[0], : centre.shape[1], first : first + centre.shape[2]] += centre
        layer.weight = weight  # weight norm splits it into direction and length
        if layer.bias is not None:
            layer.bias.zero_()

    for module in vae.modules():
        if isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] in (1, 7):
            gain = 0.02 if module.kernel_size[0] == 1 else 1.0  # the 1-wide convolutions close a residual unit
            put(module, torch.zeros(1, 1, 1))
            inputs = module.in_channels * module.kernel_size[0]
            module.weight = gain * inputs**-0.5 * torch.randn_like(module.weight)
    encoder, decoder = vae.encoder.layers, vae.decoder.layers
    put(encoder[0], torch.full((1, 2, 1), 0.5))  # the middle of both sides
    put(decoder[-2], torch.ones(2, 1, 1))
    for stage, components in enumerate(stages):
        put(encoder[1 + stage].layers[-1], components)
        put(decoder[len(stages) - stage].layers[1], components)
    whiten = torch.diag(1 / deviation)[:, :, None]
    put(encoder[-1], whiten)
    encoder[-1].bias[CONFIG.latent_dim :] = np.log(np.expm1(LATENT_NOISE))  # softplus of it is the deviation
    put(decoder[0], torch.diag(deviation)[:, :, None])
    return vae


def spectral_distance(a, b):
    """Return how far apart the spectra of [B,2,n] waveforms are: relative, plus a little log distance."""
    total = 0.0
    for size in FFTS:
        window = torch.hann_window(size)
        one, two = (torch.stft(x[:, 0], size, size // 4, window=window, return_complex=True).abs() for x in (a, b))
        relative = (one - two).square().sum().sqrt() / two.square().sum().sqrt().clamp(min=1.0)
        total = total + relative + 0.1 * F.l1_loss((one + 1e-2).log(), (two + 1e-2).log())
    return total / len(FFTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pool", type=int, default=300, help="sounds rendered for training")
    options = parser.parse_args()
    torch.manual_seed(0)
    pool = sounds(options.pool)
    vae = start_from_components(AudioVAE(CONFIG).vae, pool)

    def loss_of_step(step):
        sound = batch(pool, step, 8)
        mean = vae.encoder(sound)[:, : CONFIG.latent_dim]
        result = vae.decoder(mean + LATENT_NOISE * torch.randn_like(mean))
        shape = spectral_distance(result, sound)
        wave = (result - sound).square().mean() / sound.square().mean().clamp(min=1e-3)
        # the mean keeps the scale that it starts with
        return shape + wave + 1e-3 * mean.square().mean(), {"shape": shape.item(), "snr": -10 * np.log10(wave.item())}

    vae = train(
        "audio_vae", vae, loss_of_step, steps=options.steps, peak_rate=2e-4, ema=0.99, weight_decay=0.0, warmup=20
    )
    halves = {name: tensor.half() for name, tensor in vae.state_dict().items()}
    save_part(WEIGHTS / "nano_audio_vae.safetensors", halves, "audio_vae", CONFIG, "nano")


if __name__ == "__main__":
    main()
