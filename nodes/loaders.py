"""The loader nodes: model, text encoder and the two VAEs, from ComfyUI's own folders or built in."""

import torch
from comfy_api.latest import io

from ..model_loader.checkpoint import Checkpoint
from ..model_loader.detect import DIT_VARIANTS
from ..model_loader.layouts import stored_as
from . import files
from .clip import load_clip
from .host import default_weight_dtype, load_model
from .memory import model_remarks
from .notice import notice
from .quantised import kinds_of, stays_quantised, why_no_faster, why_not
from .vae import load_audio, load_video

CATEGORY = "HappyHorse/loaders"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUANTISED = {  # the choices by core's names, or after them -> `load_model`'s
    "int8": "int8",
    "int8_fast": "int8 fast",
    "fp8_e4m3fn": "fp8",
    "fp8_e4m3fn_fast": "fp8 fast",
}


def _file_input(id, part, what):
    tooltip = (
        f"{what} Lists models/{part.folder}: single files, and folders of shards by their name. {part.nano} is the "
        "built-in tiny one. Keep to one family: nano with nano, full-size with full-size."
    )
    options = files.choices(part)
    default = part.nano if part.nano in options else None
    return io.Combo.Input(id, options=options, default=default, tooltip=tooltip)


def _model_input():
    return _file_input("model", files.MODEL, "The transformer that makes picture and sound.")


def _text_encoder_input():
    return _file_input("text_encoder", files.TEXT_ENCODER, "Reads the prompt: T5Gemma 9B for the full-size models.")


def _video_vae_input():
    return _file_input(
        "video_vae", files.VIDEO_VAE, "Turns latents into pictures: TurboVAED (fast) or Wan2.2 (also encodes)."
    )


def _audio_vae_input():
    return _file_input(
        "audio_vae", files.AUDIO_VAE, "Turns sound latents into sound: the VAE of stable-audio-open-1.0."
    )


def _dtype_input():
    return io.Combo.Input(
        "weight_dtype",
        options=["default", *DTYPES, *QUANTISED],
        default="default",
        tooltip="Number format of the linear layers; norms and embedders stay fp32 always. default: an fp8, int8 or "
        "GGUF file stays as it is, others become bf16 on a GPU that computes in it, else fp32. bf16: doubles the "
        "memory of an fp8 or int8 file, or more of a GGUF one, so that LoRAs are not rounded as its weights are. fp32: "
        "doubles it again, only for comparisons. int8: half the memory of bf16, from any file, and the most exact of "
        "the small ones. int8_fast: multiplies in int8 too; faster on RTX 20 and later, a little less exact. "
        "fp8_e4m3fn, fp8_e4m3fn_fast: the same in fp8, with three times the error; fast on RTX 40 and later. "
        "Where a fast one is not faster, only the weights are int8 or fp8.",
        advanced=True,
    )


def _device_input():
    return io.Combo.Input(
        "text_encoder_device",
        options=["default", "cpu"],
        default="default",
        tooltip="Where the prompt is encoded. default: ComfyUI decides (the GPU, freed before sampling). cpu: saves "
        "GPU memory, takes seconds to minutes with the full-size encoder.",
        advanced=True,
    )


def _variant_input():
    return io.Combo.Input(
        "variant",
        options=["auto", *DIT_VARIANTS],
        default="auto",
        optional=True,
        tooltip="Which of the published models the file is: its tensors cannot tell. auto: from the file's header, its "
        "name or its folder's; the choice is shown on the node. Choose by hand where the name is silent or wrong.",
        advanced=True,
    )


def _load_model(node, model, weight_dtype, variant):
    path = files.find(files.MODEL, model)
    dtype = DTYPES.get(weight_dtype) or default_weight_dtype()
    quantised, checkpoint = QUANTISED.get(weight_dtype), Checkpoint.open(path)
    fault = quantised and why_not(quantised)
    if fault:
        instead = "int8" if quantised != "int8" and not why_not("int8") else "bf16"
        raise ValueError(f"weight_dtype is {weight_dtype}, but {fault}. Choose {instead}.")
    if weight_dtype == "default" and stays_quantised(checkpoint):
        quantised = "kept"
    kind, fast, _ = (quantised or "").partition(" fast")
    slow = why_no_faster(kind) if fast else None
    if slow:
        quantised = kind
    loaded = files.read_once(load_model, path, dtype, None if variant == "auto" else variant, quantised)
    weights = _told(checkpoint, dtype, quantised) + (f"; not multiplied in {kind}, because {slow}" if slow else "")
    notice(node, "\n".join([f"Variant: {loaded.model.variant}. Weights: {weights}", *model_remarks(loaded)]))
    return loaded


def _told(checkpoint, dtype, quantised):
    """Return what the linears' weights are and what computes with them, in a few words."""
    wide = "bf16" if dtype is torch.bfloat16 else "fp32"
    if quantised is None:
        return wide
    if quantised == "kept" and checkpoint.blocks:
        return f"GGUF ({kinds_of(checkpoint)}), computed in {wide}"
    kind, fast, _ = (stored_as(checkpoint) if quantised == "kept" else quantised).partition(" fast")
    return f"{kind}, multiplied in {kind}" if fast else f"{kind}, computed in {wide}"


def _load_clip(text_encoder, device):
    return files.read_once(load_clip, files.find(files.TEXT_ENCODER, text_encoder), device)


def _load_video_vae(name):
    return files.read_once(load_video, files.find(files.VIDEO_VAE, name))


def _load_audio_vae(name):
    return files.read_once(load_audio, files.find(files.AUDIO_VAE, name))


class LoaderNode(io.ComfyNode):
    """What every loader refuses: a file that is not there, with the place to get it from."""

    @classmethod
    def validate_inputs(cls, model=None, text_encoder=None, video_vae=None, audio_vae=None):
        """Check the names among the inputs against what their folders hold, in place of core's bare "not in list"."""
        names = zip(files.PARTS, (model, text_encoder, video_vae, audio_vae), strict=True)
        files.require_listed({part: name for part, name in names if name is not None})
        return True


class LoadCheckpoint(LoaderNode):
    """Everything a text-to-video graph needs, from four files."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseLoadCheckpoint",
            display_name="Load HappyHorse",
            category=CATEGORY,
            description="Loads the model, its text encoder and both VAEs. Starts with the built-in nano model.",
            search_aliases=["happyhorse", "davinci", "magihuman", "load checkpoint"],
            inputs=[
                _model_input(),
                _text_encoder_input(),
                _video_vae_input(),
                _audio_vae_input(),
                _dtype_input(),
                _device_input(),
                _variant_input(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(tooltip="Connect to HappyHorse Sampler, LoRA loaders or any guider."),
                io.Clip.Output(tooltip="Connect to HappyHorse Prompt or CLIP Text Encode."),
                io.Vae.Output(display_name="video VAE", tooltip="Decodes and encodes pictures."),
                io.Vae.Output(display_name="audio VAE", tooltip="Decodes and encodes sound, at 44100 Hz."),
            ],
        )

    @classmethod
    def execute(cls, model, text_encoder, video_vae, audio_vae, weight_dtype, text_encoder_device, variant="auto"):
        """Read the four files."""
        return io.NodeOutput(
            _load_model(cls, model, weight_dtype, variant),
            _load_clip(text_encoder, text_encoder_device),
            _load_video_vae(video_vae),
            _load_audio_vae(audio_vae),
        )


class LoadModel(LoaderNode):
    """The transformer alone."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseLoadModel",
            display_name="Load HappyHorse Model",
            category=CATEGORY,
            description="Loads the transformer alone, for graphs that mix files.",
            search_aliases=["happyhorse diffusion model", "unet"],
            inputs=[_model_input(), _dtype_input(), _variant_input()],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="Connect to HappyHorse Sampler, LoRA loaders or any guider.")],
        )

    @classmethod
    def execute(cls, model, weight_dtype, variant="auto"):
        """Read the file."""
        return io.NodeOutput(_load_model(cls, model, weight_dtype, variant))


class LoadTextEncoder(LoaderNode):
    """The text encoder alone."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseLoadTextEncoder",
            display_name="Load HappyHorse Text Encoder",
            category=CATEGORY,
            description="Loads the text encoder alone, for graphs that mix files.",
            search_aliases=["happyhorse clip", "t5gemma"],
            inputs=[_text_encoder_input(), _device_input()],
            outputs=[io.Clip.Output(tooltip="Connect to HappyHorse Prompt or CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, text_encoder, text_encoder_device):
        """Read the file."""
        return io.NodeOutput(_load_clip(text_encoder, text_encoder_device))


class LoadVideoVAE(LoaderNode):
    """The video VAE alone."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseLoadVideoVAE",
            display_name="Load HappyHorse Video VAE",
            category=CATEGORY,
            description="Loads a video VAE alone: Wan2.2 (encodes and decodes) or TurboVAED (decodes, fast).",
            search_aliases=["happyhorse vae", "turbo vae", "wan2.2 vae"],
            inputs=[_video_vae_input()],
            outputs=[io.Vae.Output(display_name="video VAE", tooltip="Decodes and encodes pictures.")],
        )

    @classmethod
    def execute(cls, video_vae):
        """Read the file."""
        return io.NodeOutput(_load_video_vae(video_vae))


class LoadAudioVAE(LoaderNode):
    """The audio VAE alone."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseLoadAudioVAE",
            display_name="Load HappyHorse Audio VAE",
            category=CATEGORY,
            description="Loads the audio VAE alone. It takes and gives stereo at 44100 Hz and resamples inside.",
            search_aliases=["happyhorse audio vae", "oobleck", "stable audio vae"],
            inputs=[_audio_vae_input()],
            outputs=[io.Vae.Output(display_name="audio VAE", tooltip="Decodes and encodes sound, at 44100 Hz.")],
        )

    @classmethod
    def execute(cls, audio_vae):
        """Read the file."""
        return io.NodeOutput(_load_audio_vae(audio_vae))
