"""Every Triton kernel: under the interpreter, on the GPU where there is one, compiled ahead of time for each card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

BACKENDS = Path(__file__).with_name("backends.py")
CARDS = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100}
POINTERS = {"fp32": "*fp32", "bf16": "*bf16"}


@pytest.mark.parametrize(
    "interpret",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))],
    ids=["interpreted", "gpu"],
)
def test_kernels_equal_their_references(interpret):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(BACKENDS)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    result = subprocess.run(command, capture_output=True, text=True, cwd=BACKENDS.parents[2], env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def compiled(kernel, pointers, constants, floats=(), *, capability, **options):
    """Compile `kernel` without a GPU: pointers {name: type}, constants {name: value}, every other argument an int64."""
    signature = {name: "i64" for name in kernel.arg_names}
    signature.update(pointers, **{name: "fp32" for name in floats}, **{name: "constexpr" for name in constants})
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("read", "written"), [("fp32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("kernel", ["rms_norm of 5120", "rms_norm of heads", "swiglu7"])
def test_kernels_compile_ahead_of_time(kernel, read, written, card, tmp_path, monkeypatch):
    from pack.kernels import rms_norm_triton, swiglu7_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"x": POINTERS[read], "out": POINTERS[written]}
    if kernel == "swiglu7":
        constants = {"BLOCK_COLUMNS": swiglu7_triton.BLOCK_COLUMNS}
        result = compiled(swiglu7_triton.swiglu7_kernel, pointers, constants, capability=CARDS[card], num_warps=4)
    else:
        blocks = (1, 8192) if kernel == "rms_norm of 5120" else (64, 128)
        result = compiled(
            rms_norm_triton.rms_norm_kernel,
            {**pointers, "weight": "*fp32"},
            dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS"), blocks, strict=True)),
            floats=["eps"],
            capability=CARDS[card],
            num_warps=8,
        )
    assert f".target {card}" in result.asm["ptx"]
    assert len(result.asm["cubin"]) > 1000
