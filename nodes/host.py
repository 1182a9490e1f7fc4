"""ComfyUI's MODEL around our network: core's memory management, LoRA, previews, guiders and samplers come with it."""

import json
import math

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch

from ..model_loader.detect import describe
from ..model_loader.layouts import as_published
from ..model_loader.load import load_dit
from ..sampler.conditioning import with_first_image
from ..sampler.memory import TEXT_TOKENS, sampling_bytes
from ..sampler.schedule import DEFAULT_SHIFT, flow_sigmas
from . import padded_rows
from .core_files import open_checkpoint, with_own_slices
from .finite import require_finite
from .forward_options import of_forward
from .patcher import saving_integers
from .quantised import quantised_operations
from .weight_dtypes import WIDE

FIRST_IMAGE = "happyhorse_first_image"  # key in a CONDITIONING's options: clean latent of frame 0, [B,48,1,H,W]
FIRST_IMAGE_PIXELS = "happyhorse_first_image_pixels"  # the same as an image [H,W,3] in [0,1]
PREVIEW = "happyhorse.preview"  # key in a model file's header: JSON [49][3], colours of the latent channels and a bias
NOT_THE_FILE = "If it is not the file: take LoRAs away or lower their strength, and set 'HappyHorse Speed' back."
TOO_LARGE_FOR_FP16 = " Or a number was beyond fp16's 65504: weight_dtype fp32 or bf16 has room for it."


class LatentFormat(comfy.latent_formats.Wan22):
    """Wan2.2's: its colours for previews, and what a small decoder for them, lighttaew2_2, wants latents to be."""

    shapes = ()  # of the streams in the packed latent that is being sampled

    def latent_rgb_factors_reshape(self, video):
        """Return the middle frame [B,48,1,H,W] for previews: the first one stands still where it is a given image.

        video [B,48,T,H,W]; ComfyUI 0.24 gives the packed streams [B,1,N] instead.
        """
        if video.ndim == 3:
            video, _ = comfy.utils.unpack_latents(video, self.shapes)
        middle = video.shape[2] // 2
        return video[:, :, middle : middle + 1]

    def use_colours(self, rows):
        """Preview with `rows` [channels + 1][3], the last one the bias: for a model whose VAE is not Wan2.2's."""
        self.latent_rgb_factors, self.latent_rgb_factors_bias = rows[:-1], rows[-1]
        self.taesd_decoder_name = None


class ModelConfig(comfy.supported_models_base.BASE):
    """What BaseModel asks of a supported model; the network is built by model_loader, not by BaseModel."""

    latent_format = LatentFormat
    sampling_settings = {"shift": DEFAULT_SHIFT}
    supported_inference_dtypes = list(WIDE.values())


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The published schedule as a table, so that core's `simple` scheduler with n steps gives `flow_sigmas(n)`."""

    def set_parameters(self, shift=DEFAULT_SHIFT, timesteps=1000, multiplier=1000):
        """Build the ascending table of `timesteps` noise levels, the last one 0.9998 at the default shift."""
        self.shift = shift
        self.multiplier = multiplier
        self.register_buffer("sigmas", flow_sigmas(timesteps, shift)[:-1].flip(0))

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        """Mix noise and latent at `sigma`; a full run starts from noise alone, though its first sigma is below 1."""
        return noise if max_denoise else super().noise_scaling(sigma, noise, latent_image)


class HappyHorse(comfy.model_base.BaseModel):
    """Joint video and sound model: latents are NestedTensor((video [B,48,T,H,W], audio [B,64,L])), fp32 all the way."""

    def __init__(self, network, weight_dtype, variant):
        """Wrap a DiT; `variant` ("distill", "base", "540p_sr", "1080p_sr") says how it is sampled."""
        config = ModelConfig({"disable_unet_model_creation": True, "dtype": weight_dtype})
        super().__init__(config, comfy.model_base.ModelType.FLOW)
        self.variant = variant
        self.diffusion_model = network.eval().requires_grad_(False)
        self.model_sampling = FlowSampling(config)
        comfy.model_management.archive_model_dtypes(network)

    @property
    def super_resolution(self):
        """Whether the network refines a finished clip; only such networks count positions that way."""
        return self.diffusion_model.config.positions == "v1"

    def get_dtype(self):
        """Return the dtype of the linears."""
        return self.model_config.unet_config["dtype"]

    def get_dtype_inference(self):
        """Return the dtype of latents and text: the residual stream is fp32, the network casts for its linears."""
        return torch.float32

    def process_latent_in(self, latent):
        """Return the latent as it is: our VAEs normalise."""
        return latent

    def process_latent_out(self, latent):
        """Return the latent as it is."""
        return latent

    def memory_required(self, input_shape, cond_shapes=None, **options):
        """Return the bytes beyond weights that sampling takes for packed latents of `input_shape` [B,1,N].

        cond_shapes and options are what core adds for other models' formulas, some of it in later versions.
        """
        config = self.diffusion_model.config
        return sampling_bytes(config, math.prod(input_shape) / config.video_in_channels + input_shape[0] * TEXT_TOKENS)

    def extra_conds(self, **kwargs):
        """Collect what one forward needs; texts keep their length (core's own text condition pads by repetition)."""
        text, shapes, first_image = kwargs.get("cross_attn"), kwargs.get("latent_shapes"), kwargs.get(FIRST_IMAGE)
        check_conditions(self.diffusion_model.config, text, shapes, first_image)
        self.latent_format.shapes = shapes
        mask = kwargs.get("denoise_mask")
        if first_image is not None and mask is not None and mask.flatten()[0] == 0:
            raise ValueError(
                "The clip begins twice: the latent holds its first frame, as one from 'HappyHorse Continue' does, and "
                "the prompt has a first image. Give the sampler the prompt without 'HappyHorse First Image'."
            )
        conds = {"c_crossattn": comfy.conds.CONDRegular(text), "latent_shapes": comfy.conds.CONDConstant(shapes)}
        if first_image is not None:
            conds["first_image"] = comfy.conds.CONDRegular(first_image)
        return conds

    def scale_latent_inpaint(self, latent_image, **kwargs):
        """Return the clean latent: where a noise mask is 0, the network was trained to see no noise."""
        return latent_image

    def _apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, *,
        latent_shapes, first_image=None, **kwargs,
    ):  # fmt: skip
        """Denoise packed latents x [B,1,N] at noise level t [B]; a first image [B,48,1,H,W] takes frame 0's place."""
        noisy_video, noisy_audio = comfy.utils.unpack_latents(x.float(), latent_shapes)
        # Copies, with the sound as [B,1,L,64]: core's EasyCache adds to its input in place and cuts axis 1 at 48.
        streams = [with_first_image(noisy_video, first_image).clone(), noisy_audio.transpose(1, 2)[:, None].clone()]
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        forward = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        velocity_video, velocity_audio = forward.execute(streams, c_crossattn, options)
        causes = NOT_THE_FILE + TOO_LARGE_FOR_FP16 * (self.get_dtype() == torch.float16)
        for velocity in (velocity_video, velocity_audio):
            require_finite(velocity, "The transformer", causes)
        denoised_video = self.model_sampling.calculate_denoised(t, velocity_video, noisy_video)
        denoised_audio = self.model_sampling.calculate_denoised(t, velocity_audio[:, 0].transpose(1, 2), noisy_audio)
        return comfy.utils.pack_latents([with_first_image(denoised_video, first_image), denoised_audio])[0]

    def _forward(self, streams, text, transformer_options):
        """Run the network on [video [B,48,T,H,W], audio [B,1,L,64]] -> their velocities: the call that caches wrap."""
        video, audio = streams
        velocity_video, velocity_audio = self.diffusion_model(
            video, audio[:, 0], text.to(video), **of_forward(transformer_options)
        )
        return [velocity_video, velocity_audio[:, None]]


def check_conditions(config, text, shapes, first_image):
    """Raise ValueError, naming what to connect instead, where text or latents do not fit the network."""
    channels = config.video_in_channels // 4
    joint = shapes is not None and len(shapes) == 2 and len(shapes[0]) == 5 and len(shapes[1]) == 3
    if not joint or shapes[0][1] != channels or shapes[1][1] != config.audio_in_channels:
        raise ValueError(
            f"The latent has shape {[tuple(s) for s in shapes or ()]}, expected video [B,{channels},T,H,W] and audio "
            f"[B,{config.audio_in_channels},L]. Take it from 'HappyHorse Empty Latent', or join a video and an audio "
            "latent with 'Concat AV Latent'."
        )
    if text is None or text.shape[-1] != config.text_in_channels:
        width = "none" if text is None else text.shape[-1]
        raise ValueError(
            f"The prompt has {width} features a token, this model reads {config.text_in_channels}. Encode it with the "
            "model's own text encoder: T5Gemma 9B for the full-size ones, nano_text_encoder for nano."
        )
    if first_image is not None and first_image.shape[3:] != shapes[0][3:]:
        size = " x ".join(str(16 * side) for side in reversed(first_image.shape[3:]))
        raise ValueError(
            f"The first image was prepared for {size} pixels, but the latent is "
            f"{16 * shapes[0][4]} x {16 * shapes[0][3]}. Give 'HappyHorse First Image' the same latent as the sampler."
        )


def load_model(path, weight_dtype, variant=None, quantised=None, disable_dynamic=False):
    """Read a DiT file or sharded folder into a MODEL (ModelPatcher) whose model knows its `variant`.

    weight_dtype: of the linears, or what their quantised weights are turned into when a layer runs. quantised: as
    `load.fill`, or "fp8 fast" or "int8 fast", which are "fp8" and "int8" with products in that.
    variant: None or the user's choice, as `detect.describe`; `disable_dynamic` is core's, for weight hooks.
    """
    checkpoint = as_published(open_checkpoint(path))
    found = describe(checkpoint, variant)
    kept, _, fast = (quantised or "").partition(" ")
    product = kept if fast else None
    operations = quantised_operations(weight_dtype, product) if quantised else padded_rows.Operations
    network = load_dit(checkpoint, variant=variant, dtype=weight_dtype, operations=operations, quantised=kept or None)
    model = HappyHorse(with_own_slices(network), weight_dtype, found.variant)
    colours = checkpoint.metadata.get(PREVIEW)
    if colours is not None:
        model.latent_format.use_colours(json.loads(colours))
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = saving_integers(patcher_class)(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (load_model, (path, weight_dtype, variant, quantised))
    return patcher


def with_shift(model, shift):
    """Return the MODEL with its table of noise levels at `shift`: a schedule of that shift starts at its top."""
    if model.get_model_object("model_sampling").shift == shift:
        return model
    sampling = FlowSampling(model.model.model_config)
    sampling.set_parameters(shift)
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", sampling)
    return shifted


def require_joint_latent(latent):
    """Return the NestedTensor of a LATENT; ValueError where it holds no sound."""
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False):
        raise ValueError(
            f"The latent has shape {list(samples.shape)} and no sound, expected a joint one. Take it from 'HappyHorse "
            "Empty Latent', or join a video and an audio latent with 'Concat AV Latent'."
        )
    return samples


def require_happyhorse(model):
    """Return the HappyHorse inside a MODEL; ValueError where it is another model."""
    if not isinstance(model.model, HappyHorse):
        raise ValueError(
            f"The model is {type(model.model).__name__}, expected HappyHorse. Connect the MODEL of 'Load HappyHorse'."
        )
    return model.model


def require_generator(model):
    """Return the HappyHorse inside a MODEL that makes clips from noise; ValueError where it is for super-resolution."""
    happyhorse = require_happyhorse(model)
    if happyhorse.super_resolution:
        raise ValueError(
            "The model is for super-resolution: it refines a finished clip. Connect it to 'HappyHorse Super "
            "Resolution', and a distilled or base model here."
        )
    return happyhorse


def require_super_resolution(model):
    """Return the HappyHorse inside a MODEL that refines clips; ValueError where it makes them from noise."""
    happyhorse = require_happyhorse(model)
    if not happyhorse.super_resolution:
        raise ValueError(
            f"The model is {happyhorse.variant}, which makes clips from noise; super-resolution wants 540p_sr, "
            "1080p_sr or nano's. Load one with 'Load HappyHorse Model'."
        )
    return happyhorse
