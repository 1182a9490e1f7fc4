"""Matrices in blocks of GGUF, which core's quantised tensors lack. Needs comfy-kitchen: import it late."""

from dataclasses import dataclass
from functools import cache

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor import BaseLayoutParams

from ..model_loader.gguf_blocks import quantise, restore


class GgufBlocks(QuantizedLayout):
    """uint8 [rows, bytes of a row]; every operation on it is one on the restored matrix. Each KIND is a subclass."""

    KIND = None

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """The shape and dtype that the blocks stand for; their scales are among their bytes."""

        def _tensor_fields(self):
            return []

    @classmethod
    def quantize(cls, tensor, **options):
        """Return (blocks, Params): core asks for it after a LoRA; its own scales and rounding do not apply."""
        return quantise(tensor, cls.KIND), cls.Params(None, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        """Return the matrix in the dtype it stands for."""
        return restore(qdata, cls.KIND, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        """Return what is stored."""
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Return what is stored by the end of its name."""
        return {"": qdata}


@cache
def _layout(kind):
    """Return the name under which core knows the layout of blocks of `kind`."""
    name = f"HappyHorseGguf{kind}"
    register_layout_class(name, type(name, (GgufBlocks,), {"KIND": kind}))
    return name


def use_blocks(linear, raw, kind, dtype):
    """Give a quantised Linear of core's the weight, in `dtype`, that raw uint8 [rows, bytes of a row] stands for."""
    linear.layout_type = linear.quant_format = _layout(kind)
    params = GgufBlocks.Params(None, dtype, (linear.out_features, linear.in_features))
    linear.weight = torch.nn.Parameter(QuantizedTensor(raw, linear.layout_type, params), requires_grad=False)
