"""The attention kernels compiled ahead of time: for every card with fp8, and for Hopper with what its compiler says."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

FP8, BF16, FP32 = "fp8e4nv", "bf16", "*fp32"
STRIDES = [f"{tensor}_{axis}" for tensor in ("q", "x", "out") for axis in ("batch", "head", "token")]


def compiled(source, card, **options):
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", card, 32), options=options)


def source_of(kernel, types, constants, kind=None):
    """Build what Triton compiles: every argument that `types` and `constants` leave out is an int32."""
    kind = kind or triton.compiler.ASTSource
    signature = {name: "i64" if name in STRIDES else "i32" for name in kernel.arg_names}
    signature.update(types, **{name: "constexpr" for name in constants})
    whole = [name for name, type_ in signature.items() if type_.startswith("*") or name in STRIDES]
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in whole}
    return kind(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("card", [89, 90, 100, 120])
def test_fp8_attention_compiles(card):
    from pack.kernels import attention_fp8_triton as kernels

    head = {"HEAD_DIM": 128}
    x = {"x": "*bf16", "largest": FP32}
    sources = [source_of(kernels.largest_kernel, x, {**head, "BLOCK_TOKENS": 128})]
    x |= {"out": f"*{FP8}", "scale": FP32}
    sources.append(source_of(kernels.values_kernel, x, {**head, "BLOCK_KEYS": 128}))
    types = {"q": f"*{FP8}", "query_scale": FP32, "value_scale": FP32, "out": "*bf16", "scale": "fp32"}
    types |= {name: f"tensordesc<{FP8}[128,128]>" for name in ("keys", "values")}
    blocks = {"BLOCK_QUERIES": kernels.BLOCK_QUERIES, "BLOCK_KEYS": kernels.BLOCK_KEYS}
    sources.append(source_of(kernels.attention_kernel, types, {"SHIFT": 8.0, **head, **blocks}))
    for source in sources:
        result = compiled(source, card, num_warps=4, num_stages=2)
        assert f"sm_{card}" in next(line for line in result.asm["ptx"].splitlines() if ".target" in line)
        assert len(result.asm["cubin"]) > 1000


def compiled_for_hopper(folder, fp8, half_scores=False, block_keys=128):
    """Compile attention_hopper's kernel: its PTX, what the assembler says, and the tool that reads its machine code."""
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    from pack.kernels import attention_hopper as kernels
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    name, dtype = (FP8, gl.float8e4nv) if fp8 else (BF16, gl.bfloat16)
    types = {"q": f"*{name}", "query_scale": FP32, "value_scale": FP32, "out": "*bf16", "scale": "fp32"}
    for tensor, block in {"keys": [block_keys, 128], "values": [128, block_keys]}.items():
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        types[tensor] = f"tensordesc<{name}[{block[0]},{block[1]}],{layout!r}>"
    constants = {"FP8_PRODUCTS": fp8, "HALF_SCORES": half_scores, "HEAD_DIM": 128, "STAGES": kernels.STAGES}
    constants |= {"BLOCK_QUERIES": kernels.BLOCK_QUERIES, "BLOCK_KEYS": block_keys}
    result = compiled(source_of(kernels.attention_kernel, types, constants, GluonASTSource), 90, num_warps=4)
    ptx = folder / "attention.ptx"
    ptx.write_text(result.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", ptx, "-o", folder / "attention.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return result.asm["ptx"], said, ptxas.with_name("nvdisasm")


def test_attention_on_hopper_for_256_keys_puts_few_numbers_aside(tmp_path):
    _, said, _ = compiled_for_hopper(tmp_path, True, half_scores=True, block_keys=256)
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 192 and "serialized" not in said, said


@pytest.mark.parametrize(("fp8", "half_scores"), [(True, False), (True, True), (False, False)])
def test_attention_on_hopper_keeps_its_products_asynchronous_and_its_numbers_in_registers(fp8, half_scores, tmp_path):
    """Both break without an error, and at a third of the speed, where a value is asked for while products run."""
    ptx, said, nvdisasm = compiled_for_hopper(tmp_path, fp8, half_scores)
    spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
    # With scores in fp32 fp8 puts one number aside where a block of keys reaches past the last one.
    assert spilled <= (0 if half_scores else 8), said
    assert "serialized" not in said, said
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)", ptx)
    assert products.count("128") == 2 * 4 * (4 if fp8 else 8)
    assert products.count("8") == (2 * 2 * 4 if fp8 else 0)  # with ones: the sums of the weights
    assert len(re.findall(r"m64n128k32\.f16\.e4m3", ptx)) == (2 * 2 * 4 if half_scores else 0)
    fresh = re.findall(r"wgmma\.mma_async.*%rd\d+, 0, 1, 1(?:, [01])?;", ptx)  # that start at 0
    assert len(fresh) == 2 * (6 if fp8 else 2)  # of both warpgroups; fp8's values and ones start anew for every block
    from_shared = re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\}, %rd\d+, %rd\d+,", ptx)
    assert len(from_shared) == (2 * 2 * 4 if fp8 else 0)  # bf16's queries stay in registers: 4 % of an H200's time
    assert ("943208504" in ptx) == fp8  # four ones as bytes, which the assembler cannot convert wrongly
    command = [nvdisasm, "-c", tmp_path / "attention.cubin"]
    loops = loops_with_products(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(loops) == 2
    for names in loops:  # of each warpgroup
        last_wait = max(i for i, name in enumerate(names) if name.startswith("WARPGROUP.DEPBAR"))
        exponentials = [i for i, name in enumerate(names) if name == "MUFU.EX2"]
        assert not {"STL", "LDL"} & set(names)
        assert len(exponentials) == (2 if fp8 else 2 + 64)  # two by which sums shrink, 64 weights
        assert len(names) < {(True, True): 320, (True, False): 420, (False, False): 600}[fp8, half_scores]
        assert max(exponentials) < last_wait  # values are multiplied while bf16 takes its exponentials


def loops_with_products(code):
    """Return the names of the instructions of the innermost loops with products, without what they seldom run."""
    names, labels, branches = [], {}, {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][^\s;]*)", line)
        if label:
            labels[label[1]] = len(names)
        elif instruction:
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if target and instruction[1] == "BRA":
                branches[len(names)] = target[1]
            names.append(instruction[1])
    loops = []
    for end, label in branches.items():
        start = labels[label]
        inside = names[start:end] if start <= end < start + 800 else []
        if sum("GMMA" in name for name in inside) >= 8 and "EXIT" not in inside:  # past it are waits that took longer
            masks = [(at, labels[to]) for at, to in branches.items() if start < at and at + 60 < labels[to] <= end]
            loops.append([names[i] for i in range(start, end) if not any(a < i < b for a, b in masks)])
    return loops
