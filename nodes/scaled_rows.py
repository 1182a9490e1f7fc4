"""fp8 and int8 matrices with a scale a row, which core's tensors lack, or some. Needs comfy-kitchen: import it late."""

import comfy.float
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, TensorCoreFP8Layout, register_layout_class
from torch.nn.functional import pad

from ..kernels import restore_rows
from ..kernels.fp8 import FP8, padded_columns
from ..model_loader.layouts import INT8_FORMAT
from ..model_loader.row_scales import LARGEST


class ScaledRows(QuantizedLayout):
    """Values [rows, columns] and fp32 scales [rows, 1]; every operation on it is one on the dequantised matrix."""

    Params = TensorCoreFP8Layout.Params
    FORMAT, LARGEST = None, None  # core's name for it; the largest value

    @classmethod
    def stored_shape(cls, shape):
        """Return the shape in which a matrix of `shape` is stored."""
        return tuple(shape)

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False):
        """Return (values, Params): core asks for it after a LoRA, with a seed; scales are always chosen anew."""
        scale = tensor.abs().amax(1, keepdim=True).float() / cls.LARGEST
        scale = torch.where(scale > 0, scale, 1)
        values = cls.rounded(tensor / scale, stochastic_rounding)
        values, scale = enlarged(values, scale, cls.stored_shape(tensor.shape))
        return values, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        """Return the matrix in the dtype it stands for; this runs for every layer of every step."""
        return restore_rows(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Return what is stored."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Return what a file is to hold by the end of its name: without what fills rows and columns up."""
        rows, columns = params.orig_shape
        return {"": qdata[:rows, :columns].contiguous(), "_scale": params.scale[:rows].contiguous()}


class Fp8ScaledRows(ScaledRows):
    """Values in float8_e4m3fn."""

    FORMAT, LARGEST = "float8_e4m3fn", LARGEST[FP8]

    @classmethod
    def rounded(cls, values, seed):
        """Return values in [-448, 448] as e4m3, up or down by chance where there is a seed."""
        return comfy.float.stochastic_rounding(values, FP8, seed=seed)


class Int8ScaledRows(ScaledRows):
    """Values in int8."""

    FORMAT, LARGEST = INT8_FORMAT, LARGEST[torch.int8]

    @classmethod
    def rounded(cls, values, seed):
        """Return values in [-127, 127] as int8, up or down by chance where there is a seed."""
        chance = 0.5
        if seed:
            generator = torch.Generator(values.device).manual_seed(seed)
            chance = torch.rand(values.shape, generator=generator, device=values.device)
        return (values.float() + chance).floor_().clamp_(-cls.LARGEST, cls.LARGEST).to(torch.int8)


class Padded:
    """Zeros to multiples of 16 rows and columns, as products of fp8 or int8 want them."""

    @classmethod
    def stored_shape(cls, shape):
        """Return the shape in which a matrix of `shape` is stored."""
        return tuple(padded_columns(size) for size in shape)


class PaddedFp8ScaledRows(Padded, Fp8ScaledRows):
    """fp8 for fp8 products."""


class PaddedInt8ScaledRows(Padded, Int8ScaledRows):
    """int8 for int8 products."""


LAYOUTS = {  # (stored dtype, whether it is multiplied as it is) -> layout
    (FP8, False): Fp8ScaledRows,
    (FP8, True): PaddedFp8ScaledRows,
    (torch.int8, False): Int8ScaledRows,
    (torch.int8, True): PaddedInt8ScaledRows,
}


def enlarged(values, scale, shape):
    """Return values and their scales [rows, 1], or [], with zeros up to `shape`, one scale a row."""
    rows, columns = (wanted - have for wanted, have in zip(shape, values.shape, strict=True))
    if not rows and not columns:
        return values, scale.expand(len(values), 1).contiguous()
    values = pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype)  # torch does not pad fp8
    return values, pad(scale.expand(len(values) - rows, 1), (0, 0, 0, rows), value=1.0)


def use_scaled_rows(linear, values, scale, dtype, multiplied):
    """Give a quantised Linear of core's the weight, in `dtype`, of values [rows, columns] times scale [] or [rows, 1].

    multiplied: whether products are to take the values as they are.
    """
    layout = LAYOUTS[values.dtype, multiplied]
    linear.layout_type = f"HappyHorse{layout.__name__}"
    linear.quant_format = layout.FORMAT  # what core writes into a file of the model
    register_layout_class(linear.layout_type, layout)
    shape = tuple(values.shape)
    values, scale = enlarged(values, scale, layout.stored_shape(shape))
    params = layout.Params(scale=scale, orig_dtype=dtype, orig_shape=shape)
    linear.weight = torch.nn.Parameter(QuantizedTensor(values, linear.layout_type, params), requires_grad=False)
