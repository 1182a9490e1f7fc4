"""Long video: a latent that begins with the end of a finished clip, and the two clips joined."""

import torch
from comfy_api.latest import io

from ..model_loader.core_vae import resample
from ..sampler.audio_windows import cross_fade
from ..sampler.joining import join_sound
from ..sampler.sizes import FPS, PIXEL_MULTIPLE, TRAINED_SECONDS, video_length
from ..sampler.soundtrack import at_encoder_rate, fit_sound, stereo
from .held import fit_frames, held_latent
from .notice import notice
from .vae import require_audio_vae, require_video_vae

CONTEXT_FRAMES = 50  # of sound before the shared part, for the encoder to look back at: nano's needs 25, not 12
OVERLAP = 9  # pixel frames: three latent ones


def check_overlap(overlap, *clips):
    """Raise ValueError unless `overlap` is 4k + 1 pixel frames and every clip [F,H,W,3] has so many."""
    if overlap % 4 != 1:
        raise ValueError(f"overlap is {overlap}; expected 1, 5, 9, ...: after the first, frames come in groups of 4")
    for images in clips:
        if images.shape[0] < overlap:
            raise ValueError(f"a clip of {images.shape[0]} frames cannot share {overlap}; choose a smaller overlap")


def last_sound(audio, frames, overlap, audio_vae):
    """Return the audio latents [1,64,overlap] of the last pictures of a clip of `frames` pixel frames."""
    rate = audio["sample_rate"]
    heard = min(frames, overlap + CONTEXT_FRAMES)
    waveform = fit_sound(stereo(audio["waveform"][:1]), rate, frames)[..., -(heard * rate // FPS) :]
    return audio_vae.encode_soundtrack(at_encoder_rate(waveform, heard))[..., -overlap:]


def continuation(images, audio, vae, audio_vae, seconds, overlap):
    """Return the LATENT of a clip that begins with the last `overlap` frames of another, held, and adds `seconds`."""
    check_overlap(overlap, images)
    height, width = images.shape[1:3]
    if height % PIXEL_MULTIPLE or width % PIXEL_MULTIPLE:
        raise ValueError(
            f"the pictures are {width}x{height}; expected multiples of {PIXEL_MULTIPLE}. Resize them first."
        )
    frames = overlap + 4 * max(1, round(seconds * FPS / 4))
    video = vae.encode(images[-overlap:, ..., :3])
    sound = last_sound(audio, images.shape[0], overlap, audio_vae)
    video_mask, sound_mask = (torch.zeros_like(part[:, :1]) for part in (video, sound))
    return held_latent(
        fit_frames(video, video_length(frames), 0.0),
        torch.nn.functional.pad(sound, (0, frames - overlap)),
        fit_frames(video_mask, video_length(frames), 1.0),
        torch.nn.functional.pad(sound_mask, (0, frames - overlap), value=1.0),
    )


def _overlap_input(tooltip):
    return io.Int.Input("overlap", default=OVERLAP, min=1, max=97, step=4, tooltip=tooltip)


class Continue(io.ComfyNode):
    """The next clip's latent."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseContinue",
            display_name="HappyHorse Continue",
            category="HappyHorse/long video",
            description="Makes the latent of a clip that goes on where another one ends, in picture and sound. Sample "
            "it, decode it, and join both with HappyHorse Join.",
            search_aliases=["happyhorse extend", "long video", "video continuation"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The clip to go on from, at 25 frames a second."),
                io.Audio.Input("audio", tooltip="Its sound, of any rate, starting with its first picture."),
                io.Vae.Input(
                    "vae",
                    display_name="video VAE",
                    tooltip="A video VAE that encodes: nano's or Wan2.2's. TurboVAED only decodes.",
                ),
                io.Vae.Input("audio_vae", display_name="audio VAE", tooltip="The audio VAE, from Load HappyHorse."),
                io.Float.Input(
                    "seconds",
                    default=4.0,
                    min=0.16,
                    max=30.0,
                    step=0.16,
                    round=0.01,
                    tooltip="How much to add, in steps of 0.16 s (4 pictures).",
                ),
                _overlap_input(
                    "Pictures of the old clip that the new one begins with, 1 and steps of 4: they show it what moves "
                    "and sounds. More keeps motion and voice better and costs time; 1 is a plain image to video."
                ),
            ],
            outputs=[
                io.Latent.Output(
                    tooltip="Connect to HappyHorse Sampler, or any other, with the prompt for what happens next, "
                    "without First Image."
                ),
                io.Int.Output(display_name="overlap", tooltip="Connect to HappyHorse Join."),
            ],
        )

    @classmethod
    def execute(cls, images, audio, vae, audio_vae, seconds, overlap):
        """Encode the end of the clip and make room after it."""
        vae, audio_vae = require_video_vae(vae), require_audio_vae(audio_vae)
        latent = continuation(images, audio, vae, audio_vae, seconds, overlap)
        frames = latent["samples"].unbind()[1].shape[2]
        longer = f", more than the {TRAINED_SECONDS} s of the training" if frames > TRAINED_SECONDS * FPS else ""
        notice(cls, f"The new clip has {frames} pictures, {frames / FPS:.2f} s{longer}; {overlap} are the old one's.")
        return io.NodeOutput(latent, overlap)


class Join(io.ComfyNode):
    """Two clips in one."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseJoin",
            display_name="HappyHorse Join",
            category="HappyHorse/long video",
            description="Joins a clip and its continuation: the shared pictures appear once and fade into each other, "
            "the sound goes on to the sample.",
            search_aliases=["happyhorse concatenate", "merge clips", "long video"],
            inputs=[
                io.Image.Input("images_1", tooltip="The clip that was continued, with its frames as they were given."),
                io.Audio.Input("audio_1", tooltip="Its sound; what lasts longer than its pictures is cut."),
                io.Image.Input("images_2", tooltip="The continuation, decoded."),
                io.Audio.Input("audio_2", tooltip="Its sound."),
                _overlap_input("Pictures that both share: the overlap of HappyHorse Continue."),
            ],
            outputs=[
                io.Image.Output(tooltip="Frames, 25 a second. Save them, or continue again."),
                io.Audio.Output(tooltip="Stereo sound at the rate of the first clip."),
            ],
        )

    @classmethod
    def execute(cls, images_1, audio_1, images_2, audio_2, overlap):
        """Fade the shared pictures, then the sound."""
        check_overlap(overlap, images_1, images_2)
        if images_1.shape[1:] != images_2.shape[1:]:
            sizes = " and ".join(f"{clip.shape[2]}x{clip.shape[1]}" for clip in (images_1, images_2))
            raise ValueError(f"The clips are {sizes}; expected one size. Give both the same super-resolution.")
        rate, other_rate = audio_1["sample_rate"], audio_2["sample_rate"]
        first, second = (stereo(audio["waveform"][:1]) for audio in (audio_1, audio_2))
        if other_rate != rate:
            second = resample(second, round(second.shape[-1] * rate / other_rate))
        frames = images_1.shape[0], images_2.shape[0]
        sound = {"waveform": join_sound(first, second, rate, frames, overlap), "sample_rate": rate}
        return io.NodeOutput(cross_fade(images_1, images_2, overlap, axis=0), sound)
