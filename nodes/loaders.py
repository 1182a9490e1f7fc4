"""The loader nodes: model, text encoder and the two VAEs, from ComfyUI's own folders or built in."""

from comfy_api.latest import io

from ..model_loader.checkpoint import Checkpoint
from ..model_loader.detect import DIT_VARIANTS
from . import files, weight_dtypes
from .clip import load_clip
from .host import load_model
from .memory import model_remarks
from .notice import notice
from .vae import load_audio, load_video

CATEGORY = "HappyHorse/loaders"


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
    checkpoint = Checkpoint.open(path)
    dtype = weight_dtypes.WIDE.get(weight_dtype) or weight_dtypes.default_wide()
    quantised, remark = weight_dtypes.chosen("weight_dtype", weight_dtype, checkpoint)
    loaded = files.read_once(load_model, path, dtype, None if variant == "auto" else variant, quantised)
    weights = weight_dtypes.described(checkpoint, dtype, quantised) + remark
    notice(node, "\n".join([f"Variant: {loaded.model.variant}. Weights: {weights}", *model_remarks(loaded)]))
    return loaded


def _load_clip(text_encoder, device, dtype):
    path = files.find(files.TEXT_ENCODER, text_encoder)
    quantised, _ = weight_dtypes.chosen("text_encoder_dtype", dtype, Checkpoint.open(path))
    return files.read_once(load_clip, path, device, quantised)


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
                weight_dtypes.model_input(),
                _device_input(),
                _variant_input(),
                weight_dtypes.text_encoder_input(),
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
    def execute(
        cls, model, text_encoder, video_vae, audio_vae, weight_dtype, text_encoder_device, variant="auto",
        text_encoder_dtype="default",
    ):  # fmt: skip
        """Read the four files."""
        return io.NodeOutput(
            _load_model(cls, model, weight_dtype, variant),
            _load_clip(text_encoder, text_encoder_device, text_encoder_dtype),
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
            inputs=[_model_input(), weight_dtypes.model_input(), _variant_input()],
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
            inputs=[_text_encoder_input(), _device_input(), weight_dtypes.text_encoder_input()],
            outputs=[io.Clip.Output(tooltip="Connect to HappyHorse Prompt or CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, text_encoder, text_encoder_device, text_encoder_dtype="default"):
        """Read the file."""
        return io.NodeOutput(_load_clip(text_encoder, text_encoder_device, text_encoder_dtype))


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
