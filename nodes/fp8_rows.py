"""fp8 matrices with a scale for each row, which core's quantised tensors lack. Needs comfy-kitchen: import it late."""

import comfy.float
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, TensorCoreFP8Layout, register_layout_class

NAME = "HappyHorseRowScaledFP8"


class RowScaledFP8(QuantizedLayout):
    """fp8 [rows, columns] and fp32 scales [rows, 1]; every operation on it is one on the dequantised matrix."""

    Params = TensorCoreFP8Layout.Params

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False):
        """Return (float8_e4m3fn, Params): core asks for it after a LoRA, with a seed; scales are always chosen anew."""
        scale = tensor.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        scale = torch.where(scale > 0, scale, 1)
        rounded = comfy.float.stochastic_rounding(tensor / scale, torch.float8_e4m3fn, seed=stochastic_rounding)
        return rounded, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        """Return the matrix in the dtype it stands for; the product is rounded once."""
        return (qdata.float() * params.scale).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Return what is stored."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Return what is stored by the end of its name."""
        return {"": qdata, "_scale": params.scale}


def use_row_scales(linear):
    """Give a quantised Linear of core's, loaded with scales [rows, 1], the layout that knows what they are."""
    register_layout_class(NAME, RowScaledFP8)
    linear.layout_type = NAME
    stored = QuantizedTensor(linear.weight._qdata, NAME, linear.weight._params)
    linear.weight = torch.nn.Parameter(stored, requires_grad=False)
