"""What an error of a latent costs in pixels: the measure by which nano's transformers learn.

The half-whitened channels of the latent differ 500-fold in how far they move the picture; counted alike, the eight that
hardly show would take half of what a small transformer can learn.
"""

import numpy as np
import torch

from ..model_loader.load import load_video_vae
from .train_video_vae import CHANNELS
from .training import WEIGHTS

EVENLY = 0.1  # share of the metric that counts all channels alike, so that none is forgotten


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


def nano_metric(latents, clips=12):
    """Return the metric of nano's video VAE around the beginnings of `clips` of `latents` [n,48,T,h,w] (numpy)."""
    decode = load_video_vae(WEIGHTS / "nano_video_vae.safetensors").decode_raw
    probes = torch.from_numpy(np.asarray(latents[:clips, :, :5], np.float32)).split(1)
    torch.manual_seed(0)
    metric = torch.stack([pixel_metric(decode, probe) for probe in probes]).mean(0)
    return EVENLY * torch.eye(CHANNELS) + (1 - EVENLY) * metric


def weighted_square(error, metric):
    """Return the mean over cells and channels of an `error` [B,48,T,h,w] of latents, each cell's by `metric`."""
    error = error[:, :CHANNELS].movedim(1, -1)
    return ((error @ metric) * error).mean()
