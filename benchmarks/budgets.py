"""The whole pipeline at full size, through ComfyUI, on cards of several sizes.

    python as_package.py benchmarks.budgets                                        # the table in benchmarks/README.md
    python as_package.py benchmarks.budgets --gib 8 --size 540p --precision fp8 --seconds 10

The card is a simulated one (benchmarks/simulated_card): ComfyUI, its memory management, comfy-aimdo and the pack are
real, the files are of the full size, and every allocation is made and counted; only large tensors are not computed.
What a card's kernels allocate inside (cuBLAS, cuDNN) and PyTorch's fragmentation are not in it, so a card is taken as
1.5 GB smaller than it is.
"""

import argparse
import datetime
import os
import tempfile
from pathlib import Path

from ..launch.client import Client, NodeError
from ..launch.comfyui import FETCHED
from .measure import RESULTS
from .model_files import write_models
from .pipeline import paths_file, pipeline
from .simulated_card import card
from .simulated_card.server import CardServer

SET_ASIDE = 1.5e9  # bytes: driver, screen, workspaces
WAYS = {"dynamic": [], "not dynamic": ["--disable-dynamic-vram"]}
STAGES = {"Sampler": "first pass", "SuperResolution": "super-resolution", "SaveVideo": "decode"}
CARDS = (
    (24, "1080p"),
    (16, "1080p"),
    (12, "1080p"),
    (8, "1080p"),
    (16, "540p"),
    (12, "540p"),
    (8, "540p"),
    (12, "256p"),
    (8, "256p"),
)
BEYOND = (f"{stage}, beyond weights GB" for stage in STAGES.values())
HEAD = ("card", "clip", "weights", "memory", "peak GB", *BEYOND, "moved by both samplers GB", "")


def run(built, models, gib, graph, way="dynamic"):
    """Run a graph on a card of `gib` GiB less SET_ASIDE; return what its nodes used, and its error or None."""
    words = ["--extra-model-paths-config", str(paths_file(models, models)), "--disable-pinned-memory", *WAYS[way]]
    with tempfile.TemporaryDirectory(prefix="happyhorse-budgets-") as output:
        with CardServer(built, output, gib - SET_ASIDE / 2**30, words, numbers=False) as server:
            try:
                Client(server.url, server.check_alive).run(graph)
                return server.nodes(), None
            except NodeError as error:
                return server.nodes(), str(error)


def row(built, models, gib, size, seconds, precision, way, vae="turbo_vae"):
    """Return the table's cells of a run."""
    nodes, error = run(built, models, gib, pipeline(size, seconds, vae), way)
    beyond = {node["node"]: f"{(node['peak'] - node['after']) / 1e9:.1f}" for node in nodes}
    peak = max((node["peak"] for node in nodes), default=0)
    moved = sum(node["moved"] for node in nodes if node["node"] in ("Sampler", "SuperResolution"))
    result = "runs" if error is None else error.splitlines()[0][:80]
    about = (f"{gib:g} GiB", f"{size}, {seconds:g} s", precision, way, f"{peak / 1e9:.1f}")
    return (*about, *(beyond.get(node, "") for node in STAGES), f"{moved / 1e9:.0f}", result)


def main(arguments=None):
    """Print the table that the command line asks for, and write it into benchmarks/results if it is the whole one."""
    parser = argparse.ArgumentParser(prog="benchmarks.budgets", description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, help="memory of the card; default: the table of all cards")
    parser.add_argument("--size", choices=("256p", "540p", "1080p"), default="1080p")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--precision", choices=("int8", "fp8", "bf16"), default="int8")
    parser.add_argument("--way", choices=list(WAYS), help="of managing memory; default: both")
    parser.add_argument("--vae", choices=("turbo_vae", "wan2.2_vae"), default="turbo_vae")
    options = parser.parse_args(arguments)
    if reason := card.why_not():
        parser.exit(1, f"benchmarks.budgets: {reason}\n")
    os.environ.setdefault("COMFYUI_PATH", str(FETCHED))
    clips = CARDS if options.gib is None else [(options.gib, options.size)]
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(prefix="happyhorse-empty-") as folder:
        built = Path(folder)
        card.build(built)
        write_models(built, options.precision)
        for gib, size in clips:
            for way in [options.way] if options.way else WAYS:
                cells = row(built, built, gib, size, options.seconds, options.precision, way, options.vae)
                lines.append(f"| {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    if options.gib is None:
        file = RESULTS / f"budgets-simulated-card-{datetime.date.today()}.md"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
