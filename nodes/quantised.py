"""Networks with fp8 or GGUF weights in memory: ComfyUI core's quantised linears, a layer at a time restored or not."""

import json
import logging
from collections import Counter

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from torch.cuda import get_device_capability as capability
from torch.nn.functional import linear

from ..kernels import FP8, Fp8Rows, fp8_linear, quantise_rows
from ..kernels.dispatch import FP8_CAPABILITY
from ..kernels.fp8 import dequantise_rows
from ..model_loader.layouts import holds_fp8
from .padded_rows import PaddedRows


def _why_not_quantised():
    """Return why weights cannot be quantised in memory here, or None."""
    if not issubclass(comfy.quant_ops.QuantizedTensor, torch.Tensor):  # core's stand-in
        return "comfy-kitchen is missing (install ComfyUI's requirements.txt)"
    return None


def why_not_fp8():
    """Return why weights cannot be fp8 in memory here, or None."""
    device = comfy.model_management.get_torch_device()
    if not comfy.model_management.supports_cast(device, FP8):
        return f"{device} does not know fp8"
    return _why_not_quantised()


def stays_quantised(checkpoint):
    """Tell whether an open Checkpoint's weights are fp8 or blocks of GGUF and can stay so; if not, the log says why."""
    if checkpoint.blocks:
        what, fault = "GGUF", _why_not_quantised()
    elif holds_fp8(checkpoint):
        what, fault = "fp8", why_not_fp8()
    else:
        return False
    if fault:
        told = "%s: its %s weights do not stay %s and take more memory, because %s."
        logging.warning(told, checkpoint.label, what, what, fault)
    return fault is None


def kinds_of(checkpoint):
    """Return the kinds of GGUF blocks in an open Checkpoint, the most frequent first: "Q4_K, Q6_K"."""
    return ", ".join(kind for kind, _ in Counter(checkpoint.blocks.values()).most_common())


def multiplies_fp8(device):
    """Tell whether a card multiplies fp8 matrices with a scale for each row; elsewhere bf16 does it, more slowly."""
    return device.type == "cuda" and torch.version.hip is None and capability(device) >= FP8_CAPABILITY


def quantised_operations(compute_dtype, fast=False):
    """Return operations like comfy.ops.manual_cast whose Linears in `compute_dtype` load what `load.fill` keeps so.

    The weights are core's QuantizedTensor, so that its offload, weight streaming and LoRA know them. They are turned
    into the input's dtype when a layer runs; or, where `fast`, multiplied as fp8 with inputs quantised row by row. That
    makes nano's error about 1.3 times as large. Core's own fp8 products have one scale for all rows, and only sizes
    that are multiples of 16: a sixth of the full-size model's work.
    """
    from .fp8_rows import PaddedRowScaledFP8, RowScaledFP8, use_row_scales
    from .gguf_blocks import use_blocks

    core = comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype, full_precision_mm=True)

    class QuantisedLinear(PaddedRows, core.Linear):
        def __init__(self, in_features, out_features, bias):
            super().__init__(in_features, out_features, bias)  # no device: core would bring the loaded weight there

        def _load_from_state_dict(self, state_dict, prefix, *args):
            letters = state_dict.pop(f"{prefix}weight_blocks", None)
            if letters is not None:  # core knows no blocks; there is no bias beside them
                use_blocks(self, state_dict.pop(f"{prefix}weight"), bytes(letters.tolist()).decode(), compute_dtype)
                return
            weight, scale = state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}weight_scale")
            if fast and scale is not None and weight.dtype != FP8:  # e5m2
                rows = quantise_rows(weight.float() * scale)
                weight, scale = rows.values[:, : self.in_features], rows.scale
                state_dict.update({f"{prefix}weight": weight, f"{prefix}weight_scale": scale})
            if scale is not None:
                form = json.dumps({"format": str(weight.dtype).removeprefix("torch.")})
                state_dict[f"{prefix}comfy_quant"] = torch.tensor(list(form.encode()), dtype=torch.uint8)
            super()._load_from_state_dict(state_dict, prefix, *args)
            if scale is not None and (scale.ndim or fast):
                use_row_scales(self, PaddedRowScaledFP8 if fast else RowScaledFP8)

    class FastLinear(QuantisedLinear):
        def forward(self, x):
            if not isinstance(self.weight, comfy.quant_ops.QuantizedTensor):  # one that the file has wide
                return super().forward(x)
            comfy.ops.run_every_op()
            rows = x if isinstance(x, Fp8Rows) else quantise_rows(x)
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=compute_dtype, device=rows.values.device, bias_dtype=compute_dtype, offloadable=True,
                compute_dtype=compute_dtype, want_requant=True,
            )  # fmt: skip
            if isinstance(weight, comfy.quant_ops.QuantizedTensor):
                held = Fp8Rows(weight._qdata, weight._params.scale)
                out = fp8_linear(rows, held, self.out_features, compute_dtype)
            else:  # with a LoRA that is added as the layer runs
                out = linear(dequantise_rows(rows, self.in_features).to(compute_dtype), weight)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return out

    def choose(in_features, out_features, bias=True, *, dtype, device):
        if dtype == compute_dtype:
            return (FastLinear if fast else QuantisedLinear)(in_features, out_features, bias)
        return comfy.ops.manual_cast.Linear(in_features, out_features, bias, dtype=dtype, device=device)

    class Operations(comfy.ops.manual_cast):
        Linear = staticmethod(choose)
        INPUT_DTYPE = FP8 if fast else compute_dtype
        TAKES_PADDED_ROWS = True

    return Operations
