"""fp8 matrices with a scale for each row, which core's quantised tensors lack. Needs comfy-kitchen: import it late."""

import comfy.float
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, TensorCoreFP8Layout, register_layout_class
from torch.nn.functional import pad

from ..kernels.fp8 import padded_columns


class RowScaledFP8(QuantizedLayout):
    """fp8 [rows, columns] and fp32 scales [rows, 1]; every operation on it is one on the dequantised matrix."""

    Params = TensorCoreFP8Layout.Params

    @classmethod
    def stored_shape(cls, shape):
        """Return the shape in which a matrix of `shape` is stored."""
        return tuple(shape)

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False):
        """Return (float8_e4m3fn, Params): core asks for it after a LoRA, with a seed; scales are always chosen anew."""
        scale = tensor.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        scale = torch.where(scale > 0, scale, 1)
        rounded = comfy.float.stochastic_rounding(tensor / scale, torch.float8_e4m3fn, seed=stochastic_rounding)
        rounded, scale = enlarged(rounded, scale, cls.stored_shape(tensor.shape))
        return rounded, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        """Return the matrix in the dtype it stands for, which holds every fp8 number; the product is rounded once.

        In place, because this runs for every layer of every step: a third of the memory traffic of products in fp32.
        """
        return qdata.to(params.orig_dtype).mul_(params.scale)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Return what is stored."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Return what is stored by the end of its name."""
        return {"": qdata, "_scale": params.scale}


class PaddedRowScaledFP8(RowScaledFP8):
    """The same with zeros to multiples of 16 rows and columns, as fp8 matmuls want them."""

    @classmethod
    def stored_shape(cls, shape):
        """Return the shape in which a matrix of `shape` is stored."""
        return tuple(padded_columns(size) for size in shape)


def enlarged(values, scale, shape):
    """Return fp8 values and their scales [rows, 1], or [], with zeros up to `shape`, one scale a row."""
    rows, columns = (wanted - have for wanted, have in zip(shape, values.shape, strict=True))
    if not rows and not columns:
        return values, scale.expand(len(values), 1)
    values = pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype)  # torch does not pad fp8
    return values, pad(scale.expand(len(values) - rows, 1), (0, 0, 0, rows), value=1.0)


def use_row_scales(linear, layout=RowScaledFP8):
    """Give a quantised Linear of core's a layout that knows scales [rows, 1]."""
    name = f"HappyHorse{layout.__name__}"
    register_layout_class(name, layout)
    linear.layout_type = name
    values, params = linear.weight._qdata, linear.weight._params
    values, scale = enlarged(values, params.scale, layout.stored_shape(values.shape))
    params = layout.Params(scale=scale, orig_dtype=params.orig_dtype, orig_shape=params.orig_shape)
    linear.weight = torch.nn.Parameter(QuantizedTensor(values, name, params), requires_grad=False)
