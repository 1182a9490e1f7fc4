"""Every Triton kernel: under the interpreter, on the GPU where there is one, compiled ahead of time for each card."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

FILES = [Path(__file__).with_name(name) for name in ("backends.py", "attention_backends.py", "restore_backends.py")]
TARGETS = {
    **{f"sm_{version}": ("cuda", version, 32) for version in (80, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),  # compiled to see that it could serve; dispatch keeps AMD's cards on torch
}
WITH_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")  # dispatch.FP8_CAPABILITY keeps older cards from being asked
OUTPUTS = {"bf16": "*bf16", "fp32": "*fp32", "fp8": "*fp8e4nv"}
BF16, FP32 = OUTPUTS["bf16"], OUTPUTS["fp32"]


@pytest.mark.parametrize(
    "interpret",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))],
    ids=["interpreted", "gpu"],
)
def test_kernels_equal_their_references(interpret):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    result = subprocess.run(command, capture_output=True, text=True, cwd=FILES[0].parents[2], env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def compiled(kernel, pointers, constants, floats=(), *, card, aligned=(), **options):
    """Compile `kernel` without a GPU: pointers {name: type}, constants {name: value}, every other argument an int64.

    aligned: arguments that are multiples of 16, which Triton looks at when it compiles for a call.
    """
    signature = {name: "i64" for name in kernel.arg_names}
    signature.update(pointers, **{name: "fp32" for name in floats}, **{name: "constexpr" for name in constants})
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget(*TARGETS[card])
    return triton.compile(source, target=target, options=options)


def rms_norm(out, add, block_rows, block_columns):
    from pack.kernels.rms_norm_triton import rms_norm_kernel

    read = FP32 if block_columns == 8192 else BF16
    pointers = {"x": read, "delta": BF16, "total": FP32, "weight": FP32, "out": OUTPUTS[out], "scale": FP32}
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    return rms_norm_kernel, pointers, {"ADD": add, "QUANTISE": out == "fp8", **blocks}, ["eps"], 8


def activation(out, gated):
    from pack.kernels.activation_triton import BLOCK_COLUMNS, activation_kernel
    from pack.kernels.fp8 import padded_columns

    quantise = out == "fp8"
    block = BLOCK_COLUMNS if not quantise else 16384 if gated else 32768
    columns = 13652 if gated else 20480
    constants = {"COLUMNS": columns, "OUT_COLUMNS": padded_columns(columns) if quantise else columns}
    constants |= {
        "X_ALIGNMENT": 8,
        "OUT_ALIGNMENT": 4,
        "GATED": gated,
        "WORDS": gated,
        "QUANTISE": quantise,
        "BLOCK_COLUMNS": block,
    }
    return activation_kernel, {"x": BF16, "out": OUTPUTS[out], "scale": FP32}, constants, [], 8


def attention_inputs(out):
    from pack.kernels.attention_inputs_triton import attention_inputs_kernel

    rows = BF16 if out == "fp8" else OUTPUTS[out]
    pointers = {"rows": rows, "v": rows, "q": OUTPUTS[out], "k": OUTPUTS[out]}
    pointers |= {name: FP32 for name in ("q_weight", "k_weight", "sin_cos", "q_scale", "gate")}
    constants = {"QUERY_HEADS": 40, "KEY_HEADS": 8, "HEAD_DIM": 128, "HALF": 48, "BLOCK_TOKENS": 4}
    constants |= {"HEADS_PER_PROGRAM": 8, "BLOCK_QUERY_HEADS": 64, "BLOCK_DIM": 128, "TOGETHER": 16}
    constants |= {"ROWS_ALIGNMENT": 8, "TO_FP8": out == "fp8", "EXPERTS": 3}
    return attention_inputs_kernel, pointers, constants, ["eps"], 4


def channel_norm(out):
    from pack.kernels.channel_norm_triton import channel_norm_kernel

    constants = {"CHANNELS": 64, "BIASED": True, "ACTIVATION": "silu", "BLOCK_PIXELS": 128, "BLOCK_CHANNELS": 64}
    return channel_norm_kernel, {name: OUTPUTS[out] for name in ("x", "bias", "out")}, constants, ["eps"], 8


def add_channels(out):
    from pack.kernels.add_channels_triton import add_channels_kernel

    constants = {"CHANNELS": 64, "BLOCK_PIXELS": 128, "BLOCK_CHANNELS": 64}
    return add_channels_kernel, {name: OUTPUTS[out] for name in ("x", "delta", "bias")}, constants, [], 8


def gate_heads(out):
    from pack.kernels.gate_heads_triton import gate_heads_kernel

    constants = {"HEADS": 40, "HEAD_DIM": 128, "OUT_COLUMNS": 5120, "QUANTISE": out == "fp8"}
    constants |= {"BLOCK_HEADS": 64, "BLOCK_DIM": 128}
    pointers = {"x": BF16, "gate": FP32, "out": OUTPUTS[out], "scale": FP32}
    return gate_heads_kernel, pointers, constants, [], 8


def add(out):
    from pack.kernels.add_triton import BLOCK, add_kernel

    return add_kernel, {"x": FP32, "delta": BF16, "out": FP32}, {"BLOCK": BLOCK}, [], 8


def renoise(out):
    from pack.kernels.renoise_triton import BLOCK, renoise_kernel

    pointers = {name: FP32 for name in ("x", "velocity", "noise", "out")}
    return renoise_kernel, pointers, {"BLOCK": BLOCK}, ["sigma", "sigma_next", "clean"], 4


def scale(out):
    from pack.kernels.scale_triton import BLOCK_COLUMNS, BLOCK_ROWS, scale_kernel

    pointers = {"x": OUTPUTS[out], "row_scale": FP32, "column_scale": FP32}
    constants = {"ALIGNMENT": 8, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return scale_kernel, pointers, constants, [], 8


def restore_rows(out, values):
    from pack.kernels.restore_triton import BLOCK_COLUMNS, BLOCK_ROWS, restore_rows_kernel

    constants = {"ALIGNMENT": 4, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return restore_rows_kernel, {"values": values, "scale": FP32, "out": OUTPUTS[out]}, constants, [], 8


def restore_blocks(out, kind):
    from pack.kernels.restore_triton import BLOCK_RUNS, KINDS, RUN, restore_blocks_kernel

    constants = {"KIND": kind, "BYTES": KINDS[kind][0], "RUNS": KINDS[kind][1], "RUN": RUN, "BLOCK_RUNS": BLOCK_RUNS}
    return restore_blocks_kernel, {"raw": "*u8", "out": OUTPUTS[out]}, constants, [], 4


GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
KERNELS = {
    "rms_norm of 5120": (lambda out: rms_norm(out, False, 1, 8192), OUTPUTS),
    "rms_norm of heads": (lambda out: rms_norm(out, False, 64, 128), OUTPUTS),
    "add_rms_norm": (lambda out: rms_norm(out, True, 1, 8192), OUTPUTS),
    "swiglu7": (lambda out: activation(out, True), OUTPUTS),
    "gelu7": (lambda out: activation(out, False), OUTPUTS),
    "attention_inputs": (attention_inputs, OUTPUTS),
    "channel_norm": (channel_norm, ["bf16", "fp32"]),
    "add_channels": (add_channels, ["bf16", "fp32"]),
    "gate_heads": (gate_heads, OUTPUTS),
    "add": (add, ["fp32"]),
    "renoise": (renoise, ["fp32"]),
    "scale": (scale, ["bf16", "fp32"]),
    "restore_rows int8": (lambda out: restore_rows(out, "*i8"), ["bf16"]),
    "restore_rows fp8": (lambda out: restore_rows(out, OUTPUTS["fp8"]), ["bf16"]),
    **{f"restore_blocks {kind}": (lambda out, kind=kind: restore_blocks(out, kind), ["bf16"]) for kind in GGUF},
}


@pytest.mark.parametrize(
    ("card", "name", "out"),
    [
        (card, name, out)
        for card in TARGETS
        for name, (_, outputs) in KERNELS.items()
        for out in outputs
        if "fp8" not in (out, name.split()[-1]) or card in WITH_FP8
    ],
)
def test_kernels_compile_ahead_of_time(card, name, out, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pointers, constants, floats, warps = KERNELS[name][0](out)
    result = compiled(kernel, pointers, constants, floats, card=card, num_warps=warps)
    assembly, binary = ("amdgcn", "hsaco") if card.startswith("gfx") else ("ptx", "cubin")
    assert card in next(line for line in result.asm[assembly].splitlines() if "target" in line)
    assert len(result.asm[binary]) > 1000


@pytest.mark.parametrize("name", ["channel_norm", "add_channels"])
def test_channels_move_16_bytes_at_a_time(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pointers, constants, floats, warps = KERNELS[name][0]("bf16")
    aligned = [*pointers, *(name for name in kernel.arg_names if name.endswith(("_batch", "_frame", "_pixel")))]
    ptx = compiled(kernel, pointers, constants, floats, card="sm_90", aligned=aligned, num_warps=warps).asm["ptx"]
    moves = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert {move[:2] for move in moves} == {"ld", "st"} and all(move.endswith(".v4.b32") for move in moves)


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("swiglu7", "fp8"),
        ("swiglu7", "bf16"),
        ("attention_inputs", "bf16"),
        ("attention_inputs", "fp8"),
        ("scale", "bf16"),
    ],
)
def test_rows_whose_width_is_no_multiple_of_16_are_read_in_whole_words(name, out, tmp_path, monkeypatch):
    """27,304 and 7,208 columns are multiples of 8: on an H200 reads of single numbers took four times as long."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pointers, constants, floats, warps = KERNELS[name][0](out)
    ones = {argument: 1 for argument in kernel.arg_names if argument.endswith("_column") or argument == "heads"}
    ones |= {"row_stride": 1, "column_stride": 1} if name == "scale" else {}
    if name in ("swiglu7", "scale"):
        aligned = list(pointers)
    else:  # heads of 128 columns lie at multiples of 16, as weights, sines and cosines do
        aligned = [*pointers, *(f"{part}_{axis}" for part in "qkv" for axis in ("batch", "head", "token"))]
        aligned += ["q_weight_expert", "k_weight_expert", "sin_cos_token"]
    constants = {**constants, **{argument: one for argument, one in ones.items() if argument in kernel.arg_names}}
    result = compiled(kernel, pointers, constants, floats, card="sm_90", aligned=aligned, num_warps=warps)
    reads = re.findall(r"ld\.global\S*", result.asm["ptx"])
    assert reads and not any(read.endswith("16") for read in reads), reads
