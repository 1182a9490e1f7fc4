"""The end of a graph: latents to pictures and sound, and the mp4."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui

from ..sampler.media import crop_middle, eight_bit
from ..sampler.mp4 import CRF, DEFAULT_CRF, write_mp4
from ..sampler.sizes import PIXELS_PER_LATENT, pixel_frames, shown_size
from .held import PICTURE, SOUND, original
from .host import require_joint_latent
from .vae import require_audio_vae, require_video_vae

CROPPED = "1920x1088, which 1080p is made at, loses 4 rows above and below and becomes 1920x1080 (upright: columns)."


def decode_sound(latent, audio_vae):
    """Decode the sound of a joint LATENT to AUDIO at 44100 Hz, neither scaled nor normalised.

    A driving soundtrack comes back as it was given, at its own rate, and needs no audio VAE.
    """
    _, audio = require_joint_latent(latent).unbind()
    soundtrack = original(latent, SOUND)
    if soundtrack is not None:
        return soundtrack
    waveform = require_audio_vae(audio_vae).decode(audio).movedim(-1, 1)
    return {"waveform": waveform, "sample_rate": audio_vae.audio_sample_rate}


def kept_pictures(latent):
    """Return the pictures of a joint LATENT, IMAGE [F,H,W,3], where they are as they were given; else None."""
    video, _ = require_joint_latent(latent).unbind()
    pictures = original(latent, PICTURE)
    return None if pictures is None else pictures.repeat(video.shape[0], 1, 1, 1)


def shown_pixels(video):
    """Return (width, height) in pixels of what is shown of a video latent [B,48,T,H,W]."""
    return shown_size(PIXELS_PER_LATENT * video.shape[4], PIXELS_PER_LATENT * video.shape[3])


def decode_joint(latent, vae, audio_vae):
    """Decode a joint LATENT to IMAGE [frames,H,W,3] in [0,1], cut to the size shown, and AUDIO as `decode_sound`."""
    images = kept_pictures(latent)
    if images is None:
        video, _ = require_joint_latent(latent).unbind()
        images = crop_middle(require_video_vae(vae).decode(video).flatten(0, 1), *shown_pixels(video))
    return images, decode_sound(latent, audio_vae)


def save_latent(path, latent, vae, audio_vae, metadata, crf):
    """Write a joint LATENT as mp4, decoded while it is written: no more than a few frames are in memory at once."""
    video, _ = require_joint_latent(latent).unbind()
    width, height = shown_pixels(video)
    vae, sound = require_video_vae(vae), decode_sound(latent, audio_vae)
    frames = (crop_middle(frames, width, height) for frames in vae.decode_frames(video))
    count = video.shape[0] * pixel_frames(video.shape[2])
    write_mp4(path, reported(frames, count), width, height, count, sound, metadata, crf)


def save_images(path, images, audio, metadata, crf):
    """Write IMAGE [F,H,W,3] and AUDIO, or None, as mp4."""
    count, height, width = images.shape[:3]
    write_mp4(path, reported(eight_bit(images), count), width, height, count, audio, metadata, crf)


def reported(pieces, count):
    """Yield the pieces of a clip of `count` frames, show how many have gone by, and stop where the user interrupts."""
    bar = comfy.utils.ProgressBar(count)
    for frames in pieces:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield frames
        bar.update(len(frames))


class Decode(io.ComfyNode):
    """Latents to pictures and sound."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseDecode",
            display_name="HappyHorse Decode",
            category="HappyHorse",
            description="Decodes picture and sound, to work on them further. HappyHorse Save Video decodes by itself.",
            search_aliases=["happyhorse vae decode"],
            inputs=[
                io.Latent.Input("latent", tooltip="Picture and sound latents, from HappyHorse Sampler."),
                io.Vae.Input("vae", display_name="video VAE", tooltip="The video VAE, from Load HappyHorse."),
                io.Vae.Input("audio_vae", display_name="audio VAE", tooltip="The audio VAE, from Load HappyHorse."),
            ],
            outputs=[
                io.Image.Output(tooltip=f"Frames, 25 a second; pictures that were kept as they were given. {CROPPED}"),
                io.Audio.Output(
                    tooltip="Stereo sound at 44100 Hz, at the level the model made it; a sound that was kept as it was "
                    "given."
                ),
            ],
        )

    @classmethod
    def execute(cls, latent, vae, audio_vae):
        """Decode both streams."""
        return io.NodeOutput(*decode_joint(latent, vae, audio_vae))


class SaveVideo(io.ComfyNode):
    """The mp4."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSaveVideo",
            display_name="HappyHorse Save Video",
            category="HappyHorse",
            description="Writes an mp4 (H.264 and AAC, 25 fps) to the output folder and plays it here. Connect the "
            "sampler's latent and both VAEs, or images and audio.",
            search_aliases=["happyhorse save", "happyhorse mp4", "export video"],
            is_output_node=True,
            inputs=[
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="From HappyHorse Sampler; decoded here, a few frames at a time. Leave open to save images. "
                    + CROPPED,
                ),
                io.Vae.Input("vae", display_name="video VAE", optional=True, tooltip="Decodes the latent's picture."),
                io.Vae.Input(
                    "audio_vae", display_name="audio VAE", optional=True, tooltip="Decodes the latent's sound."
                ),
                io.Image.Input("images", optional=True, tooltip="Frames at 25 a second, in place of a latent."),
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="Sound for the images, cut to their length; without it they stay silent.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/HappyHorse",
                    tooltip="Folder and start of the file name in ComfyUI's output folder; a counter is added. %year%, "
                    "%month%, %day%, %hour%, %minute%, %second%, %width% and %height% are filled in.",
                ),
                io.Int.Input(
                    "crf",
                    default=DEFAULT_CRF,
                    min=CRF[0],
                    max=CRF[-1],
                    optional=True,
                    advanced=True,
                    tooltip="Quality of H.264: lower is better and larger, 6 less about twice the size. At 18 the file "
                    "is hardly told from the frames.",
                ),
            ],
            outputs=[io.Video.Output(tooltip="The file, for other video nodes.")],
        )

    @classmethod
    def execute(cls, filename_prefix, latent=None, vae=None, audio_vae=None, images=None, audio=None, crf=DEFAULT_CRF):
        """Write the file, decoding if need be, and show it."""
        kept = None if latent is None else kept_pictures(latent)
        if kept is not None:
            latent, images, audio = None, kept, decode_sound(latent, audio_vae)
        if latent is not None:
            width, height = shown_pixels(latent["samples"].unbind()[0])
        elif images is not None:
            width, height = images.shape[2], images.shape[1]
        else:
            raise ValueError("There is nothing to save: connect the sampler's latent (with both VAEs), or images.")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        path = Path(folder) / f"{name}_{counter:05}_.mp4"
        if latent is not None:
            save_latent(path, latent, vae, audio_vae, cls.workflow_metadata(), crf)
        else:
            save_images(path, images, audio, cls.workflow_metadata(), crf)
        preview = ui.PreviewVideo([ui.SavedResult(path.name, subfolder, io.FolderType.output)])
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), ui=preview)

    @classmethod
    def workflow_metadata(cls):
        """Return the graph to embed in the file, so that ComfyUI opens it from there; None where that is off."""
        if args.disable_metadata or cls.hidden is None:
            return None
        metadata = {**(cls.hidden.extra_pnginfo or {}), "prompt": cls.hidden.prompt}
        return {name: value for name, value in metadata.items() if value is not None} or None
