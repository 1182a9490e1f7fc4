"""The network's element-wise and row-wise ops; the networks import them from here."""

from .dispatch import rms_norm, rms_norm_spans, swiglu7
from .reference import gate_heads, gelu7, renoise_step, rotate

__all__ = ["gate_heads", "gelu7", "renoise_step", "rms_norm", "rms_norm_spans", "rotate", "swiglu7"]
