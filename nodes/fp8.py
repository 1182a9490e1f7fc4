"""Networks whose fp8 weights stay fp8 in memory: ComfyUI core's quantised linears, dequantised a layer at a time."""

import json
import logging

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch

from ..model_loader.layouts import holds_fp8


def stays_fp8(checkpoint):
    """Tell whether the weights of an open Checkpoint are fp8 and can stay so; where they cannot, the log says why."""
    device = comfy.model_management.get_torch_device()
    if not holds_fp8(checkpoint):
        return False
    if not comfy.model_management.supports_cast(device, torch.float8_e4m3fn):
        fault = f"{device} does not know fp8"
    elif not issubclass(comfy.quant_ops.QuantizedTensor, torch.Tensor):  # core's stand-in
        fault = "comfy-kitchen is missing (install ComfyUI's requirements.txt)"
    else:
        return True
    logging.warning("%s: its fp8 weights do not stay fp8 and take more memory, because %s.", checkpoint.label, fault)
    return False


def fp8_operations(compute_dtype):
    """Return operations like comfy.ops.manual_cast whose Linears in `compute_dtype` load what `load.fill` keeps in fp8.

    The weights are core's QuantizedTensor, so that its offload, weight streaming and LoRA know them. They are turned
    into the input's dtype when a layer runs, never multiplied as fp8: inputs in fp8 too would make the error a quarter
    to a half larger, and only layers with a sixth of the full-size model's work have the sizes, multiples of 16, that
    cards multiply in fp8.
    """
    from .fp8_rows import use_row_scales

    core = comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype, full_precision_mm=True)

    class Fp8Linear(core.Linear):
        def __init__(self, in_features, out_features, bias):
            super().__init__(in_features, out_features, bias)  # no device: core would bring the loaded weight there

        def _load_from_state_dict(self, state_dict, prefix, *args):
            scale = state_dict.get(f"{prefix}weight_scale")
            if scale is not None:
                form = json.dumps({"format": str(state_dict[f"{prefix}weight"].dtype).removeprefix("torch.")})
                state_dict[f"{prefix}comfy_quant"] = torch.tensor(list(form.encode()), dtype=torch.uint8)
            super()._load_from_state_dict(state_dict, prefix, *args)
            if scale is not None and scale.ndim:
                use_row_scales(self)

    def linear(in_features, out_features, bias=True, *, dtype, device):
        if dtype == compute_dtype:
            return Fp8Linear(in_features, out_features, bias)
        return comfy.ops.manual_cast.Linear(in_features, out_features, bias, dtype=dtype, device=device)

    class Operations(comfy.ops.manual_cast):
        Linear = staticmethod(linear)

    return Operations
