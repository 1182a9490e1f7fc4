"""Parts of a joint latent that stay as they are while the rest is sampled: core's noise mask, 0 where held.

Core puts the held values in before every call of the model and takes them out of its answer, for any sampler. What such
a part was encoded from goes along, so that it need not come back through a VAE.
"""

import comfy.nested_tensor
import torch

PICTURE, SOUND = 0, 1  # the parts of a joint latent, in order
ORIGINALS = "happyhorse_originals"  # key in a LATENT: {part: (IMAGE or AUDIO, the latent [1,...] that it became)}


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


def fit_frames(video, frames, value=None):
    """Return a video latent or its mask [.,.,T,H,W] with `frames` latent frames, the end cut off or frames added.

    value: what is added; None repeats the last frame, which leaves an empty latent empty.
    """
    missing = frames - video.shape[2]
    if missing <= 0:
        return video[:, :, :frames]
    last = video[:, :, -1:] if value is None else torch.full_like(video[:, :, -1:], value)
    return torch.cat([video, last.expand(-1, -1, missing, -1, -1)], dim=2)


def with_original(latent, part, original):
    """Return the LATENT with what its `part` was encoded from: IMAGE [F,H,W,3] or AUDIO, of the clip's length."""
    became = latent["samples"].unbind()[part][:1]
    return {**latent, ORIGINALS: {**latent.get(ORIGINALS, {}), part: (original, became)}}


def original(latent, part):
    """Return what a `part` of a LATENT was encoded from; None if that is not known, or the part has been replaced."""
    given, became = latent.get(ORIGINALS, {}).get(part, (None, None))
    now = latent["samples"].unbind()[part]
    if given is None or now.shape[1:] != became.shape[1:]:
        return None
    return given if torch.allclose(now, became.to(now).expand_as(now), atol=1e-3) else None
