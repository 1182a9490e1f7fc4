"""Train nano's video VAE: core's Wan2.2 class, narrow; single frames first, then clips.

python as_package.py nano.train_video_vae
"""

import argparse
import multiprocessing
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ..model_loader.config import WanVAEConfig
from ..model_loader.core_vae import VideoVAE, initialise
from ..model_loader.load import save_part
from . import world
from .training import RUNS, WEIGHTS, train

CONFIG = WanVAEConfig(
    dim=12,
    dec_dim=16,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    temporal_downsample=(False, True, True),
    latent_mean=(0.0,) * 48,
    latent_std=(1.0,) * 48,
)
IMAGES, CLIPS = (1, 32), (17, 4)  # frames, and how many a batch


def render_clip(seed):
    """Return one clip of the world as uint8 [49,96,96,3]."""
    scene = world.draw_scene(np.random.default_rng((11, seed)))
    return (world.render_frames(scene, 49) * 255 + 0.5).astype(np.uint8)


def clips(count):
    """Return `count` clips as uint8 [count,49,96,96,3], rendered once and kept in nano/runs."""
    path = RUNS / f"clips_{count}.npy"
    if not path.exists():
        RUNS.mkdir(exist_ok=True)
        with multiprocessing.Pool(2) as pool:
            np.save(path, np.stack(pool.map(render_clip, range(count), chunksize=16)))
    return np.load(path, mmap_mode="r")


def batch(pool, step, size, frames):
    """Return pixels [size,3,frames,96,96] in [-1,1]: windows of the pool chosen by `step`, half of them mirrored."""
    rng = np.random.default_rng((12, step))
    starts = rng.integers(0, pool.shape[1] - frames + 1, size)
    chosen = rng.integers(0, len(pool), size)
    picked = np.stack([pool[i, s : s + frames] for i, s in zip(chosen, starts, strict=True)])
    pixels = torch.from_numpy(picked).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    mirrored = torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None, None]
    return torch.where(mirrored, pixels.flip(-1), pixels)


def reconstruct(vae, pixels):
    """Return (reconstruction, mean, log variance); core's `encode` drops the variance, so a hook catches both."""
    kept = {}
    hook = vae.conv1.register_forward_hook(lambda module, inputs, output: kept.update(both=output))
    vae.encode(pixels)
    hook.remove()
    mean, log_variance = kept["both"].float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    return vae.decode(latent).float(), mean, log_variance


@torch.no_grad()
def inflate(vae):
    """Turn a VAE trained on single frames into one for clips that starts by looking at the present frame only.

    Single frames never use the weights for the past (their random start would be noise); a level that halves the frame
    rate begins by dropping frames, one that doubles it by repeating them.
    """
    for name, layer in vae.named_modules():
        if not isinstance(layer, torch.nn.Conv3d) or layer.kernel_size[0] == 1:
            continue
        layer.weight[:, :, :-1] = 0
        if name.endswith("time_conv"):
            layer.weight.zero_()
            layer.bias.zero_()
            outputs = torch.arange(layer.out_channels)
            layer.weight[outputs, outputs % layer.in_channels, -1] = 1
    return vae


def psnr(a, b):
    """Return the peak signal-to-noise ratio in dB of two pixel tensors in [-1,1]."""
    return -10 * torch.log10(((a - b) / 2).square().mean())


def statistics(latents):
    """Return the mean and deviation of each channel of raw latents [N,48,T,h,w], as tuples for the configuration.

    A channel that carries almost nothing is not blown up to full size: its deviation counts as half the median one.
    """
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp(min=0.5 * std.median().item())
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-steps", type=int, default=1500)
    parser.add_argument("--clip-steps", type=int, default=700)
    parser.add_argument("--pool", type=int, default=1200, help="clips rendered for training")
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = initialise(VideoVAE(CONFIG)).vae
    pool = clips(options.pool)

    def loss_of(step, shape, divergence_weight):
        frames, size = shape
        pixels = batch(pool, step, size, frames)
        with torch.autocast("cpu", torch.bfloat16):
            result, mean, log_variance = reconstruct(vae, pixels)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = F.l1_loss(result, pixels) + 4 * F.mse_loss(result, pixels) + divergence_weight * divergence
        return loss, {"psnr": psnr(result.detach(), pixels), "kl": divergence.item()}

    of_images = train(
        "video_vae", vae, lambda step: loss_of(step, IMAGES, 5e-4), steps=options.image_steps, peak_rate=2e-3
    )
    vae.load_state_dict(of_images.state_dict())
    inflate(vae)
    vae = train(
        "video_vae_clips",
        vae,
        lambda step: loss_of(10**5 + step, CLIPS, 1e-4),
        steps=options.clip_steps,
        peak_rate=3e-4,
        warmup=20,
        save_every=100,
    ).eval()
    with torch.no_grad():
        mean, std = statistics(torch.cat([vae.encode(batch(pool, 10**6 + k, 4, 49)) for k in range(16)]))
    config = replace(CONFIG, latent_mean=mean, latent_std=std)
    save_part(WEIGHTS / "nano_video_vae.safetensors", vae.to(torch.float16), "video_vae", config, "nano")


if __name__ == "__main__":
    main()
