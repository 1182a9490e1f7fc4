"""What steers a run besides the prompt: the first image and classifier-free guidance."""

import torch

# Published guidance (daVinci-MagiHuman): base video 5.0, then 2.0 from timestep 500 down; base audio 5.0 throughout;
# super-resolution video 3.5, but 2.0 on the first 13 latent frames (its audio velocity is not used).
BASE_VIDEO_SCALE = 5.0
BASE_VIDEO_SCALE_LATE = 2.0
BASE_LATE_TIMESTEP = 500
AUDIO_SCALE = 5.0
SR_VIDEO_SCALE = 3.5
SR_VIDEO_SCALE_EARLY = 2.0
SR_EARLY_FRAMES = 13


def with_first_image(video, image):
    """Return `video` with latent frame 0 replaced by `image`; `video` itself if `image` is None.

    video [B, C, T, H, W]; image [1 or B, C, 1, H, W], the normalised latent of the first frame; ValueError otherwise.
    """
    if image is None:
        return video
    batch, channels, _, height, width = video.shape
    if image.shape[0] not in (1, batch) or image.shape[1:] != (channels, 1, height, width):
        expected = f"[{batch}, {channels}, 1, {height}, {width}]"
        raise ValueError(f"first image latent has shape {list(image.shape)}; expected {expected}")
    return torch.cat([image.to(video).expand(batch, -1, -1, -1, -1), video[:, :, 1:]], dim=2)


def base_video_scale(sigma, early=BASE_VIDEO_SCALE, late=BASE_VIDEO_SCALE_LATE):
    """Return the base model's video guidance at noise level `sigma`: `early` above timestep 500, then `late`."""
    return early if int(1000 * sigma) > BASE_LATE_TIMESTEP else late


def sr_video_scale(frames, scale=SR_VIDEO_SCALE, device=None):
    """Return super-resolution's video guidance: fp32 [1, 1, frames, 1, 1], at most 2.0 on the first 13 frames."""
    scales = torch.full((1, 1, frames, 1, 1), float(scale), device=device)
    scales[:, :, :SR_EARLY_FRAMES] = min(scale, SR_VIDEO_SCALE_EARLY)
    return scales


def guide(conditional, unconditional, scale):
    """Return classifier-free guidance: uncond + scale * (cond - uncond); velocities or clean predictions, same shape.

    scale: number, or a tensor that broadcasts. 1 is the prompt alone, 0 the negative prompt alone.
    """
    return unconditional + scale * (conditional - unconditional)


def guided(conditional, unconditional, video_scale, audio_scale=AUDIO_SCALE):
    """Return a velocity function that guides each stream on its own, see `guide`.

    conditional, unconditional: function(video, audio, sigma) -> (video velocity, audio velocity), for the prompt and
    for the negative prompt. video_scale: function(sigma) -> number, or tensor that broadcasts to the velocity.
    """

    def velocity(video, audio, sigma):
        video_cond, audio_cond = conditional(video, audio, sigma)
        video_uncond, audio_uncond = unconditional(video, audio, sigma)
        video_velocity = guide(video_cond, video_uncond, video_scale(sigma))
        return video_velocity, guide(audio_cond, audio_uncond, audio_scale)

    return velocity
