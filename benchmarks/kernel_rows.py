"""The kernels' part of the table: every op at the full network's widths against reference, torch.compile and floor."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from .. import kernels
from ..kernels import FP8, Fp8Rows, quantise_rows, quantise_weight, reference
from ..model_loader.gguf_blocks import FORMATS, restore, restore_by_torch
from ..model_loader.row_scales import quantised
from .measure import cell, copy_time, head, milliseconds, row_or_fault

BF16 = torch.bfloat16
KITCHEN_BF16 = 2  # comfy-kitchen's number for it
SPANS = {"256p": (3584, 126, 300), "1080p": (65280, 126, 300), "cpu": (12, 2, 2)}
LATENTS = {"256p": (1, 48, 32, 16, 28), "1080p": (1, 48, 32, 68, 120), "cpu": (1, 48, 4, 8, 14)}
DECODED = {"256p": (1, 64, 8, 128, 224), "1080p": (1, 64, 8, 544, 960), "cpu": (1, 64, 2, 8, 14)}  # its last layers
WIDTH, HEADS, HEAD_DIM, GATED, PLAIN = 5120, (40, 8), 128, 13652, 20480  # the last two: what the activations put out
ROWS = (HEADS[0] + 2 * HEADS[1]) * HEAD_DIM + HEADS[0]


@dataclass(frozen=True, slots=True)
class Row:
    """One op at one size: its name in `kernels` and `reference`, what to call it with, and the bytes it must move.

    ours, plain: functions in the place of those of the name.
    """

    op: str
    what: str
    arguments: tuple
    moved: int
    ours: Callable | None = None
    plain: Callable | None = None


def rows(size, device):
    """Yield makers of the rows of one size (a key of SPANS): random inputs of the full network's shapes."""
    spans = SPANS[size]
    tokens = sum(spans)

    def draw(*shape, dtype=BF16):
        return torch.randn(shape, device=device, dtype=dtype)

    def norm(out_dtype, out_bytes):
        arguments = (draw(1, tokens, WIDTH, dtype=torch.float32), draw(3, WIDTH), spans, 1e-6, out_dtype)
        return Row("rms_norm_spans", f"to {name_of(out_dtype)}", arguments, tokens * WIDTH * (4 + out_bytes))

    def add_norm(out_dtype, out_bytes):
        x, delta = draw(1, tokens, WIDTH, dtype=torch.float32), draw(1, tokens, WIDTH)
        arguments = (x, delta, draw(3, WIDTH), spans, 1e-6, out_dtype)
        return Row(
            "add_rms_norm_spans", f"to {name_of(out_dtype)}", arguments, tokens * WIDTH * (4 + 2 + 4 + out_bytes)
        )

    def activation(op, inputs, outputs, out_dtype, out_bytes):
        moved = tokens * (2 * inputs + out_bytes * outputs)
        return Row(op, f"to {name_of(out_dtype)}", (draw(1, tokens, inputs), out_dtype), moved)

    def inputs(fp8):
        angles = draw(tokens, 3 * (HEAD_DIM // 8), dtype=torch.float32)
        sin_cos = torch.cat([angles.sin(), angles.cos()], dim=1)
        weights = draw(3, HEAD_DIM), draw(3, HEAD_DIM)
        q_and_k, v = sum(HEADS) * HEAD_DIM, HEADS[1] * HEAD_DIM
        written = (q_and_k + 4 * HEADS[0] if fp8 else 2 * q_and_k) + 2 * v + 4 * HEADS[0]
        arguments = (draw(1, tokens, ROWS), *weights, spans, sin_cos, HEADS, 1e-6, None, fp8)
        moved = tokens * (2 * ROWS + written) + sin_cos.nbytes
        return Row("attention_inputs", f"to {'fp8' if fp8 else 'bf16'}", arguments, moved)

    def gate(out_dtype, out_bytes):
        gates = torch.rand(1, tokens, HEADS[0], device=device)
        moved = tokens * (WIDTH * (2 + out_bytes) + 4 * HEADS[0])
        arguments = (draw(1, HEADS[0], tokens, HEAD_DIM), gates, out_dtype)
        return Row("gate_heads", f"to {name_of(out_dtype)}", arguments, moved)

    def decoder_norm():
        x = draw(*DECODED[size]).contiguous(memory_format=torch.channels_last_3d)
        return Row("channel_norm", "silu, bf16", (x, 1e-8, "silu"), 2 * x.nbytes)

    def decoder_add():
        x, delta = (draw(*DECODED[size]).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
        return Row("add_channels", "bf16", (x, delta, draw(x.shape[1]) / 1000), 3 * x.nbytes)  # it works in place

    def add():
        x, delta = draw(1, tokens, WIDTH, dtype=torch.float32), draw(1, tokens, WIDTH)
        return Row("add", "fp32 and bf16", (x, delta), tokens * WIDTH * (4 + 2 + 4))

    def renoise():
        latents = [draw(*LATENTS[size], dtype=torch.float32) for _ in range(3)]
        return Row("renoise_step", "fp32", (*latents, 0.8, 0.7), 4 * latents[0].nbytes)

    def scale():
        x = draw(tokens, 2 * GATED)  # times ones: it works in place
        ones = (torch.ones(shape, device=device) for shape in ((tokens, 1), (1, 2 * GATED)))
        return Row("scale_rows_and_columns", "bf16", (x, *ones), 2 * x.nbytes)

    for out in ((BF16, 2), (FP8, 1)):
        yield lambda out=out: norm(*out)
        yield lambda out=out: add_norm(*out)
        yield lambda out=out: activation("swiglu7", 2 * GATED, GATED, *out)
        yield lambda out=out: activation("gelu7", PLAIN, PLAIN, *out)
        yield lambda out=out: gate(*out)
    yield lambda: inputs(False)
    yield lambda: inputs(True)
    yield decoder_norm
    yield decoder_add
    yield add
    yield renoise
    yield scale


def weight_rows(device):
    """Yield makers of the rows of quantised weights made wide: a layer's largest matrix, on a processor a small one."""
    rows, columns = (2 * GATED, WIDTH) if device.type == "cuda" else (64, 512)

    def of_rows(dtype):
        values = torch.randint(-99, 99, (rows, columns), dtype=torch.int8, device=device).to(dtype)
        arguments = (values, torch.rand(rows, 1, device=device), BF16)
        return Row("restore_rows", "fp8" if dtype == FP8 else "int8", arguments, rows * columns * 3)

    def of_blocks(kind):
        form = FORMATS[kind]
        shape = rows, columns // form.numbers * form.bytes
        raw = torch.randint(0, 60, shape, dtype=torch.uint8, device=device)
        moved = raw.nbytes + rows * columns * 2  # 60: so small that no fp16 number among the bytes is infinite
        return Row("restore_blocks", kind, (raw, kind, BF16), moved, restore, restore_by_torch)

    yield from (partial(of_rows, dtype) for dtype in (torch.int8, FP8))
    yield from (partial(of_blocks, kind) for kind in FORMATS)


def name_of(dtype):
    """Return the short name of an output's dtype."""
    return "fp8" if dtype == FP8 else "bf16"


def wide(result):
    """Return every tensor of an op's result in fp32, fp8 rows multiplied out."""
    if isinstance(result, Fp8Rows):
        return [result.values.float() * result.scale]
    return [result.float()] if isinstance(result, torch.Tensor) else [part for one in result for part in wide(one)]


def measured(row, device, rates):
    """Return the cells of a row; torch.compile is measured on a GPU only."""
    plain, ours = row.plain or getattr(reference, row.op), row.ours or getattr(kernels, row.op)
    pairs = zip(wide(plain(*row.arguments)), wide(ours(*row.arguments)), strict=True)
    error = max((expected - found).abs().max().item() for expected, found in pairs)
    compiled = None
    if device.type == "cuda":
        fused = torch.compile(plain, dynamic=False)
        compiled = milliseconds(lambda: fused(*row.arguments), device)
    plain_time = milliseconds(lambda: plain(*row.arguments), device)
    time = milliseconds(lambda: ours(*row.arguments), device)
    floor, copied = rates.floor(moved=row.moved), copy_time(row.moved, device)
    times = map(cell, (plain_time, compiled, time, copied, floor))
    return *times, f"{floor / time:.0%}", f"{copied / time:.0%}", f"{error:.1e}"


def table(device, rates, sizes):
    """Yield the lines of the kernels' table."""
    times = ("reference ms", "torch.compile ms", "ours ms", "copy of as many bytes ms", "floor ms")
    yield from head("op", "size", *times, "floor/ours", "copy/ours", "max error")
    for size, makers in [*((size, rows(size, device)) for size in sizes), ("weight", weight_rows(device))]:
        for make in makers:
            row = make()
            yield row_or_fault((f"{row.op} {row.what}", size), lambda row=row: measured(row, device, rates))
            torch._dynamo.reset()


def linear_table(device, rates, sizes):
    """Yield the lines of the linears' table: bf16, bf16 with rows padded to 16, fp8 and int8 with their padding.

    int8 is comfy-kitchen's, where that is installed.
    """
    times = ("bf16 ms", "bf16 padded ms", "fp8 ms", "fp8, rows quantised apart ms", "int8, rows quantised apart ms")
    yield from head("linear", "size", *times, "floor bf16 ms", "floor fp8 ms")
    shapes = {"qkv": (WIDTH, ROWS), "proj": (WIDTH, WIDTH), "up": (WIDTH, 2 * GATED), "down": (GATED, WIDTH)}
    for size in sizes:
        for name, shape in shapes.items():
            tokens_and_shape = (sum(SPANS[size]), *shape)
            yield row_or_fault((name, size), lambda shape=tokens_and_shape: linear_cells(device, rates, *shape))


def linear_cells(device, rates, tokens, inputs, outputs):
    """Return the cells of one linear."""
    x = torch.randn(tokens, inputs, device=device, dtype=BF16)
    weight = torch.randn(outputs, inputs, device=device, dtype=BF16)
    missing = (0, -inputs % 16)
    padded_x, padded_weight = F.pad(x, missing), F.pad(weight, missing)
    times = [
        milliseconds(lambda: F.linear(x, weight), device),
        milliseconds(lambda: F.linear(padded_x, padded_weight), device),
    ]
    if rates.fp8 is None:
        times += [None, None]
    else:
        rows, narrow = quantise_rows(x), quantise_weight(weight)
        times += [
            milliseconds(lambda: kernels.fp8_linear(rows, narrow, outputs), device),
            milliseconds(lambda: kernels.fp8_linear(quantise_rows(x), narrow, outputs), device),
        ]
    if find_spec("comfy_kitchen") is None:
        times.append(None)
    else:
        import comfy_kitchen  # noqa: F401  (registers the operator)

        values, scale = quantised(torch.int8, padded_weight)
        multiply = torch.ops.comfy_kitchen.int8_linear
        times.append(milliseconds(lambda: multiply(padded_x, values, scale, None, KITCHEN_BF16), device))
    operations = 2 * tokens * inputs * outputs
    floors = rates.floor(operations=operations), rates.floor(operations=operations, fp8=True)
    return [cell(value) for value in (*times, *floors)]
