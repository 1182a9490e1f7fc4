"""The nodes that set up a clip: its size and length, and its first image."""

import comfy.model_management
import comfy.nested_tensor
import node_helpers
import torch
from comfy_api.latest import io

from ..sampler.sizes import (
    PIXEL_MULTIPLE,
    PIXELS_PER_LATENT,
    RATIOS,
    RESOLUTIONS,
    TRAINED_SECONDS,
    audio_length,
    latent_side,
    outside_training,
    pixel_frames,
    pixel_size,
    video_length,
)
from .host import FIRST_IMAGE, FIRST_IMAGE_PIXELS, require_joint_latent
from .notice import notice
from .vae import require_video_vae

NANO = "nano 96x96"
NANO_SIZE = (96, 96)
MAX_SIDE = 4096  # pixels
MIN_SECONDS, MAX_SECONDS = 0.2, 15.0


def chosen_size(size):
    """Return (width, height) in pixels of what the `size` widgets say, whole latent patches."""
    if size["size"] == "custom":
        return tuple(PIXELS_PER_LATENT * latent_side(size[side]) for side in ("width", "height"))
    return NANO_SIZE if size["size"] == NANO else pixel_size(size["size"], size["ratio"])


def _ratio_input():
    return io.Combo.Input(
        "ratio",
        options=list(RATIOS),
        default="16:9",
        tooltip="Width to height. Every ratio has about the same area, so it takes the same time and memory.",
    )


def side_input(id, default):
    """Return the widget of a side in pixels."""
    return io.Int.Input(
        id,
        default=default,
        min=PIXEL_MULTIPLE,
        max=MAX_SIDE,
        step=PIXEL_MULTIPLE,
        tooltip=f"{id.capitalize()} in pixels, rounded down to a multiple of {PIXEL_MULTIPLE}. Time grows faster than "
        "the area.",
    )


def with_first_image(conditioning, vae, image, height, width):
    """Return the CONDITIONING that holds frame 0 of a clip of height x width pixels to `image` [H,W,3] in [0,1].

    The pixels stay with it, because super-resolution encodes the same image at its own size.
    """
    encoded = require_video_vae(vae).encode_first_image(image, height, width)
    return node_helpers.conditioning_set_values(conditioning, {FIRST_IMAGE: encoded, FIRST_IMAGE_PIXELS: image})


class EmptyLatent(io.ComfyNode):
    """A joint latent for picture and sound."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        by_name = [io.DynamicCombo.Option(name, [_ratio_input()]) for name in RESOLUTIONS]
        custom = io.DynamicCombo.Option("custom", [side_input("width", 448), side_input("height", 256)])
        return io.Schema(
            node_id="HappyHorseEmptyLatent",
            display_name="HappyHorse Empty Latent",
            category="HappyHorse",
            description="Sets size and length of the clip: a joint latent for picture (25 fps) and sound.",
            search_aliases=["happyhorse size", "happyhorse resolution", "empty audio video latent", "duration"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.DynamicCombo.Input(
                    "size",
                    options=[io.DynamicCombo.Option(NANO, []), *by_name, custom],
                    tooltip="Size of the picture in pixels. nano was trained at 96x96 only, the full-size models at "
                    "256p; larger sizes belong to super-resolution: they run here, with a warning. custom: your own "
                    "width and height.",
                ),
                io.Float.Input(
                    "seconds",
                    default=2.0,
                    min=MIN_SECONDS,
                    max=MAX_SECONDS,
                    step=0.2,
                    round=0.01,
                    tooltip=f"Length in seconds. nano was trained on 1 to 2, the full-size models on up to "
                    f"{TRAINED_SECONDS}; more runs, with a warning. Pictures come in groups of 4 and one more, so 5 "
                    "seconds have 125.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Connect to HappyHorse Sampler (and to HappyHorse First Image).")],
        )

    @classmethod
    def validate_inputs(cls, size=None):
        """Refuse an unknown size: core leaves it out without a word."""
        if size is None:
            raise ValueError(f"size is unknown; expected one of {', '.join([NANO, *RESOLUTIONS, 'custom'])}")
        return True

    @classmethod
    def execute(cls, size, seconds):
        """Make the two empty latents; tell their size, and where that is outside the training."""
        width, height = chosen_size(size)
        length = audio_length(seconds)
        frames = video_length(length)
        told = [f"{width}x{height}, {pixel_frames(frames)} frames", *outside_training(width, height, seconds)]
        notice(cls, "\n".join(told))
        device = comfy.model_management.intermediate_device()
        video = torch.zeros(1, 48, frames, latent_side(height), latent_side(width), device=device)
        audio = torch.zeros(1, 64, length, device=device)
        return io.NodeOutput({"samples": comfy.nested_tensor.NestedTensor((video, audio))})


class FirstImage(io.ComfyNode):
    """Conditioning that holds the first frame to an image."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseFirstImage",
            display_name="HappyHorse First Image",
            category="HappyHorse",
            description="Makes the clip start from an image: image to video.",
            search_aliases=["happyhorse image to video", "i2v", "start image"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, from HappyHorse Prompt."),
                io.Vae.Input(
                    "vae",
                    display_name="video VAE",
                    tooltip="A video VAE that encodes: nano's or Wan2.2's. TurboVAED only decodes.",
                ),
                io.Latent.Input("latent", tooltip="The sampler's latent: the image is cut to its size."),
                io.Image.Input(
                    "image",
                    tooltip="The first frame. The middle is cut out at the clip's ratio and resized, so give one of a "
                    "similar shape. Of a batch the first image counts.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Connect to HappyHorse Sampler, and to HappyHorse Super Resolution after it. Stock guiders "
                    "want the same done to the negative; ours do it themselves."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning, vae, latent, image):
        """Encode the image at the clip's size and keep it with the prompt."""
        video, _ = require_joint_latent(latent).unbind()
        return io.NodeOutput(with_first_image(conditioning, vae, image[0], 16 * video.shape[3], 16 * video.shape[4]))
