"""Attention's part of the table: full and local attention by every way torch offers, at the full network's heads."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.fp8 import fp8_scores
from ..model_loader.attention import frame_windows, joint_attention, local_attention
from ..model_loader.config import SR_1080P
from ..model_loader.tokens import TokenLayout
from .measure import cell, head, milliseconds, row_or_fault

RADIUS = SR_1080P.frame_receptive_field
HEADS, KEY_HEADS, HEAD_DIM = SR_1080P.num_heads, SR_1080P.num_query_groups, SR_1080P.head_dim


def scores(layout, radius=None):
    """Return how many pairs of query and key attention visits: all, or those that local attention allows."""
    total = sum(layout.spans)
    if radius is None:
        return total**2
    rest = total - layout.video
    near = sum(last - first for first, last in frame_windows(layout.frames, radius)) * layout.frame**2
    return near + layout.video * rest + rest * total


def operations(layout, heads=HEADS, head_dim=HEAD_DIM, radius=None):
    """Return the floating-point operations of one layer's attention."""
    return 4 * heads * head_dim * scores(layout, radius)


def by(backend):
    """Return full attention by one of torch's backends."""

    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attend


def flex(layout, radius, device):
    """Return local attention by FlexAttention, which skips the blocks that the mask leaves empty."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    frame, video, total = layout.frame, layout.video, sum(layout.spans)

    def may_see(batch, h, query, key):
        return (query >= video) | (key >= video) | ((query // frame - key // frame).abs() <= radius)

    mask = create_block_mask(may_see, None, None, total, total, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def in_fp8(q, k, layout, radius=None):
    """Return our attention in fp8, of q and k in it already, as `attention_inputs` gives them to the network."""
    narrow = fp8_scores(q, k, k.abs().amax().float())
    return lambda q, k, v: joint_attention(*narrow, v, layout, radius)


def on_hopper(q, k, layout, radius, **options):
    """Return Hopper's attention in fp8 in one of its variants."""
    from ..kernels import attention_hopper

    narrow = fp8_scores(q, k, k.abs().amax().float())
    window = () if radius is None else (layout.frame, layout.frames, radius)
    return lambda q, k, v: attention_hopper.attention(*narrow, v, *window, **options)


VARIANTS = {
    "scores in fp32": {},
    "scores in fp16": {"half_scores": True},
    "scores in fp16, 256 keys at a time": {"half_scores": True, "block_keys": 256},
}


def ours(q, k, layout, device, radius=None):
    """Return the ways that are ours: {name: function that makes one}."""
    ways = {"ours": lambda: partial(joint_attention, layout=layout, radius=radius)}
    if device.type == "cuda":
        ways["ours, fp8"] = lambda: in_fp8(q, k, layout, radius)
        if torch.cuda.get_device_capability(device)[0] == 9:
            for variant, options in VARIANTS.items():
                ways[f"fp8, {variant}"] = lambda options=options: on_hopper(q, k, layout, radius, **options)
    return ways


def table(device, rates, sizes):
    """Yield the lines: sizes {name: (TokenLayout, whether the local layers' attention is measured)}."""
    yield from head("attention", "size", "ms", "TFLOP/s", "floor ms", "floor/time", "relative RMS from ours in bf16")
    for size, (layout, local) in sizes.items():
        q, k, v = (
            torch.randn(1, count, sum(layout.spans), HEAD_DIM, device=device, dtype=torch.bfloat16)
            for count in (HEADS, KEY_HEADS, KEY_HEADS)
        )
        gpu = device.type == "cuda"
        ways = ours(q, k, layout, device)
        if gpu:
            ways |= {"flash": lambda: by(SDPBackend.FLASH_ATTENTION), "cuDNN": lambda: by(SDPBackend.CUDNN_ATTENTION)}
        yield from compared(f"full, {size}", ways, (q, k, v), device, rates, operations(layout))
        if local:
            ways = ours(q, k, layout, device, RADIUS)
            if gpu:
                ways["torch, frame by frame"] = lambda at=layout: partial(local_attention, layout=at, radius=RADIUS)
                ways["FlexAttention"] = lambda at=layout: flex(at, RADIUS, device)
            yield from compared(f"local, {size}", ways, (q, k, v), device, rates, operations(layout, radius=RADIUS))


def compared(size, ways, qkv, device, rates, operations):
    """Yield one line for each of the ways; the first one is ours in bf16."""
    found = []

    def cells(make, fp8):
        attend = make()
        found.append(attend(*qkv))
        difference = relative_rms(found[-1], found[0])
        del found[1:]
        time, floor = milliseconds(lambda: attend(*qkv), device), rates.floor(operations=operations, fp8=fp8)
        share = cell(floor and floor / time, "{:.0%}")
        return cell(time), cell(operations / time / 1e9, "{:.2f}"), cell(floor), share, f"{difference:.1e}"

    for name, make in ways.items():
        yield row_or_fault((name, size), lambda make=make, fp8="fp8" in name: cells(make, fp8))


def relative_rms(found, wanted):
    """Return the RMS of the difference over the RMS of `wanted`."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def layouts(cpu):
    """Return the clips of five seconds at the published sizes, or small ones for a processor."""
    if cpu:
        return {"cpu": (TokenLayout(26, 1, 2, 6, 4), True)}
    return {"256p": (CLIPS["256p"], False), "540p": (CLIPS["540p"], False), "1080p": (CLIPS["1080p"], True)}


CLIPS = {
    "256p": TokenLayout(32, 8, 14, 126, 300),
    "540p": TokenLayout(32, 17, 30, 126, 300),
    "1080p": TokenLayout(32, 34, 60, 126, 300),
}
