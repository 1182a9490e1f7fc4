"""Core's Linears for rows that zeros fill up to a multiple of 16 columns: see model_loader/padded_linear.py."""

import comfy.ops
from torch.nn import Parameter
from torch.nn.functional import linear

from ..model_loader.padded_linear import keep_padded, padded_weight
from .held_weights import held


class PaddedRows:
    """Mixed into a Linear of comfy.ops: x [..., in_features] as ever, or with zeros after them."""

    def forward(self, x, *arguments, **options):
        """x [..., in_features or more] -> [..., out_features]."""
        if x.shape[-1] == self.in_features:
            return super().forward(x, *arguments, **options)
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, dtype=x.dtype, device=x.device, bias_dtype=x.dtype, offloadable=True
        )
        stays = weight is self.weight and type(weight) is Parameter  # not one that was brought here for this call
        out = linear(x, keep_padded(weight) if stays else padded_weight(weight), bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return out


class Operations(comfy.ops.disable_weight_init):
    """comfy.ops.disable_weight_init with such Linears."""

    TAKES_PADDED_ROWS = True
    HELD = staticmethod(held)

    class Linear(PaddedRows, comfy.ops.disable_weight_init.Linear):
        """A Linear of either kind of rows."""
