"""Guidance for the base model: picture and sound each with a scale of its own, as a guider and as nodes."""

from functools import partial

import comfy.samplers
import comfy.utils
import node_helpers
import torch
from comfy_api.latest import io

from ..sampler.conditioning import AUDIO_SCALE, BASE_VIDEO_SCALE, BASE_VIDEO_SCALE_LATE, base_video_scale, guide
from .clip import require_prompt_encoder
from .host import FIRST_IMAGE, require_happyhorse

NEGATIVE_PROMPT = (
    "Blurred, noisy, grainy or pixelated picture, washed-out or garish colours, flicker, judder, frozen frames, ghost "
    "images, smeared motion, sudden cuts, objects that melt, split or appear from nowhere. Wrong anatomy: extra or "
    "missing fingers and limbs, twisted joints, a face that changes, crossed eyes, waxen skin. Subtitles, captions, "
    "watermarks, logos, borders. Muffled, clipped or tinny sound, hiss, hum, crackle, echo, drop-outs, music that "
    "drowns the voice. Speech out of step with the lips, mumbled, slurred, skipped or repeated words, a flat robotic "
    "voice, an expressionless face, stiff or exaggerated acting."
)


class StreamGuider(comfy.samplers.CFGGuider):
    """Core's guider with a scale a stream: the picture's by noise level and latent frame, the sound's constant."""

    def __init__(self, model, positive, negative, video_scale, audio_scale):
        """Guide away from `negative`; video_scale: function(sigma) -> number, or tensor that broadcasts to the latent.

        The first image of the positive is the negative's too: it is part of the clip, not of the wish.
        """
        super().__init__(model)
        image = positive[0][1].get(FIRST_IMAGE)
        self.set_conds(positive, node_helpers.conditioning_set_values(negative, {FIRST_IMAGE: image}))
        self.video_scale = video_scale
        self.audio_scale = audio_scale
        self.latent_shapes = None  # of the run

    def inner_sample(self, *args, latent_shapes=None, **kwargs):
        """Note where picture and sound lie in the packed latent, then sample as core does."""
        self.latent_shapes = latent_shapes
        return super().inner_sample(*args, latent_shapes=latent_shapes, **kwargs)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """Predict the clean latent as core does, with `combine` in place of its mix; other nodes' hooks come after."""
        options = {**(model_options or {}), "disable_cfg1_optimization": True}
        options["sampler_post_cfg_function"] = [self.combine, *options.get("sampler_post_cfg_function", [])]
        return super().predict_noise(x, timestep, options, seed)

    def combine(self, args):
        """Mix the packed clean predictions that core passes after its own mix, stream by stream."""
        (video, audio), (video_negative, audio_negative) = (
            comfy.utils.unpack_latents(args[name], self.latent_shapes) for name in ("cond_denoised", "uncond_denoised")
        )
        video_scale = torch.as_tensor(self.video_scale(float(args["sigma"].max()))).to(video)
        video = guide(video, video_negative, video_scale)
        return comfy.utils.pack_latents([video, guide(audio, audio_negative, self.audio_scale)])[0]


def unguided(model, positive):
    """Return core's guider for the prompt alone: one forward pass a step."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, [])
    return guider


def base_guider(model, positive, negative, guidance, late_guidance, audio_guidance):
    """Return the guider of the published schedule, or of the prompt alone if every scale is 1.

    ValueError where there is a scale but no negative prompt.
    """
    if guidance == late_guidance == audio_guidance == 1.0:
        return unguided(model, positive)
    if negative is None:
        raise ValueError(
            "The base model is sampled with guidance, and `negative` is not connected. Connect 'HappyHorse Negative "
            "Prompt', or set all three guidance scales to 1 to go without."
        )
    video_scale = partial(base_video_scale, early=guidance, late=late_guidance)
    return StreamGuider(model, positive, negative, video_scale, audio_guidance)


def guidance_inputs():
    """Return the three scales of the published schedule; optional, because older graphs do not have them."""

    def scale(id, default, tooltip):
        return io.Float.Input(
            id, default=default, min=0.0, max=20.0, step=0.1, optional=True, advanced=True, tooltip=tooltip
        )

    return [
        scale(
            "guidance",
            BASE_VIDEO_SCALE,
            "Base model only: how strongly the picture keeps to the prompt in the noisy first part of the run. 5 as "
            "published; more is more literal and harsher, 1 is none.",
        ),
        scale(
            "late_guidance",
            BASE_VIDEO_SCALE_LATE,
            "Base model only: the same below timestep 500, where detail is made. 2 as published.",
        ),
        scale("audio_guidance", AUDIO_SCALE, "Base model only: the same for the sound, all along. 5 as published."),
    ]


class Guider(io.ComfyNode):
    """The published guidance for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseGuider",
            display_name="HappyHorse Guider",
            category="HappyHorse/custom sampling",
            description="The base model's guidance, for SamplerCustomAdvanced: the picture's by noise level, the "
            "sound's on its own.",
            search_aliases=["happyhorse cfg", "happyhorse guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, from Load HappyHorse."),
                io.Conditioning.Input("positive", tooltip="The prompt, from HappyHorse Prompt or First Image."),
                io.Conditioning.Input("negative", tooltip="What to avoid, from HappyHorse Negative Prompt."),
                *guidance_inputs(),
            ],
            outputs=[io.Guider.Output(tooltip="Connect to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, guidance=BASE_VIDEO_SCALE, late_guidance=BASE_VIDEO_SCALE_LATE,
        audio_guidance=AUDIO_SCALE,
    ):  # fmt: skip
        """Build the guider."""
        require_happyhorse(model)
        return io.NodeOutput(base_guider(model, positive, negative, guidance, late_guidance, audio_guidance))


class NegativePrompt(io.ComfyNode):
    """What the base model should avoid."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseNegativePrompt",
            display_name="HappyHorse Negative Prompt",
            category="HappyHorse",
            description="What the base model keeps away from: faults of picture, sound and delivery. The distilled "
            "models run without it.",
            search_aliases=["happyhorse negative", "negative prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, from Load HappyHorse."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default=NEGATIVE_PROMPT,
                    tooltip="Faults to avoid, in plain words. Add what spoils your clip, take out what you want in it.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Connect to the negative of HappyHorse Sampler or Guider.")],
        )

    @classmethod
    def execute(cls, clip, text):
        """Encode the text at its true length."""
        clip = require_prompt_encoder(clip)
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
