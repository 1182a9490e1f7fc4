"""The denoising loops, which know the network only as a function velocity(video, audio, sigma) of both latents.

| stage | guidance | loop |
|---|---|---|
| distill, 8 steps | none | `denoise_renoise` |
| base, 32 steps | `conditioning.guided` | `denoise_unipc` |
| super-resolution, 5 steps | none or `guided` | `denoise_unipc` with `keep_audio` |
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from .conditioning import with_first_image
from .steps import UniPC, renoise_step


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did, for progress and previews: its inputs as the network saw them, velocities and results."""

    index: int
    sigma: float
    video: torch.Tensor
    audio: torch.Tensor
    video_velocity: torch.Tensor
    audio_velocity: torch.Tensor
    next_video: torch.Tensor
    next_audio: torch.Tensor

    @property
    def denoised_video(self):
        """The clean video latent as this step predicts it: what a preview shows."""
        return self.video - self.sigma * self.video_velocity


def seeded_noise(seed):
    """Return noise(like) -> standard normal of `like`'s shape, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)


def denoise_renoise(velocity, video, audio, sigmas, *, noise, image=None, keep_audio=False, on_step=None):
    """Run the distilled model's sampler: at each step predict the clean latents, then noise them afresh.

    velocity: function(video, audio, sigma) -> (video velocity, audio velocity), shapes as the latents, fp32.
    video [B, C, T, H, W] and audio [B, L, Ca]: fp32, pure noise, except an audio that `keep_audio` holds.
    sigmas [steps + 1]: falling to 0, see `flow_sigmas`.
    noise: function(like) -> normal noise of that shape, called for the video, then for the audio, at every step.
    image [B, C, 1, H, W]: normalised latent written into frame 0 before every call and at the end.
    keep_audio: `audio` is a driving soundtrack (clean): the network hears it as it is and it comes back untouched.
    on_step: function(Step). Returns (video, audio). ValueError on bad shapes.
    """

    def advance(stream, x, stream_velocity, sigma, sigma_next):
        return renoise_step(x, stream_velocity, noise(x), sigma, sigma_next)

    return _denoise(velocity, video, audio, sigmas, advance, image, keep_audio, on_step)


def denoise_unipc(velocity, video, audio, sigmas, *, image=None, keep_audio=False, on_step=None):
    """Run FlowUniPC, the sampler of the base and super-resolution models; arguments as in `denoise_renoise`, no noise.

    keep_audio also serves super-resolution, where the network hears one constant noisy soundtrack.
    """
    solvers = {"video": UniPC(sigmas), "audio": UniPC(sigmas)}

    def advance(stream, x, stream_velocity, sigma, sigma_next):
        return solvers[stream].step(x, x - sigma * stream_velocity)

    return _denoise(velocity, video, audio, sigmas, advance, image, keep_audio, on_step)


def _denoise(velocity, video, audio, sigmas, advance, image, keep_audio, on_step):
    if video.ndim != 5 or audio.ndim != 3 or video.shape[0] != audio.shape[0]:
        raise ValueError(
            f"video latent {list(video.shape)} and audio latent {list(audio.shape)}: "
            "expected [B, C, T, H, W] and [B, L, C] of one batch size"
        )
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        video = with_first_image(video, image)
        video_velocity, audio_velocity = velocity(video, audio, sigma)
        next_video = advance("video", video, video_velocity, sigma, sigma_next)
        next_audio = audio if keep_audio else advance("audio", audio, audio_velocity, sigma, sigma_next)
        if on_step is not None:
            on_step(Step(index, sigma, video, audio, video_velocity, audio_velocity, next_video, next_audio))
        video, audio = next_video, next_audio
    return with_first_image(video, image), audio
