"""The pieces of the transformer: linears and norms with one expert per modality, attention, MLP, layer.

Tokens travel as x [B, N, D] in the order video, audio, text; `layout.spans` are the three lengths. The residual stream
is fp32, matmuls and attention run in the linears' dtype, norms, rotation, gate and activation in fp32.

Long sequences pass the linears in pieces, so that no wide row exists for every token at once, and a layer writes what
comes out into x. A 1080p clip has N = 65,706 tokens: x takes 1.35 GB, one bf16 [N, D] 0.67, q, k and v together 0.94;
an unsplit MLP would take 5.4 more (up 3.6, activation 1.8), a piece of 4,352 tokens takes 0.36. Peaks in GB: in
attention x 1.35 + q, k, v 0.94 + its output 0.67 = 3.0, in local layers 0.2 more for a window's keys; after it x 1.35 +
attention's output 0.67 + what one piece takes from the gate to the MLP, in plain torch 0.9 = 2.9.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from ..kernels import (
    FP8,
    add,
    add_rms_norm_spans,
    attention_inputs,
    empty_attention_inputs,
    gate_heads,
    gelu7,
    rms_norm,
    rms_norm_spans,
    swiglu7,
)
from .token_pieces import by_expert, cut, split

MODALITIES = ("video", "audio", "text")


class Stream(NamedTuple):
    """The residual stream between layers: x [B, N, D] fp32 and what the norm that follows has to add to it, or None."""

    x: torch.Tensor
    change: torch.Tensor | None = None

    def sum(self):
        """Return x with everything added."""
        return self.x if self.change is None else add(self.x, self.change)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis, weight fp32 [experts * size] with the experts stacked as in the published files.

    The weight is a plain fp32 parameter: ComfyUI keeps such small modules whole on the compute device.
    """

    def __init__(self, size, experts=1, eps=1e-6, device=None):
        super().__init__()
        self.experts = experts
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(experts * size, dtype=torch.float32, device=device))

    def rows(self, device):
        """Return the weight as [experts, size]."""
        return self.weight.to(device).view(self.experts, -1)

    def forward(self, x, spans=None, out_dtype=None):
        """Normalise x [B, N, ..., size]; `spans` are needed where there is more than one expert."""
        if self.experts == 1:
            return rms_norm(x, self.weight.to(x.device), self.eps, out_dtype)
        return rms_norm_spans(x, self.rows(x.device), spans, self.eps, out_dtype)

    def of_sum(self, stream, spans, out_dtype):
        """Return the sum of a Stream, in the place of its x, and in the same pass its norm; spans as `forward`."""
        x, change = stream
        if change is None:
            return x, self(x, spans, out_dtype)
        spans, place = spans if self.experts > 1 else (x.shape[1],), None if torch.is_grad_enabled() else x
        return add_rms_norm_spans(x, change, self.rows(x.device), spans, self.eps, out_dtype, place)


class ExpertLinear(nn.Module):
    """Three Linears, one for each modality's span; the published files stack their rows in this order."""

    def __init__(self, in_features, out_features, *, operations, **factory):
        super().__init__()
        for modality in MODALITIES:
            setattr(self, modality, operations.Linear(in_features, out_features, bias=False, **factory))

    def forward(self, x, spans):
        """x [B, N, in_features] -> [B, N, out_features]; no copy where all tokens are of one span."""
        parts = zip(MODALITIES, x.split(spans, dim=1), spans, strict=True)
        out = [project(getattr(self, modality), part, spans) for modality, part, length in parts if length]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def input_dtype(operations, dtype):
    """Return what the linears read: what `operations` says (FP8: quantised rows), else their weights' dtype."""
    return getattr(operations, "INPUT_DTYPE", dtype)


def takes_padded_rows(operations):
    """Tell whether the linears take rows that zeros fill up to a multiple of 16 columns: `operations` says so."""
    return getattr(operations, "TAKES_PADDED_ROWS", False)


def linear(in_features, out_features, experts, *, operations, **factory):
    """Build a bias-free Linear, or one for each modality where `experts` is 3."""
    if experts == 1:
        return operations.Linear(in_features, out_features, bias=False, **factory)
    return ExpertLinear(in_features, out_features, operations=operations, **factory)


def holding(operations):
    """Return held(linears, device), inside of which linears keep what they would bring for every piece anew.

    A single piece needs none: it would take the memory for nothing.

    `operations` may have one, as HELD; torch's own Linears need none, and compiled layers do without.
    """
    held = getattr(operations, "HELD", None)

    def held_or_not(linears, device):
        if held is None or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        return held(linears, device)

    return held_or_not


def of_expert(layer, expert):
    """Return the Linear that one expert has in a layer made by `linear`."""
    return getattr(layer, MODALITIES[expert]) if isinstance(layer, ExpertLinear) else layer


def project(layer, x, spans):
    """Run a layer made by `linear` on x [B, N, C]."""
    if isinstance(layer, ExpertLinear):
        return layer(x, spans)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # torch takes slices of a sequence for many small matmuls


class Attention(nn.Module):
    """Gated self-attention: one matmul gives queries, keys, values and a gate logit for every query head."""

    def __init__(self, config, layer, *, operations, dtype, device):
        super().__init__()
        self.experts = len(MODALITIES) if layer in config.expert_layers else 1
        self.dtype = input_dtype(operations, dtype)
        self.held = holding(operations)
        self.heads = (config.num_heads, config.num_query_groups)
        self.radius = config.frame_receptive_field if layer in config.local_attention_layers else None
        self.head_dim = head_dim = config.head_dim
        width = config.hidden_size
        rows = width + 2 * config.num_query_groups * head_dim + config.num_heads
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.pre_norm = RMSNorm(width, self.experts, device=device)
        self.linear_qkv = linear(width, rows, self.experts, **factory)
        self.q_norm = RMSNorm(head_dim, self.experts, device=device)
        self.k_norm = RMSNorm(head_dim, self.experts, device=device)
        self.linear_proj = linear(width, width, self.experts, **factory)

    def forward(self, stream, pieces, layout, rotary, attend, fp8):
        """Return the sum of a Stream, attention's output [B, Hq, N, d] in the linears' dtype, its gate [B, N, Hq] fp32.

        pieces: what `cut` makes of the sequence. fp8: `attend` gets q and k in it, see `attention_inputs`.
        """
        if len(pieces) == 1:
            x, normed = self.pre_norm.of_sum(stream, *pieces, self.dtype)
            q, k, v, gate = self.inputs(normed, *pieces, rotary, fp8)
            del normed
        else:
            x = stream.sum()
            q, k, v, gate = self.inputs_of(x, pieces, rotary, fp8)
        return x, attend(q, k, v, layout, self.radius), gate

    def inputs_of(self, x, pieces, rotary, fp8):
        """Return q, k, v and gate of several pieces, x [B, N, D] being all of them."""
        parts = zip(split(x, pieces), pieces, split(rotary, pieces, 0), strict=True)
        dtype = torch.bfloat16 if self.dtype == FP8 else self.dtype
        q, k, v, gate = whole = empty_attention_inputs(x, dtype, self.heads, self.head_dim, fp8)
        places = zip(*(split(heads, pieces, 2) for heads in (q, k, v)), split(gate, pieces), strict=True)
        for expert, run in by_expert(pieces, parts, places):
            with self.held([of_expert(self.linear_qkv, expert)] * (len(run) > 1), x.device):
                for (part, spans, angles), place in run:
                    self.inputs(self.pre_norm(part, spans, self.dtype), spans, angles, fp8, place)
        return whole

    def inputs(self, normed, spans, rotary, fp8, out=None):
        """Return q, k, v and gate of one piece, see `attention_inputs`; `out` takes them if given."""
        rows = project(self.linear_qkv, normed, spans)
        q_weight, k_weight = self.q_norm.rows(rows.device), self.k_norm.rows(rows.device)
        return attention_inputs(rows, q_weight, k_weight, spans, rotary, self.heads, self.q_norm.eps, out, fp8)

    def project(self, out, gate, spans):
        """Return what to add to one piece of the stream: gated heads, side by side, through the last linear."""
        return project(self.linear_proj, gate_heads(out, gate, self.dtype), spans)


class MLP(nn.Module):
    """Up, activation, down: gelu7 at 4x width in the layers the configuration names, swiglu7 elsewhere."""

    def __init__(self, config, layer, *, operations, dtype, device):
        super().__init__()
        self.experts = len(MODALITIES) if layer in config.expert_layers else 1
        width, inner = config.hidden_size, config.mlp_width(layer)
        self.dtype = input_dtype(operations, dtype)
        gated = layer not in config.gelu7_layers
        self.activation = swiglu7 if gated else gelu7
        self.padded = inner % 8 != 0 and takes_padded_rows(operations)  # cuBLAS takes three times as long for such rows
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.pre_norm = RMSNorm(width, self.experts, device=device)
        self.up_gate_proj = linear(width, 2 * inner if gated else inner, self.experts, **factory)
        self.down_proj = linear(inner, width, self.experts, **factory)

    def forward(self, normed, spans):
        """One piece, normed and as the linears read it, [B, n, D] -> what to add to x, [B, n, D]."""
        up = project(self.up_gate_proj, normed, spans)
        return project(self.down_proj, self.activation(up, self.dtype, self.padded and up.is_cuda), spans)


class Layer(nn.Module):
    """One transformer layer on the fp32 residual stream."""

    def __init__(self, config, layer, **factory):
        super().__init__()
        self.attention = Attention(config, layer, **factory)
        self.mlp = MLP(config, layer, **factory)

    def forward(self, stream, layout, rotary, attend, fp8=False):
        """Return the Stream after this layer; without gradients it takes the place of the one that came in.

        rotary [N, 6*(head_dim//8)] fp32; attend as `joint_attention`; fp8: it multiplies in that.
        """
        pieces = cut(layout.spans, self.attention.experts, stream.x.is_cuda)
        x, out, gate = self.attention(stream, pieces, layout, rotary, attend, fp8)
        if len(pieces) == 1:
            return self.rest(x, out, gate, *pieces)
        parts = zip(split(x, pieces), split(out, pieces, 2), split(gate, pieces), pieces, strict=True)
        linears = (self.attention.linear_proj, self.mlp.up_gate_proj, self.mlp.down_proj)
        for expert, run in by_expert(pieces, parts):
            with self.attention.held([of_expert(layer, expert) for layer in linears if len(run) > 1], x.device):
                for (part,) in run:
                    add(*self.rest(*part), out=part[0])
        return Stream(x)

    def rest(self, x, out, gate, spans):
        """Return the Stream of one piece after attention and MLP, x being what attention read."""
        change = self.attention.project(out, gate, spans)
        total, normed = self.mlp.pre_norm.of_sum(Stream(x, change), spans, self.mlp.dtype)
        return Stream(total, self.mlp(normed, spans))


class Adapter(nn.Module):
    """Three fp32 Linears that bring video patches, audio latents and text features to the model's width."""

    def __init__(self, config, *, operations, device):
        super().__init__()
        for modality in MODALITIES:
            channels = getattr(config, f"{modality}_in_channels")
            embedder = operations.Linear(channels, config.hidden_size, bias=True, dtype=torch.float32, device=device)
            setattr(self, f"{modality}_embedder", embedder)

    def forward(self, video, audio, text):
        """video [B, Nv, 4C], audio [B, L, Ca], text [B, n, Ct], any float dtype -> packed x [B, N, D] fp32."""
        tokens = (
            self.video_embedder(video.float()),
            self.audio_embedder(audio.float()),
            self.text_embedder(text.float()),
        )
        return torch.cat(tokens, dim=1)
