"""Parts of a joint latent that stay as they are while the rest is sampled: core's noise mask, 0 where held.

Core puts the held values in before every call of the model and takes them out of its answer, for any sampler.
"""

import comfy.nested_tensor
import torch
import torch.nn.functional as F


def masks(latent):
    """Return the noise masks of a joint LATENT: video [.,1,T,H,W] and audio [.,1,L], 1 everywhere if it has none."""
    video, audio = latent["samples"].unbind()
    given = latent.get("noise_mask")
    if getattr(given, "is_nested", False):
        return given.unbind()
    return [torch.ones_like(video[:1, :1]) if given is None else given, torch.ones_like(audio[:1, :1])]


def held_latent(video, audio, video_mask, audio_mask):
    """Return the LATENT of video [B,48,T,H,W] and audio [B,64,L] that are held where their mask is 0."""
    return {
        "samples": comfy.nested_tensor.NestedTensor((video, audio)),
        "noise_mask": comfy.nested_tensor.NestedTensor((video_mask, audio_mask)),
    }


def fit_frames(video, frames, value=0.0):
    """Return a video latent or its mask [.,.,T,H,W] with `frames` latent frames: `value` added, or the end cut off."""
    return F.pad(video, (0, 0, 0, 0, 0, frames - video.shape[2]), value=value)
