"""The network's element-wise and row-wise ops; the networks import them from here."""

from .attention_choice import attention_kernel, why_no_fp8_attention
from .dispatch import (
    add,
    add_channels,
    add_rms_norm_spans,
    attention_inputs,
    channel_norm,
    gate_heads,
    gelu7,
    raise_if_full,
    renoise_step,
    restore_blocks,
    restore_rows,
    rms_norm,
    rms_norm_spans,
    scale_rows_and_columns,
    swiglu7,
    takes_biases,
)
from .fp8 import FP8, Fp8Rows, quantise_rows, quantise_weight
from .fp8_matmul import fp8_linear
from .reference import empty_attention_inputs, memory_format_of, multiplied_out, repeat_ends

__all__ = [
    "FP8",
    "Fp8Rows",
    "add",
    "add_channels",
    "add_rms_norm_spans",
    "attention_inputs",
    "attention_kernel",
    "channel_norm",
    "empty_attention_inputs",
    "fp8_linear",
    "gate_heads",
    "gelu7",
    "memory_format_of",
    "multiplied_out",
    "quantise_rows",
    "quantise_weight",
    "raise_if_full",
    "renoise_step",
    "repeat_ends",
    "restore_blocks",
    "restore_rows",
    "rms_norm",
    "rms_norm_spans",
    "scale_rows_and_columns",
    "swiglu7",
    "takes_biases",
    "why_no_fp8_attention",
]
