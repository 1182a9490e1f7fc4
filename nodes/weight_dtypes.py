"""The number formats that the loaders offer for linears, what they do where one cannot be had, and how they say so."""

import logging
from collections import Counter

import comfy.cli_args
import comfy.model_management
import comfy.quant_ops
import torch
from comfy_api.latest import io
from torch.cuda import get_device_capability as capability

from ..kernels import FP8
from ..kernels.dispatch import cpu_multiplies_bf16
from ..kernels.fp8_matmul import way_of
from ..model_loader.layouts import stored_as

WIDE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = {  # the choices by core's names, or after them -> `host.load_model`'s
    "int8": "int8",
    "int8_fast": "int8 fast",
    "fp8_e4m3fn": "fp8",
    "fp8_e4m3fn_fast": "fp8 fast",
}


def model_input():
    """Return the choice of a transformer's number format."""
    return io.Combo.Input(
        "weight_dtype",
        options=["default", *WIDE, *SMALL],
        default="default",
        tooltip="Number format of the linear layers; norms and embedders stay fp32 always. default: an fp8, int8 or "
        "GGUF file stays as it is, others become bf16 where that is computed quickly, else fp16 or fp32. bf16: doubles "
        "the memory of an fp8 or int8 file, or more of a GGUF one, so that LoRAs are not rounded as its weights are. "
        "fp16: as bf16, for cards before RTX 30, which are slow in that. fp32: doubles it again, only for comparisons. "
        "int8: half the memory of bf16, from any file, and the most exact of the small ones. int8_fast: multiplies in "
        "int8 too; faster on RTX 20 and later, a little less exact. fp8_e4m3fn, fp8_e4m3fn_fast: the same in fp8, with "
        "three times the error; fast on RTX 40 and later. Where a fast one is not faster, only the weights are int8 or "
        "fp8.",
        advanced=True,
    )


def text_encoder_input():
    """Return the choice of a text encoder's number format."""
    return io.Combo.Input(
        "text_encoder_dtype",
        options=["default", "int8", "fp8_e4m3fn"],
        default="default",
        optional=True,
        tooltip="Number format of the text encoder's linear layers. default: an fp8, int8 or GGUF file stays as it is, "
        "T5Gemma's own becomes bf16 (18.5 GB). int8: little more than half the memory (10.2 GB), from any file. "
        "fp8_e4m3fn: the same in fp8, with three times the error.",
        advanced=True,
    )


def default_wide():
    """Return bf16 where the device computes in it quickly, else fp16 or fp32; the user's flags come first.

    ComfyUI never takes bf16 on a processor. Those with instructions for it compute nano in two thirds of fp32's time.
    """
    device, flags = comfy.model_management.get_torch_device(), comfy.cli_args.args
    if device.type == "cpu" and cpu_multiplies_bf16() and not (flags.fp32_unet or flags.force_fp32):
        return torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):  # one by one: with `--fast` core would choose fp16 of the two
        chosen = comfy.model_management.unet_dtype(device, supported_dtypes=[dtype, torch.float32])
        if chosen != torch.float32:
            break
    return chosen if chosen in WIDE.values() else torch.bfloat16


def chosen(name, choice, checkpoint):
    """Return (`host.load_model`'s `quantised`, a remark) for the choice of input `name` and an open Checkpoint.

    The remark is "", or says why products are not in the format. ValueError where the format cannot be had here.
    """
    if choice == "default":
        return "kept" if stays_quantised(checkpoint) else None, ""
    quantised = SMALL.get(choice)
    fault = quantised and why_not(quantised)
    if fault:
        instead = "int8" if quantised != "int8" and not why_not("int8") else "default"
        raise ValueError(f"{name} is {choice}, but {fault}. Choose {instead}.")
    kind, fast, _ = (quantised or "").partition(" fast")
    slow = why_no_faster(kind) if fast else None
    return (kind, f"; not multiplied in {kind}, because {slow}") if slow else (quantised, "")


def described(checkpoint, dtype, quantised):
    """Return what the linears' weights are and what computes with them, in a few words; dtype: what is not small."""
    wide = next(name for name, known in WIDE.items() if known == dtype)
    if quantised is None:
        return wide
    if quantised == "kept" and checkpoint.blocks:
        return f"GGUF ({kinds_of(checkpoint)}), computed in {wide}"
    kind, fast, _ = (stored_as(checkpoint) if quantised == "kept" else quantised).partition(" fast")
    return f"{kind}, multiplied in {kind}" if fast else f"{kind}, computed in {wide}"


def _why_not_quantised():
    """Return why weights cannot be quantised in memory here, or None."""
    if not issubclass(comfy.quant_ops.QuantizedTensor, torch.Tensor):  # core's stand-in
        return "comfy-kitchen is missing (install ComfyUI's requirements.txt)"
    return None


def why_not(quantised):
    """Return why weights cannot be `quantised` here ("GGUF", "int8", "fp8", and " fast" of those two), or None."""
    device, kind = comfy.model_management.get_torch_device(), quantised.removesuffix(" fast")
    if kind == "fp8" and not comfy.model_management.supports_cast(device, FP8):
        return f"{device} does not know fp8"
    fault = _why_not_quantised()
    if fault is None and quantised == "int8 fast" and not hasattr(comfy.quant_ops.ck, "int8_linear"):
        return "this ComfyUI's comfy-kitchen has no int8 products (ComfyUI 0.30's has)"
    return fault


def stays_quantised(checkpoint):
    """Tell whether an open Checkpoint's weights are quantised and can stay so; if they cannot, the log says why."""
    kind = stored_as(checkpoint)
    fault = kind and why_not(kind)
    if fault:
        told = "%s: its %s weights do not stay %s and take more memory, because %s.%s"
        small = kind == "fp8" and not why_not("int8")
        hint = " Choose weight_dtype int8, or convert the file to it: that is as small." if small else ""
        logging.warning(told, checkpoint.label, kind, kind, fault, hint)
    return kind is not None and fault is None


def kinds_of(checkpoint):
    """Return the kinds of GGUF blocks in an open Checkpoint, the most frequent first: "Q4_K, Q6_K"."""
    return ", ".join(kind for kind, _ in Counter(checkpoint.blocks.values()).most_common())


def why_no_faster(kind):
    """Return why products in "fp8" or "int8" are no faster here than in bf16, or None."""
    device = comfy.model_management.get_torch_device()
    if kind == "fp8":
        fast = device.type == "cuda" and way_of(capability(device)) is not None
        return None if fast else f"{device}, or its PyTorch, does not do that"
    for name, backend in comfy.quant_ops.ck.list_backends().items():
        if name != "eager" and backend["available"] and not backend["disabled"]:
            if "int8_linear" in backend["capabilities"]:
                return None
    return f"comfy-kitchen has no kernels for that on {device} (they want an RTX 20 or later and PyTorch for CUDA 13)"
