"""A driving soundtrack: its latent is held while the picture is made, and its own waveform goes into the file."""

import torch
from comfy_api.latest import io

from ..sampler.sizes import FPS, TRAINED_SECONDS, video_length
from ..sampler.soundtrack import at_encoder_rate, covering_frames, fit_sound, mono
from .held import SOUND, fit_frames, held_latent, masks, with_original
from .host import require_joint_latent
from .notice import notice
from .vae import require_audio_vae


def with_soundtrack(latent, audio_vae, audio):
    """Return the LATENT with `audio` held in it: as many frames as cover the sound, the size and batch of `latent`."""
    video, _ = require_joint_latent(latent).unbind()
    video_mask, _ = masks(latent)
    rate, waveform = audio["sample_rate"], audio["waveform"][:1]
    frames = covering_frames(waveform.shape[-1], rate)
    waveform = fit_sound(waveform, rate, frames)
    sound = require_audio_vae(audio_vae).encode_soundtrack(at_encoder_rate(mono(waveform), frames)).to(video)
    held = held_latent(
        fit_frames(video, video_length(frames)),
        sound.expand(video.shape[0], -1, -1),
        fit_frames(video_mask, video_length(frames), 1.0) if video_mask.ndim == 5 else video_mask,
        torch.zeros_like(sound[:, :1]),
    )
    return with_original({**latent, **held}, SOUND, {"waveform": waveform, "sample_rate": rate})


class Soundtrack(io.ComfyNode):
    """Sound that drives the picture."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSoundtrack",
            display_name="HappyHorse Soundtrack",
            category="HappyHorse",
            description="Makes the picture follow a sound: the clip takes its length, the model hears it at every "
            "step, and it comes back unchanged.",
            search_aliases=["happyhorse audio to video", "a2v", "driving audio", "lip sync"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="Size of the picture, from HappyHorse Empty Latent. Its length is replaced by the sound's.",
                ),
                io.Audio.Input(
                    "audio",
                    tooltip="The sound, at any rate, heard as mono. All of it is used, with up to 0.16 s of silence "
                    "after it; cut it before with Trim Audio Duration if the clip is to be shorter.",
                ),
                io.Vae.Input("audio_vae", display_name="audio VAE", tooltip="The audio VAE, from Load HappyHorse."),
            ],
            outputs=[
                io.Latent.Output(
                    tooltip="Connect to HappyHorse Sampler, or any other. HappyHorse Save Video and HappyHorse Decode "
                    "give the sound back as it was, not through the VAE."
                )
            ],
        )

    @classmethod
    def execute(cls, latent, audio, audio_vae):
        """Encode the sound, hold it, tell the clip's length."""
        driven = with_soundtrack(latent, audio_vae, audio)
        seconds = driven["samples"].unbind()[1].shape[2] / FPS
        longer = f", more than the {TRAINED_SECONDS} s of the training" if seconds > TRAINED_SECONDS else ""
        notice(cls, f"The clip takes the length of the soundtrack: {seconds:.2f} s{longer}.")
        return io.NodeOutput(driven)
