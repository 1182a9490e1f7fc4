"""A finished clip as the start of another one: to be made anew in part, or with its picture or its sound held."""

import comfy.utils
import torch
from comfy_api.latest import io

from ..sampler.sizes import FPS, PIXELS_PER_LATENT, pixel_frames, video_length
from ..sampler.soundtrack import at_encoder_rate, fit_sound, stereo
from .held import PICTURE, held_latent, with_original
from .host import require_joint_latent
from .notice import notice
from .soundtrack import with_soundtrack
from .vae import require_audio_vae, require_video_vae

NOTHING, KEEP_PICTURE, KEEP_SOUND = "nothing", "picture", "sound"


def at_25(images, frame_rate):
    """Return IMAGE [F,H,W,C] of `frame_rate` a second at 25: each picture the nearest in time, none blended."""
    count = max(1, int(images.shape[0] * FPS / frame_rate))
    times = (torch.arange(count) * frame_rate / FPS).round().long().clamp(max=images.shape[0] - 1)
    return images if torch.equal(times, torch.arange(images.shape[0])) else images[times]


def resized(images, height, width):
    """Return IMAGE [F,H,W,3] cut to the ratio in the middle and resized by core's Lanczos; as it is at that size."""
    if images.shape[1:3] == (height, width):
        return images
    return comfy.utils.common_upscale(images.movedim(-1, 1), width, height, "lanczos", "center").movedim(1, -1)


def encode_clip(latent, images, audio, vae, audio_vae, keep):
    """Return the LATENT of a clip at the size of `latent` and no longer than it.

    images: IMAGE [F,H,W,C] at 25 a second; audio: AUDIO or None for silence; keep: NOTHING, KEEP_PICTURE or
    KEEP_SOUND. ValueError where there is no sound to keep.
    """
    video, sound = require_joint_latent(latent).unbind()
    if keep == KEEP_SOUND and audio is None:
        raise ValueError("There is no sound to keep: the video has none. Connect audio, or keep nothing.")
    frames = pixel_frames(video_length(min(images.shape[0], sound.shape[2])))
    images = images[:frames, ..., :3]
    height, width = (PIXELS_PER_LATENT * side for side in video.shape[3:])
    video = vae.encode(resized(images, height, width)).to(video).expand(video.shape[0], -1, -1, -1, -1)
    audio = audio or {"waveform": torch.zeros(1, 2, frames), "sample_rate": FPS}
    rate = audio["sample_rate"]
    waveform = fit_sound(stereo(audio["waveform"][:1]), rate, frames)
    sound = audio_vae.encode_soundtrack(at_encoder_rate(waveform, frames)).to(video).expand(video.shape[0], -1, -1)
    masks = [torch.ones_like(part[:1, :1]) for part in (video, sound)]
    masks[PICTURE] *= keep != KEEP_PICTURE
    encoded = held_latent(video, sound, *masks)
    if keep == KEEP_SOUND:  # one sample less where a rate is no multiple of 25, so that the same frames cover it
        return with_soundtrack(encoded, audio_vae, {**audio, "waveform": waveform[..., : frames * rate // FPS]})
    return with_original(encoded, PICTURE, images) if keep == KEEP_PICTURE else encoded


def remarks(frames, given, room):
    """Return what to tell of a clip's length: `frames` of the `given` pictures were taken, where `room` would fit."""
    told = f"{frames} pictures, {frames / FPS:.2f} s"
    if given > frames + 3:
        return f"{told}: the latent has no room for the other {given - frames} of the video."
    return f"{told}: the video has no more, the latent room for {room}." if room > frames + 3 else told


class Encode(io.ComfyNode):
    """Pictures and sound to a latent."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseEncode",
            display_name="HappyHorse Encode",
            category="HappyHorse",
            description="Makes the latent of a video you have: to change it by a prompt (denoise below 1 in HappyHorse "
            "Sampler), to give it a new sound, or a new picture to its sound.",
            search_aliases=["happyhorse video to video", "v2v", "video to audio", "foley", "restyle", "vae encode"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="Size of the picture and longest length, from HappyHorse Empty Latent. What it holds is "
                    "replaced.",
                ),
                io.Image.Input(
                    "images",
                    tooltip="The video's pictures, from Get Video Components. The middle is cut out at the latent's "
                    "ratio and resized.",
                ),
                io.Vae.Input(
                    "vae",
                    display_name="video VAE",
                    tooltip="A video VAE that encodes: nano's or Wan2.2's. TurboVAED only decodes.",
                ),
                io.Vae.Input("audio_vae", display_name="audio VAE", tooltip="The audio VAE, from Load HappyHorse."),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="The video's sound, of any rate, cut or filled with silence to the pictures' length; "
                    "without it, silence.",
                ),
                io.Float.Input(
                    "frame_rate",
                    default=25.0,
                    min=1.0,
                    max=1000.0,
                    step=0.01,
                    tooltip="Pictures a second of the video: the fps of Get Video Components. The clip has 25; other "
                    "rates lose or repeat pictures, so that it stays as fast as it was.",
                ),
                io.Combo.Input(
                    "keep",
                    options=[NOTHING, KEEP_PICTURE, KEEP_SOUND],
                    default=NOTHING,
                    tooltip="picture: stays as it is, for a new sound to it. sound: stays as it is, for a new picture "
                    "to it. nothing: both change, as much as denoise says.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    tooltip="Connect to HappyHorse Sampler. What is kept comes back as it was given, not through a VAE."
                )
            ],
        )

    @classmethod
    def execute(cls, latent, images, vae, audio_vae, audio=None, frame_rate=25.0, keep=NOTHING):
        """Bring the video to 25 pictures a second, encode it, tell its length."""
        images = at_25(images, frame_rate)
        encoded = encode_clip(latent, images, audio, require_video_vae(vae), require_audio_vae(audio_vae), keep)
        room = pixel_frames(video_length(latent["samples"].unbind()[1].shape[2]))
        notice(cls, remarks(encoded["samples"].unbind()[1].shape[2], images.shape[0], room))
        return io.NodeOutput(encoded)
