"""Super-resolution: the base stage's clip, resized and noised, refined by a network of its own."""

import comfy.nested_tensor
import node_helpers
from comfy_api.latest import io

from ..sampler.conditioning import SR_VIDEO_SCALE, sr_video_scale
from ..sampler.denoise import seeded_noise
from ..sampler.schedule import flow_sigmas
from ..sampler.sizes import PIXELS_PER_LATENT, RESOLUTIONS, latent_side
from ..sampler.super_resolution import NOISE_LEVEL, STEPS, scaled_size, size_at, start_super_resolution
from .conditioning import side_input, with_first_image
from .guidance import StreamGuider, unguided
from .held import held_latent
from .host import (
    FIRST_IMAGE,
    FIRST_IMAGE_PIXELS,
    require_joint_latent,
    require_super_resolution,
    with_shift,
)
from .memory import clip_remarks
from .notice import notice
from .sampling import run, sample_unipc, seed_input, shift_input

TRAINED = {"540p_sr": "540p", "1080p_sr": "1080p"}  # resolution of each published network


def pixels(video):
    """Return (width, height) in pixels of a video latent [B,48,T,H,W]."""
    return PIXELS_PER_LATENT * video.shape[4], PIXELS_PER_LATENT * video.shape[3]


def target_size(size, video):
    """Return (width, height) in pixels that the `size` widgets ask for a video latent [B,48,T,H,W]."""
    if size["size"] == "custom":
        return tuple(PIXELS_PER_LATENT * latent_side(size[side]) for side in ("width", "height"))
    if size["size"] == "factor":
        return scaled_size(*pixels(video), size["factor"])
    return size_at(size["size"], *pixels(video))


def remarks(variant, video, width, height, lost_image):
    """Return what a user should know about refining a video latent to width x height; lost_image: it has no VAE."""
    found = []
    if lost_image:
        found.append("The first image is not used, because no video VAE is connected to encode it at the new size.")
    if variant in TRAINED:
        trained = size_at(TRAINED[variant], *pixels(video))
        if (width, height) != trained:
            asked, wanted = f"{width}x{height}", "x".join(map(str, trained))
            found.append(f"{asked} is not what the {variant} model was trained for ({wanted}): expect artefacts.")
    stretch = width * video.shape[3] / (height * video.shape[4])
    if not 0.9 < stretch < 1.1:
        found.append(f"The picture is stretched: its width grows {stretch:.2f} times as much as its height.")
    return found


def at_new_size(conditioning, vae, height, width):
    """Return the CONDITIONING with its first image, if any, encoded at height x width, or without it if vae is None."""
    image = conditioning[0][1].get(FIRST_IMAGE_PIXELS)
    if image is None or vae is None:
        return node_helpers.conditioning_set_values(conditioning, {FIRST_IMAGE: None})
    return with_first_image(conditioning, vae, image, height, width)


def refine(guider, video, audio, width, height, seed, sigmas, noise_level, align_corners):
    """Return the refined video latent of a base stage's video and audio; the network hears one constant noisy sound."""
    noised, heard = start_super_resolution(
        video, audio.transpose(1, 2), latent_side(height), latent_side(width), seeded_noise(seed),
        noise_level=noise_level, align_corners=align_corners,
    )  # fmt: skip
    heard = heard.transpose(1, 2)
    start = held_latent(noised, heard, noised.new_ones(1, 1, *noised.shape[2:]), heard.new_zeros(1, 1, heard.shape[2]))
    # A run at full noise starts from its "noise", which here is the noised clip.
    samples = start["samples"]
    return run(guider, sample_unipc, sigmas, samples, samples, seed, start["noise_mask"]).unbind()[0]


class SuperResolution(io.ComfyNode):
    """The second stage in one node."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        factor = io.Float.Input(
            "factor", default=2.0, min=1.0, max=8.0, step=0.25, tooltip="Times the clip's width and height."
        )
        sizes = [io.DynamicCombo.Option(name, []) for name in RESOLUTIONS if name != "256p"]
        custom = [side_input("width", 960), side_input("height", 544)]
        return io.Schema(
            node_id="HappyHorseSuperResolution",
            display_name="HappyHorse Super Resolution",
            category="HappyHorse",
            description="Refines a sampled clip to a larger size with a super-resolution model. The sound passes "
            "untouched.",
            search_aliases=["happyhorse upscale", "sr", "540p", "1080p"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The 540p_sr, 1080p_sr or nano_sr model, from Load HappyHorse Model."),
                io.Conditioning.Input("positive", tooltip="The prompt the clip was made with, first image included."),
                io.Latent.Input("latent", tooltip="The clip, from HappyHorse Sampler."),
                seed_input(),
                io.DynamicCombo.Input(
                    "size",
                    options=[
                        *sizes,
                        io.DynamicCombo.Option("factor", [factor]),
                        io.DynamicCombo.Option("custom", custom),
                    ],
                    tooltip="Size of the result. A named one has that area at the clip's own ratio; 540p belongs to "
                    "540p_sr, 1080p to 1080p_sr. Others run too, less stable.",
                ),
                io.Int.Input(
                    "steps", default=STEPS, min=1, max=100, tooltip="Forward passes; the models were made for 5."
                ),
                shift_input(),
                io.Int.Input(
                    "noise_level",
                    default=NOISE_LEVEL,
                    min=0,
                    max=999,
                    tooltip="How much of the clip is made anew, of 1000: 220 as published. Lower keeps more of it, "
                    "higher invents more.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "align_corners",
                    default=True,
                    tooltip="How the latent is enlarged; on as published. Off removes ghosting on frames 2 to 5 of "
                    "some clips.",
                    advanced=True,
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip=f"1 as published: without guidance. {SR_VIDEO_SCALE} is the published alternative, 2 on "
                    "the first 13 latent frames: stronger detail, twice the time, and a negative prompt.",
                    advanced=True,
                ),
                io.Vae.Input(
                    "vae",
                    display_name="video VAE",
                    optional=True,
                    tooltip="Needed only for a clip with a first image, which it encodes at the new size: nano's or "
                    "Wan2.2's.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What to avoid; used if guidance is not 1."),
            ],
            outputs=[io.Latent.Output(tooltip="Picture at the new size, sound as it came. Save or decode it.")],
        )

    @classmethod
    def validate_inputs(cls, size=None):
        """Refuse an unknown size: core leaves it out without a word."""
        if size is None:
            names = ", ".join(name for name in [*RESOLUTIONS, "factor", "custom"] if name != "256p")
            raise ValueError(f"size is unknown; expected one of {names}")
        return True

    @classmethod
    def execute(
        cls, model, positive, latent, seed, size, steps, shift, noise_level, align_corners, guidance, vae=None,
        negative=None,
    ):  # fmt: skip
        """Prepare guider and size, refine, put the sound back."""
        variant = require_super_resolution(model).variant
        video, audio = require_joint_latent(latent).unbind()
        width, height = target_size(size, video)
        lost_image = vae is None and FIRST_IMAGE_PIXELS in positive[0][1]
        told = [f"{width}x{height}", *remarks(variant, video, width, height, lost_image)]
        notice(cls, "\n".join([*told, *clip_remarks(model, width, height, video.shape[2], audio.shape[2])]))
        guider = super_resolution_guider(
            with_shift(model, shift), at_new_size(positive, vae, height, width), negative, video.shape[2], guidance
        )
        sigmas = flow_sigmas(steps, shift)
        refined = refine(guider, video, audio, width, height, seed, sigmas, noise_level, align_corners)
        kept = {name: value for name, value in latent.items() if name != "noise_mask"}
        return io.NodeOutput({**kept, "samples": comfy.nested_tensor.NestedTensor((refined, audio))})


def super_resolution_guider(model, positive, negative, frames, guidance):
    """Return the guider of super-resolution: the prompt alone at scale 1, else less on the first 13 latent frames."""
    if guidance == 1.0:
        return unguided(model, positive)
    if negative is None:
        raise ValueError(
            f"guidance is {guidance} and `negative` is not connected. Connect 'HappyHorse Negative Prompt', or set "
            "guidance to 1."
        )
    scales = sr_video_scale(frames, guidance)
    return StreamGuider(model, positive, negative, lambda sigma: scales, audio_scale=1.0)
