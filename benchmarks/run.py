"""Time every kernel against its reference, torch.compile and the memory floor: `python as_package.py benchmarks.run`.

    python as_package.py benchmarks.run [--cpu] [--out FOLDER]

Prints one table and writes it to benchmarks/results/<card>-<date>.md. Needs torch (and Triton on a GPU), no ComfyUI.
"""

import argparse
import datetime
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import kernels
from ..kernels import reference
from .measure import card_name, copy_bandwidth, milliseconds

RESULTS = Path(__file__).resolve().parent / "results"
SPANS = {"256p": (3584, 126, 300), "540p": (16320, 126, 300), "1080p": (65280, 126, 300), "cpu": (448, 26, 40)}


@dataclass(frozen=True, slots=True)
class Row:
    """One op at one size: its name in `kernels` and `reference`, what to call it with, and the bytes it must move."""

    op: str
    size: str
    arguments: tuple
    moved: int


def rows(size, device):
    """Yield the ops of one size (a key of SPANS) with random bf16 and fp32 inputs of the full-size network's shapes."""
    spans = SPANS[size]
    tokens = sum(spans)
    residual = torch.randn(1, tokens, 5120, device=device)
    weights = torch.randn(3, 5120, device=device)
    bf16 = torch.bfloat16
    yield Row("rms_norm_spans", f"{size} residual", (residual, weights, spans, 1e-6, bf16), residual.numel() * 6)
    heads = torch.randn(1, tokens, 7208, device=device, dtype=bf16)[..., :5120].unflatten(-1, (40, 128))
    yield Row("rms_norm_spans", f"{size} q heads", (heads, weights[:, :128], spans, 1e-6, bf16), heads.numel() * 4)
    widened = torch.randn(1, tokens, 27304, device=device, dtype=bf16)
    yield Row("swiglu7", f"{size} MLP", (widened, bf16), widened.numel() * 3)


def measured(row, device, bandwidth):
    """Return the table cells of a row; torch.compile is measured on a GPU only."""
    plain, ours = getattr(reference, row.op), getattr(kernels, row.op)
    expected, found = plain(*row.arguments).float(), ours(*row.arguments).float()
    error = (expected - found).abs().max().item()
    del expected, found
    compiled = "-"
    if device.type == "cuda":
        fused = torch.compile(plain, dynamic=False)
        compiled = f"{milliseconds(lambda: fused(*row.arguments), device):.3f}"
    reference_time = milliseconds(lambda: plain(*row.arguments), device)
    time = milliseconds(lambda: ours(*row.arguments), device)
    floor = 1000 * row.moved / bandwidth
    cells = (f"{reference_time:.3f}", compiled, f"{time:.3f}", f"{floor:.3f}", f"{floor / time:.0%}", f"{error:.1e}")
    return (row.op, row.size, *cells)


@torch.no_grad()
def table(device, sizes):
    """Yield the lines of the table in Markdown as they are measured."""
    bandwidth = copy_bandwidth(device)
    yield f"# {card_name(device)}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s"
    yield ""
    yield "| op | size | reference ms | torch.compile ms | ours ms | floor ms | floor/ours | max error |"
    yield "|---|---|---|---|---|---|---|---|"
    for size in sizes:
        for row in rows(size, device):
            yield f"| {' | '.join(measured(row, device, bandwidth))} |"


def main(arguments=None):
    """Measure what the command line asks for, print it line by line, write the file, return its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="measure the processor, at small sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the table is written")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device found; give --cpu to measure the processor")
    device = torch.device("cpu" if options.cpu else "cuda")
    lines = []
    for line in table(device, ("cpu",) if options.cpu else ("256p", "540p", "1080p")):
        print(line, flush=True)
        lines.append(line)
    name = re.sub(r"[^A-Za-z0-9]+", "-", card_name(device)).strip("-").lower()
    path = options.out / f"{name}-{datetime.date.today().isoformat()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
