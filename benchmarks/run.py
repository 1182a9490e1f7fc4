"""Measure kernels, layers, stages, decoder and growth into one file: `python as_package.py benchmarks.run`.

    python as_package.py benchmarks.run [--cpu] [--only PART ...] [--out FOLDER]

Prints its tables as they are measured and writes benchmarks/results/<card>-<date>.md. Needs torch (and Triton on a
GPU), no ComfyUI.
"""

import argparse
import datetime
import time
from pathlib import Path

import torch

from . import attention_rows, growth, kernel_rows, stages
from .measure import card_name, rates, result_path

PARTS = {  # what matters most comes first: a run that is cut short keeps it
    "stages": stages.stage_table,
    "decode": stages.decode_table,
    "layers": stages.layer_table,
    "attention": lambda device, rates, cpu: attention_rows.table(device, rates, attention_rows.layouts(cpu)),
    "kernels": lambda device, rates, cpu: kernel_rows.table(device, rates, kernel_sizes(cpu)),
    "linears": lambda device, rates, cpu: kernel_rows.linear_table(device, rates, kernel_sizes(cpu)),
    "growth": lambda device, rates, cpu: growth.table(device, cpu),
}


def kernel_sizes(cpu):
    """Return the sizes at which kernels are measured."""
    return ("cpu",) if cpu else ("256p", "1080p")


@torch.inference_mode()
def report(device, parts, cpu):
    """Yield the lines of the file in Markdown as they are measured."""
    reached = rates(device)
    fp8 = "no fp8" if reached.fp8 is None else f"fp8 {reached.fp8 / 1e12:.0f} TFLOP/s"
    yield f"# {card_name(device)}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
    yield ""
    threads = f", {torch.get_num_threads()} thread(s)" if cpu else ""
    yield f"Copy {reached.copy / 1e9:.0f} GB/s, matmul bf16 {reached.bf16 / 1e12:.2f} TFLOP/s, {fp8}{threads}."
    for part in parts:
        start = time.perf_counter()
        yield ""
        yield f"## {part}"
        yield ""
        yield from PARTS[part](device, reached, cpu)
        yield ""
        yield f"({part}: {time.perf_counter() - start:.0f} s of measuring)"


def main(arguments=None):
    """Measure what the command line asks for, print it line by line, write the file, return its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="measure the processor, at small sizes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="where the table is written")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device found; give --cpu to measure the processor")
    device = torch.device("cpu" if options.cpu else "cuda")
    path = result_path("" if len(options.only) == len(PARTS) else "-".join(options.only), device, options.out)
    lines = []
    for line in report(device, options.only, options.cpu):
        print(line, flush=True)
        lines.append(line)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")  # a run that is cut short keeps what it has
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
