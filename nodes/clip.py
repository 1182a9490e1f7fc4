"""ComfyUI's CLIP around our text encoder, so that stock CLIPTextEncode and ours give the same conditioning."""

import logging
import math

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch

from ..model_loader.checkpoint import CheckpointError
from ..model_loader.load import load_text_encoder
from ..model_loader.tokenizer import read_tokenizer, tokenizer_definition
from .core_files import open_checkpoint
from .finite import require_finite
from .quantised import quantised_operations

MAX_TEXT_TOKENS = 640  # longer texts are cut after encoding, as the published pipeline does
SMALL_ENCODER = 100_000_000  # parameters
ENCODER = "t5gemma"  # name of the token list in what `tokenize` returns


class PromptTokenizer:
    """Prompt to token ids, taken literally: no weights in parentheses, because structured prompts use every bracket."""

    def __init__(self, definition):
        self.encode = read_tokenizer(definition)

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        """Return {"t5gemma": [[(id, 1.0), ...]]}, with a word number each where `return_word_ids`."""
        ids = self.encode(text)
        return {ENCODER: [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in ids]]}

    def state_dict(self):
        """Return no tensors: the tokenizer is text in the encoder's file."""
        return {}


class PromptEncoder(torch.nn.Module):
    """What comfy.sd.CLIP calls its conditioning model: ids in, features of the true length out."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.dtypes = {dtype}
        self.reset_clip_options()

    def reset_clip_options(self):
        """Forget the device of the last run."""
        self.execution_device = None

    def set_clip_options(self, options):
        """Take core's options; only the device applies (there is one layer to read and no pooled output)."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def encode_token_weights(self, tokens):
        """Return features [1, n <= 640, hidden] fp32 and no pooled output; a longer text is cut and reported."""
        ids = [entry[0] for entry in tokens[ENCODER][0]]
        if len(ids) > MAX_TEXT_TOKENS:
            logging.warning("%s", too_long(len(ids)))
        ids = torch.tensor([ids], dtype=torch.long, device=self.execution_device)
        features = require_finite(self.network(ids)[:, :MAX_TEXT_TOKENS], "The text encoder")
        return features.to(comfy.model_management.intermediate_device(), torch.float32), None

    def load_sd(self, state_dict):
        """Load nothing: the network came with its weights."""
        return [], []


def too_long(count):
    """Say that a prompt of `count` tokens is cut."""
    return f"The prompt has {count} tokens; the model reads the first {MAX_TEXT_TOKENS}, the rest is lost. Shorten it."


def token_count(clip, text):
    """Return how many tokens a HappyHorse CLIP makes of `text`."""
    return len(require_prompt_encoder(clip).tokenize(text)[ENCODER][0])


def reads_long_prompts(clip):
    """Tell whether a HappyHorse CLIP is full-size, of models that want long prompts; nano wants one sentence."""
    network = require_prompt_encoder(clip).cond_stage_model.network
    return sum(parameter.numel() for parameter in network.parameters()) >= SMALL_ENCODER


def load_clip(path, device, quantised=None):
    """Read a text encoder into a CLIP; `device` is "default" or "cpu", quantised as `load.fill`."""
    devices = {}
    if device == "cpu":
        devices = {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    checkpoint = open_checkpoint(path)
    definition = tokenizer_definition(checkpoint)
    if definition is None:
        raise CheckpointError(
            f"{checkpoint.label}: no tokenizer in the file or beside it; expected a tokenizer.json or tokenizer.model "
            "in the same folder. Download one from where the text encoder came from, for T5Gemma from "
            "https://huggingface.co/google/t5gemma-9b-9b-ul2."
        )
    dtype = weight_dtype(checkpoint)
    operations = quantised_operations(dtype) if quantised else comfy.ops.manual_cast
    network = load_text_encoder(checkpoint, dtype=dtype, operations=operations, quantised=quantised)
    target = comfy.supported_models_base.ClipTarget(
        tokenizer=lambda **_: PromptTokenizer(definition), clip=lambda **_: PromptEncoder(network, dtype)
    )
    return comfy.sd.CLIP(target, model_options={**devices, "dtype": dtype, "initial_device": torch.device("cpu")})


def weight_dtype(checkpoint):
    """Return fp32 for a small encoder, where it costs nothing, else bf16 as published (fp16 overflows in T5Gemma)."""
    parameters = sum(math.prod(header.shape) for header in checkpoint.headers.values())
    return torch.float32 if parameters < SMALL_ENCODER else torch.bfloat16


def require_prompt_encoder(clip):
    """Return the CLIP; ValueError where it is not ours."""
    if not isinstance(getattr(clip, "cond_stage_model", None), PromptEncoder):
        raise ValueError(
            "The CLIP is not HappyHorse's text encoder. Connect the CLIP of 'Load HappyHorse', or of 'Load HappyHorse "
            "Text Encoder'."
        )
    return clip
