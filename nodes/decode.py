"""The end of a graph: latents to pictures and sound, and the mp4."""

from fractions import Fraction
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types, io, ui

from ..model_loader.core_vae import resample
from ..sampler.sizes import FPS
from .host import require_joint_latent
from .soundtrack import original_sound
from .vae import require_audio_vae, require_video_vae

AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)  # Hz, ISO 14496-3


def decode_joint(latent, vae, audio_vae):
    """Decode a joint LATENT to IMAGE [frames,H,W,3] in [0,1] and AUDIO at 44100 Hz, neither scaled nor normalised.

    A driving soundtrack comes back as it was given, at its own rate, and needs no audio VAE.
    """
    video, audio = require_joint_latent(latent).unbind()
    images = require_video_vae(vae).decode(video).flatten(0, 1)
    soundtrack = original_sound(latent)
    if soundtrack is not None:
        return images, soundtrack
    waveform = require_audio_vae(audio_vae).decode(audio).movedim(-1, 1)
    return images, {"waveform": waveform, "sample_rate": audio_vae.audio_sample_rate}


def writable(audio):
    """Return the AUDIO at a rate that AAC has: its own, or else 48000 Hz; None where there is none."""
    if audio is None or audio["sample_rate"] in AAC_RATES:
        return audio
    samples = round(audio["waveform"].shape[-1] * 48000 / audio["sample_rate"])
    return {"waveform": resample(audio["waveform"], samples), "sample_rate": 48000}


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
                io.Image.Output(tooltip="Frames, 25 a second."),
                io.Audio.Output(
                    tooltip="Stereo sound at 44100 Hz, at the level the model made it; a driving soundtrack as it was "
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
                    "latent", optional=True, tooltip="From HappyHorse Sampler; decoded here. Leave open to save images."
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
            ],
            outputs=[io.Video.Output(tooltip="The file, for other video nodes.")],
        )

    @classmethod
    def execute(cls, filename_prefix, latent=None, vae=None, audio_vae=None, images=None, audio=None):
        """Decode if need be, write the file, show it."""
        if latent is not None:
            images, audio = decode_joint(latent, vae, audio_vae)
        elif images is None:
            raise ValueError("There is nothing to save: connect the sampler's latent (with both VAEs), or images.")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), images.shape[2], images.shape[1]
        )
        file = f"{name}_{counter:05}_.mp4"
        components = Types.VideoComponents(images=images, audio=writable(audio), frame_rate=Fraction(FPS))
        InputImpl.VideoFromComponents(components).save_to(str(Path(folder) / file), metadata=cls.workflow_metadata())
        preview = ui.PreviewVideo([ui.SavedResult(file, subfolder, io.FolderType.output)])
        return io.NodeOutput(InputImpl.VideoFromFile(str(Path(folder) / file)), ui=preview)

    @classmethod
    def workflow_metadata(cls):
        """Return the graph to embed in the file, so that ComfyUI opens it from there; None where that is off."""
        if args.disable_metadata or cls.hidden is None:
            return None
        metadata = {**(cls.hidden.extra_pnginfo or {}), "prompt": cls.hidden.prompt}
        return {name: value for name, value in metadata.items() if value is not None} or None
