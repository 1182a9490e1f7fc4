"""Train nano's video VAE: core's Wan2.2 class, narrow; frames, clips, the decoder alone, then both on two sizes.

python as_package.py nano.train_video_vae                        all four stages
python as_package.py nano.train_video_vae --from decoder         the last two, on the weights that are there
python as_package.py nano.train_video_vae --from together        the last one
"""

import argparse
import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ..model_loader.config import WanVAEConfig
from ..model_loader.core_vae import VideoVAE, initialise
from ..model_loader.load import load_video_vae, save_part
from . import world
from .training import WEIGHTS, train

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
CLIP = 49  # frames of a whole clip
IMAGES, CLIPS, LARGE_CLIPS = (1, 32), (17, 4), (17, 1)  # frames, and how many a batch
# Of the 48 latent channels this many carry the world (the other 32: under 1 % of the variance); the rest are zero, so
# that the transformer, narrower than 48 channels of noise in a patch, has to pass on a third of it only.
CHANNELS = 16
SPREAD = 1.2  # deviation of a normalised channel whose raw deviation is 1
LATENT_NOISE = 0.08  # deviation of what the decoder learns to overlook, in normalised units
HELD = 1.0  # weight of the square by which the last stage moves a normalised latent, beside `distance`


def batch(step, size, frames, scale=1):
    """Return pixels [size,3,frames,H,W] in [-1,1], H = W = 96 * scale: windows of scenes that no other step sees."""
    rng = np.random.default_rng((12, step))
    windows = []
    for _ in range(size):
        scene, first = world.draw_scene(rng), int(rng.integers(0, CLIP - frames + 1))
        window = world.render_frames(scene, frames, scale, first)
        windows.append(window[:, :, ::-1] if rng.random() < 0.5 else window)  # mirrored
    return torch.from_numpy(np.stack(windows)).permute(0, 4, 1, 2, 3) * 2 - 1


def of_either_size(step):
    """Return a batch of clips: those that nano makes, and at every other step ones of twice the size."""
    (frames, size), scale = (LARGE_CLIPS, 2) if step % 2 else (CLIPS, 1)
    return batch(step, size, frames, scale)


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


@torch.no_grad()
def rotate_to_principal(vae, latents):
    """Turn the latent's axes to its principal components, the first CHANNELS kept; return their deviations, a tuple.

    vae: core's class; its 1x1x1 convolutions around the latent take up the rotation. latents: raw, [N,48,T,h,w].
    """
    size = latents.shape[1]
    flat = latents.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    variances, axes = torch.linalg.eigh(torch.cov(flat))
    axes = axes.flip(1)
    axes[:, CHANNELS:] = 0
    into, out_of = vae.conv1, vae.conv2
    into.weight[:size] = torch.einsum("oz,oiabc->ziabc", axes, into.weight[:size])
    into.bias[:size] = axes.T @ (into.bias[:size] - mean)
    out_of.bias += out_of.weight[:, :, 0, 0, 0] @ mean
    out_of.weight.copy_(torch.einsum("oiabc,iz->ozabc", out_of.weight, axes))
    return tuple(variances.flip(0)[:CHANNELS].clamp(min=1e-8).sqrt().tolist())


def normalising_deviations(raw):
    """Return what each of the 48 channels is divided by: halfway between leaving the spectrum as it is and whitening.

    The few channels that say what a scene is stand far above the noise early in sampling, the many that draw its edges
    come later, as coarse and fine do in a picture.
    """
    return tuple(round(deviation**0.5 / SPREAD, 4) for deviation in raw) + (1.0,) * (CONFIG.z_dim - len(raw))


def train_autoencoder(image_steps, clip_steps):
    """Return encoder and decoder trained on frames, then on clips, the latent turned to its principal components."""
    torch.manual_seed(0)
    vae = initialise(VideoVAE(CONFIG)).vae

    def loss_of(step, shape, divergence_weight):
        frames, size = shape
        pixels = batch(step, size, frames)
        with torch.autocast("cpu", torch.bfloat16):
            result, mean, log_variance = reconstruct(vae, pixels)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return distance(result, pixels) + divergence_weight * divergence, {
            "psnr": psnr(result.detach(), pixels),
            "kl": divergence.item(),
        }

    of_images = train("video_vae", vae, lambda step: loss_of(step, IMAGES, 5e-4), steps=image_steps, peak_rate=2e-3)
    vae.load_state_dict(of_images.state_dict())
    inflate(vae)
    return train(
        "video_vae_clips",
        vae,
        lambda step: loss_of(10**5 + step, CLIPS, 1e-4),
        steps=clip_steps,
        peak_rate=3e-4,
        warmup=20,
        save_every=100,
    ).eval()


def with_principal_latent(vae):
    """Return a VideoVAE of core's `vae` with CHANNELS latent channels, turned and normalised on 128 clips."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch(10**6 + k, 4, CLIP)) for k in range(32)])
    raw = rotate_to_principal(vae, latents)
    whole = VideoVAE(replace(CONFIG, latent_std=normalising_deviations(raw)))
    whole.vae.load_state_dict(vae.state_dict())
    return whole


def train_decoder(whole, steps):
    """Train the decoder of a VideoVAE on clips of both sizes; its encoder, and so every latent, stays as it is."""
    whole.requires_grad_(False)
    whole.vae.decoder.requires_grad_(True)

    def loss_of_step(step):
        pixels = of_either_size(2 * 10**6 + step)
        with torch.autocast("cpu", torch.bfloat16):
            result = whole.decode_raw(with_noise(whole.encode(pixels)))
        return distance(result, pixels), {f"psnr{pixels.shape[-1]}": psnr(result.detach(), pixels)}

    return train("video_decoder", whole, loss_of_step, steps=steps, peak_rate=1e-3, warmup=30, ema=0.995, save_every=50)


def train_together(whole, steps):
    """Train encoder and decoder of a VideoVAE on clips of both sizes.

    The latents of the smaller are held to what they were, so that a transformer trained on those stays valid.
    """
    before = copy.deepcopy(whole).requires_grad_(False)
    whole.requires_grad_(False)
    whole.vae.requires_grad_(True)

    slow = torch.nn.ModuleList([whole.vae.encoder, whole.vae.conv1])
    return train(
        "video_vae_together",
        whole,
        lambda step: held_loss(whole, before, of_either_size(3 * 10**6 + step)),
        steps=steps,
        peak_rate=4e-4,
        slow=slow,
        ema=0.995,
        save_every=50,
    )


def held_loss(whole, before, pixels):
    """Return what `train` wants of a batch of either size; `before`: the VideoVAE whose latents of 96x96 are kept."""
    side = pixels.shape[-1]
    with torch.autocast("cpu", torch.bfloat16):
        latent = whole.encode(pixels)
        result = whole.decode_raw(with_noise(latent))
        loss, numbers = distance(result, pixels), {f"psnr{side}": psnr(result.detach(), pixels)}
        if side == world.SIZE:
            moved = (latent - before.encode(pixels))[:, :CHANNELS].square().mean()
            loss, numbers["moved"] = loss + HELD * moved, moved.item() ** 0.5
    return loss, numbers


def with_noise(latent):
    """Return a normalised latent with the noise that the decoder learns to overlook, in the channels that are used."""
    noise = LATENT_NOISE * torch.randn_like(latent)
    noise[:, CHANNELS:] = 0
    return latent + noise


def distance(result, pixels):
    """Return the loss between two pixel tensors in [-1,1]."""
    return F.l1_loss(result, pixels) + 4 * F.mse_loss(result, pixels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-steps", type=int, default=1500)
    parser.add_argument("--clip-steps", type=int, default=700)
    parser.add_argument("--decoder-steps", type=int, default=3400)
    parser.add_argument("--together-steps", type=int, default=2600)
    parser.add_argument("--from", dest="stage", choices=("decoder", "together"), help="go on from nano/weights here")
    options = parser.parse_args()
    path = WEIGHTS / "nano_video_vae.safetensors"
    if options.stage is None:
        save(with_principal_latent(train_autoencoder(options.image_steps, options.clip_steps)), path)
    if options.stage != "together":
        save(train_decoder(load_video_vae(path), options.decoder_steps), path)
    save(train_together(load_video_vae(path), options.together_steps), path)


def save(whole, path):
    """Write a VideoVAE in half precision."""
    halves = {name: tensor.half() for name, tensor in whole.state_dict().items()}
    save_part(path, halves, "video_vae", whole.config, "nano")


if __name__ == "__main__":
    main()
