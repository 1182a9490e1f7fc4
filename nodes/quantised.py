"""Networks with fp8, int8 or GGUF weights in memory: core's quantised linears, restored a layer at a time or not."""

import json

import comfy.ops
import comfy.quant_ops
import torch
from torch.nn.functional import linear, pad

from ..kernels import FP8, Fp8Rows, fp8_linear, quantise_rows
from ..kernels.fp8 import dequantise_rows
from ..model_loader.row_scales import quantised
from .held_weights import held
from .padded_rows import PaddedRows

# comfy-kitchen's numbers for what its operators return
KITCHEN_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _fp8_product(x, weight, linear):
    rows = Fp8Rows(weight._qdata, weight._params.scale)
    return fp8_linear(x, rows, linear.out_features, weight.dtype)


def _int8_product(x, weight, linear):
    x = pad(x, (0, weight._qdata.shape[1] - x.shape[-1]))
    # The operator, which torch.compile takes whole; `ck.int8_linear` would break its graph.
    multiply = torch.ops.comfy_kitchen.int8_linear
    out = multiply(x, weight._qdata, weight._params.scale, None, KITCHEN_DTYPES[weight.dtype])
    return out[..., : linear.out_features]


def quantised_operations(compute_dtype, product=None):
    """Return operations like comfy.ops.manual_cast whose Linears in `compute_dtype` load what `load.fill` keeps so.

    The weights are core's QuantizedTensor, so that its offload, weight streaming and LoRA know them. They are turned
    into the input's dtype when a layer runs; or, with product "fp8" or "int8", all of that dtype, multiplied as they
    are with inputs quantised row by row. In fp8 that makes nano's error about 1.3 times as large, in int8 twice. int8
    is multiplied by comfy-kitchen. Core's own fp8 products have one scale for all rows, and only sizes that are
    multiples of 16: a sixth of the full-size model's work.
    """
    from .gguf_blocks import use_blocks
    from .scaled_rows import use_scaled_rows

    core = comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype, full_precision_mm=True)

    class QuantisedLinear(PaddedRows, core.Linear):
        def __init__(self, in_features, out_features, bias):
            super().__init__(in_features, out_features, bias)  # no device: core would bring the loaded weight there

        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight, scale = state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}weight_scale")
            letters = state_dict.pop(f"{prefix}weight_blocks", None)
            if letters is not None:
                use_blocks(self, weight, bytes(letters.tolist()).decode(), compute_dtype)
            elif scale is not None and (product or weight.dtype in (FP8, torch.int8)):
                if product == "fp8" and weight.dtype != FP8:  # e5m2
                    weight, scale = quantised(FP8, weight, scale)
                use_scaled_rows(self, weight, scale, compute_dtype, multiplied=product is not None)
            else:
                if scale is not None:
                    form = json.dumps({"format": str(weight.dtype).removeprefix("torch.")})
                    state_dict[f"{prefix}comfy_quant"] = torch.tensor(list(form.encode()), dtype=torch.uint8)
                super()._load_from_state_dict(state_dict, prefix, *args)
                return
            for name in ("weight", "weight_scale"):  # taken; there is no bias beside them
                state_dict.pop(f"{prefix}{name}", None)

    class FastLinear(QuantisedLinear):
        MULTIPLIES_QUANTISED = True

        def forward(self, x):
            if not isinstance(self.weight, comfy.quant_ops.QuantizedTensor):  # one that the file has wide
                return super().forward(x)
            comfy.ops.run_every_op()
            if product == "fp8" and not isinstance(x, Fp8Rows):
                x = quantise_rows(x)
            device = x.values.device if isinstance(x, Fp8Rows) else x.device
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=compute_dtype, device=device, bias_dtype=compute_dtype, offloadable=True,
                compute_dtype=compute_dtype, want_requant=True,
            )  # fmt: skip
            if isinstance(weight, comfy.quant_ops.QuantizedTensor):
                out = (_fp8_product if product == "fp8" else _int8_product)(x, weight, self)
            else:  # with a LoRA that is added as the layer runs
                x = dequantise_rows(x, self.in_features) if isinstance(x, Fp8Rows) else x[..., : self.in_features]
                out = linear(x.to(compute_dtype), weight)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return out

    def choose(in_features, out_features, bias=True, *, dtype, device):
        if dtype == compute_dtype:
            return (FastLinear if product else QuantisedLinear)(in_features, out_features, bias)
        return comfy.ops.manual_cast.Linear(in_features, out_features, bias, dtype=dtype, device=device)

    class Operations(comfy.ops.manual_cast):
        Linear = staticmethod(choose)
        INPUT_DTYPE = FP8 if product == "fp8" else compute_dtype
        TAKES_PADDED_ROWS = True
        HELD = staticmethod(held)

    return Operations
