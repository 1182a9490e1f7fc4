"""How time grows with seconds of video and with pixels: the exponent of a layer's time, and of local attention's."""

import math
from dataclasses import replace
from functools import partial

import torch

from ..model_loader.attention import joint_attention
from ..model_loader.config import DISTILL, SR_1080P
from .attention_rows import CLIPS, HEADS, KEY_HEADS
from .measure import cell, head, milliseconds, row_or_fault
from .stages import SMALL_CLIPS, layer_call, small

FRAMES_A_SECOND, SOUNDS_A_SECOND = 25 / 4, 25


def exponent(sizes, times):
    """Return the slope of log time over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def longer(layout, seconds):
    """Return a layout of the same picture size for so many seconds."""
    return replace(layout, frames=int(FRAMES_A_SECOND * seconds) + 1, audio=SOUNDS_A_SECOND * seconds + 1)


def table(device, cpu):
    """Yield the lines: what grows, over which sizes, the times and the exponent."""
    yield from head("what", "against", "sizes", "ms", "exponent")
    config = small(DISTILL) if cpu else DISTILL
    clips = SMALL_CLIPS if cpu else CLIPS
    first = next(iter(clips.values()))

    def layer_ms(config, layer, layout):
        return milliseconds(layer_call(config, layout, layer, "bf16", device), device)

    seconds = (1, 2, 4) if cpu else (2, 5, 10, 20)
    yield grown(
        "layer, full attention", "seconds", seconds, lambda s: layer_ms(config, 2 if cpu else 7, longer(first, s))
    )
    if cpu:
        clips = {scale: replace(first, rows=3 * scale, columns=4 * scale) for scale in (1, 2, 3)}
    pixels = {layout.frame: layout for layout in clips.values()}
    yield grown(
        "layer, full attention", "tokens of a frame", pixels, lambda p: layer_ms(config, 2 if cpu else 7, pixels[p])
    )
    if not cpu:
        big = CLIPS["1080p"]
        yield grown(
            "layer, local attention, 1080p", "seconds", (5, 10, 15), lambda s: layer_ms(SR_1080P, 8, longer(big, s))
        )
    frames = (16, 32, 64, 128) if cpu else (32, 64, 128)
    picture = SMALL_CLIPS["cpu"] if cpu else CLIPS["540p"]
    radius = 3 if cpu else SR_1080P.frame_receptive_field
    for name, at in (("local", radius), ("full", max(frames))):
        yield grown(
            f"{name} attention alone, {picture.rows} x {picture.columns} tokens a frame, no sound or text",
            "frames",
            frames,
            lambda f, at=at: attention_ms(replace(picture, frames=f, audio=0, text=0), at, device, cpu),
        )


def attention_ms(layout, radius, device, cpu):
    """Return the milliseconds of attention within `radius` frames; everything where it spans the clip."""
    heads, key_heads, head_dim = (4, 1, 32) if cpu else (HEADS, KEY_HEADS, 128)
    q, k, v = (
        torch.randn(1, count, sum(layout.spans), head_dim, device=device, dtype=torch.bfloat16)
        for count in (heads, key_heads, key_heads)
    )
    return milliseconds(partial(joint_attention, q, k, v, layout, radius), device)


def grown(what, against, sizes, measure):
    """Return the line of one growth."""

    def cells():
        times = [measure(size) for size in sizes]
        shown = ", ".join(map(str, sizes)), ", ".join(cell(time, "{:.2f}") for time in times)
        return *shown, f"{exponent(list(sizes), times):.2f}"

    return row_or_fault((what, against), cells)
