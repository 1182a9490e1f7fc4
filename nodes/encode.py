"""A finished clip as the start of another one: to be made anew in part, or with its picture or its sound held."""

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..sampler.media import crop_middle
from ..sampler.sizes import FPS, PIXELS_PER_LATENT, pixel_frames, video_length
from ..sampler.soundtrack import at_encoder_rate, fit_sound, stereo
from .held import PICTURE, held_latent, with_original
from .host import require_joint_latent
from .notice import notice
from .soundtrack import with_soundtrack
from .vae import require_audio_vae, require_video_vae

NOTHING, KEEP_PICTURE, KEEP_SOUND = "nothing", "picture", "sound"
PIECE = 16  # pictures resized at a time


def times_at_25(count, frame_rate, most):
    """Return (which of `count` pictures of `frame_rate` a second are shown at 25, up to `most`; how many all would be).

    Each is the nearest in time, none is blended.
    """
    at_25 = max(1, int(count * FPS / frame_rate))
    times = (torch.arange(min(at_25, most)) * frame_rate / FPS).round().long().clamp(max=count - 1)
    return times, at_25


def pick(images, times):
    """Return the images of those indices; without a copy where they are the first ones, as videos may be large."""
    first = torch.equal(times, torch.arange(len(times)))
    return images[: len(times)] if first else images[times]


def cut(images, height, width):
    """Return the middle of pictures [F,H,W,C] at the ratio height : width, as large as fits, a view of them."""
    shrink = max(height / images.shape[1], width / images.shape[2])
    across, down = min(round(width / shrink), images.shape[2]), min(round(height / shrink), images.shape[1])
    return crop_middle(images, across, down)


def resized(images, height, width):
    """Return IMAGE [F,H,W,C] cut to the ratio in the middle, bicubic without aliasing; itself at that size.

    A sixth of the time that core's Lanczos takes, which goes through PIL: 9 ms for a picture of 1080p on a core.
    """
    if images.shape[1:3] == (height, width):
        return images
    pieces = (piece.movedim(-1, 1) for piece in cut(images, height, width).split(PIECE))
    small = [F.interpolate(piece, (height, width), mode="bicubic", antialias=True) for piece in pieces]
    return torch.cat(small).movedim(1, -1).clamp(0, 1)


def mask_of(mask, images, times):
    """Return the mask's pictures [1 or n,H,W] that belong to the n `times` of the images.

    ValueError where it has another count or shape than the images, or is black and would leave nothing to change.
    """
    count, height, width = images.shape[:3]
    if mask.shape[0] not in (1, count):
        raise ValueError(f"The mask has {mask.shape[0]} pictures; expected 1, or {count} as the video has.")
    mask = mask if mask.shape[0] == 1 else pick(mask, times)
    if not (mask >= 0.5).any():
        raise ValueError("The mask is black, so nothing may change. Make white what may, or disconnect the mask.")
    if abs(mask.shape[2] * height - mask.shape[1] * width) > max(height, width):  # by more than a pixel
        raise ValueError(
            f"The mask is {mask.shape[2]}x{mask.shape[1]} and the video {width}x{height}; expected the same shape, so "
            "that it lies where it was drawn. Resize the mask, or draw it on a picture of the video."
        )
    return mask


def changing(mask, frames, height, width):
    """Return the noise mask [1,1,T,H/16,W/16] of `frames` pixel frames: 1 for latents of which any pixel may change.

    mask: [1 or at least `frames`,H,W] in 0..1, white (0.5 and more) where the picture may change.
    """
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    white = cut((mask[:frames, ..., None] >= 0.5).float(), height, width).movedim(-1, 0)
    white = F.adaptive_max_pool2d(white, (rows, columns))[None]
    if white.shape[2] == 1:
        return white.repeat(1, 1, video_length(frames), 1, 1)
    groups = white[:, :, 1:].unflatten(2, (-1, 4)).amax(3)  # the first picture has a latent of its own
    return torch.cat([white[:, :, :1], groups], dim=2)


def encode_clip(latent, images, audio, vae, audio_vae, keep, mask=None):
    """Return the LATENT of a clip at the size and in the batch of `latent`.

    images: IMAGE [F,H,W,C] at 25 a second; audio: AUDIO or None for silence; keep: NOTHING, KEEP_PICTURE or
    KEEP_SOUND; mask: as `changing`, or None: everywhere. ValueError where there is no sound to keep, or a mask for a
    picture that is.
    """
    video, _ = require_joint_latent(latent).unbind()
    if keep == KEEP_PICTURE and mask is not None:
        raise ValueError(
            "The mask says where the picture changes, and keep is picture. Disconnect the one or alter the other."
        )
    if keep == KEEP_SOUND and audio is None:
        raise ValueError("There is no sound to keep: the video has none. Connect audio, or keep nothing.")
    frames = pixel_frames(video_length(images.shape[0]))
    images = images[:frames, ..., :3]
    height, width = (PIXELS_PER_LATENT * side for side in video.shape[3:])
    video = vae.encode(resized(images, height, width)).to(video).expand(video.shape[0], -1, -1, -1, -1)
    audio = audio or {"waveform": torch.zeros(1, 2, frames), "sample_rate": FPS}
    rate = audio["sample_rate"]
    waveform = fit_sound(stereo(audio["waveform"][:1]), rate, frames)
    masks = [torch.ones_like(video[:1, :1]), video.new_ones(1, 1, frames)]
    if mask is not None:
        masks[PICTURE] = changing(mask, frames, height, width).to(video)
    if keep == KEEP_SOUND:  # one sample less where a rate is no multiple of 25, so that the same frames cover it
        unheard = held_latent(video, video.new_zeros(1, 64, frames), *masks)
        return with_soundtrack(unheard, audio_vae, {**audio, "waveform": waveform[..., : frames * rate // FPS]})
    masks[PICTURE] *= keep != KEEP_PICTURE
    sound = audio_vae.encode_soundtrack(at_encoder_rate(waveform, frames)).to(video).expand(video.shape[0], -1, -1)
    encoded = held_latent(video, sound, *masks)
    return with_original(encoded, PICTURE, images) if keep == KEEP_PICTURE else encoded


def remarks(frames, given, room, heard):
    """Return what to tell of a clip's length: `frames` of the `given` pictures were taken, where `room` would fit.

    heard: seconds of a sound that is kept, 0 if none is.
    """
    told = f"{frames} pictures, {frames / FPS:.2f} s"
    if given > frames + 3:
        told += f": the latent has no room for the other {given - frames} of the video."
    elif room > frames + 3:
        told += f": the video has no more, the latent room for {room}."
    cut = heard - frames / FPS
    return told + (f"\n{cut:.2f} s of the sound are cut off." if cut > 4 / FPS else "")


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
            "Sampler), to give it a new sound, or other words, or a new picture to its sound.",
            search_aliases=[
                "happyhorse video to video",
                "v2v",
                "video to audio",
                "foley",
                "dub",
                "lip sync",
                "vae encode",
            ],
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
                    tooltip="The video's sound, or another that it is to follow, of any rate; cut or filled with "
                    "silence to the pictures' length. Without it, silence.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the picture may change; the rest stays, as the VAE gives it back. One for all "
                    "pictures, or as many as the video has. It works in squares of 16 pixels of the latent's size.",
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
                    tooltip="picture: stays as it is, for a new sound to it. sound: stays as it is, and the picture "
                    "follows it, as much as denoise says. nothing: both change, as much as denoise says.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    tooltip="Connect to HappyHorse Sampler. What is kept comes back as it was given, not through a VAE."
                )
            ],
        )

    @classmethod
    def execute(cls, latent, images, vae, audio_vae, audio=None, mask=None, frame_rate=25.0, keep=NOTHING):
        """Bring the video to 25 pictures a second, encode it, tell its length."""
        room = pixel_frames(video_length(require_joint_latent(latent).unbind()[1].shape[2]))
        times, given = times_at_25(images.shape[0], frame_rate, room)
        mask = None if mask is None else mask_of(mask, images, times)
        vae, audio_vae = require_video_vae(vae), require_audio_vae(audio_vae)
        encoded = encode_clip(latent, pick(images, times), audio, vae, audio_vae, keep, mask)
        heard = audio["waveform"].shape[-1] / audio["sample_rate"] if keep == KEEP_SOUND else 0
        notice(cls, remarks(encoded["samples"].unbind()[1].shape[2], given, room, heard))
        return io.NodeOutput(encoded)
