"""Nano's sampling side by side with the plain first version's: `python as_package.py benchmarks.first_version`.

The first version is this repository's first commit with a network, read from git into a temporary folder. All load the
same weights and draw the same noise; their runs alternate, so that other work on the machine slows all alike. In
ComfyUI the first version ran in fp32 on every processor; now it is bf16 where the processor multiplies that.
"""

import argparse
import datetime
import importlib
import importlib.util
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

from ..kernels.dispatch import cpu_multiplies_bf16
from ..model_loader.load import load_dit
from ..sampler.denoise import denoise_renoise, seeded_noise
from ..sampler.schedule import flow_sigmas
from .measure import card_name, write_table

ROOT = Path(__file__).resolve().parent.parent
FIRST = "9419c25"  # the commit
FIRST_VERSION = "first version, fp32"
WEIGHTS = ROOT / "nano" / "weights" / "nano_dit.safetensors"
VIDEO, AUDIO, TEXT = (1, 48, 13, 6, 6), (1, 51, 64), (1, 24, 96)  # the demo's two seconds of 96 x 96 pixels


def first_load_dit(folder):
    """Unpack the first version into `folder`, import it as package `first_version`, return its `load_dit`."""
    command = ["git", "-C", str(ROOT), "archive", FIRST, "__init__.py", "kernels", "model_loader", "sampler"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    spec = importlib.util.spec_from_file_location(
        "first_version", Path(folder) / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["first_version"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module("first_version.model_loader.load").load_dit


@torch.inference_mode()
def sample(dit, text):
    """Return the clip of eight steps, as the demo's sampler makes it: (video, audio)."""
    noise = seeded_noise(0)
    video, audio = noise(torch.empty(VIDEO)), noise(torch.empty(AUDIO))
    return denoise_renoise(lambda v, a, sigma: dit(v, a, text), video, audio, flow_sigmas(8), noise=noise)


def measure(networks, text, runs):
    """Run every network `runs` times in turn; return {name: (wall seconds, processor seconds) of every run}."""
    times = {name: [] for name in networks}
    for _ in range(runs):
        for name, dit in networks.items():
            wall, processor = time.perf_counter(), time.process_time()
            sample(dit, text)
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def main(arguments=None):
    """Measure, print the table, write it to results/, return its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.first_version", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="runs of each version (default 30)")
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="where the table is written")
    options = parser.parse_args(arguments)
    text = torch.randn(TEXT, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        first = first_load_dit(folder)
        networks = {FIRST_VERSION: first(WEIGHTS, dtype=torch.float32), "first version, bf16": first(WEIGHTS)}
    networks["now, fp32"] = load_dit(WEIGHTS, dtype=torch.float32)
    if cpu_multiplies_bf16():
        networks["now, bf16"] = load_dit(WEIGHTS)
    *_, now = networks  # as the loader's default has it
    clips = {name: sample(dit, text)[0] for name, dit in networks.items()}
    difference = (clips[now] - clips[FIRST_VERSION]).norm() / clips[FIRST_VERSION].norm()
    times = measure(networks, text, options.runs)
    lines = [
        f"# nano's eight steps, {card_name(torch.device('cpu'))}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {options.runs} runs each in turn, {datetime.date.today().isoformat()}",
        "",
        "| version | median s | fastest s | median processor s | fastest processor s |",
        "|---|---|---|---|---|",
    ]
    columns = {
        name: [f(run[i] for run in runs) for i in (0, 1) for f in (statistics.median, min)]
        for name, runs in times.items()
    }
    lines += [f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |" for name, row in columns.items()]
    ratios = [after / before for before, after in zip(columns[FIRST_VERSION], columns[now], strict=True)]
    lines += [f"| the last / the first | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", ""]
    lines += [f"Relative RMS difference of these two clips' video latents: {difference:.1e}."]
    print("\n".join(lines))
    return write_table("nano-sampling", lines, options.out)


if __name__ == "__main__":
    main()
