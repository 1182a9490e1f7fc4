"""What the step cache skips and what that costs, on nano: `python as_package.py benchmarks.step_cache`.

The same prompts and noise with and without it, at several thresholds; the difference is that of the finished latents.
"""

import argparse
import datetime
from functools import partial
from pathlib import Path

import torch

from ..nano.cases import InProcess, draw_cases
from ..nano.latents import LATENTS, SOUNDS
from ..sampler.denoise import denoise_renoise, denoise_unipc, seeded_noise
from ..sampler.schedule import flow_sigmas
from ..sampler.step_cache import StepCache
from .measure import card_name, write_table

THRESHOLDS = (0.02, 0.05, 0.1, 0.2)


@torch.inference_mode()
def sample(nano, case, steps, threshold):
    """Return (video, audio, StepCache) of one clip: 8 steps by the distilled sampler, any other number by FlowUniPC."""
    text, noise, cache = nano.text(case.prompt), seeded_noise(case.number), StepCache(threshold)
    video, audio = noise(torch.empty(1, 48, LATENTS, 6, 6)), noise(torch.empty(1, SOUNDS, 64))
    loop = partial(denoise_renoise, noise=noise) if steps == 8 else denoise_unipc
    velocity = lambda v, a, sigma: nano.dit(v, a, text, step_cache=partial(cache, "prompt"))  # noqa: E731
    return *loop(velocity, video, audio, flow_sigmas(steps)), cache


def row(nano, cases, steps, threshold):
    """Return the table's cells of one threshold: share of forwards that skipped, drift, difference of both latents."""
    skipped, drifts, forwards, differences = 0, [], 0, []
    for case in cases:
        *exact, _ = sample(nano, case, steps, 0.0)
        *near, cache = sample(nano, case, steps, threshold)
        skipped, forwards, drifts = skipped + len(cache.drifts), forwards + cache.forwards, drifts + cache.drifts
        differences.append([((a - b).norm() / b.norm()).item() for a, b in zip(near, exact, strict=True)])
    video, audio = torch.tensor(differences).mean(0).tolist()
    drift = f"{100 * sum(drifts) / len(drifts):.1f} %" if drifts else "-"
    return f"| {steps} | {threshold} | {100 * skipped / forwards:.0f} % | {drift} | {video:.3f} | {audio:.3f} |"


def main(arguments=None):
    """Measure, print the table, write it to results/, return its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_cache", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="where the table is written")
    options = parser.parse_args(arguments)
    nano, cases = InProcess(), draw_cases(options.clips, "prompt")
    middle = nano.dit.middle
    lines = [
        f"# step cache on nano, {options.clips} clips, {middle.stop - middle.start} of {nano.dit.config.num_layers} "
        f"layers skipped at a time, {card_name(torch.device('cpu'))}, {datetime.date.today().isoformat()}",
        "",
        "| steps | threshold | forwards that skipped | mean drift | picture: relative RMS | sound: relative RMS |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for steps in (8, 32):
        for threshold in THRESHOLDS:
            lines.append(row(nano, cases, steps, threshold))
            print(lines[-1], flush=True)
    return write_table("nano-step-cache", lines, options.out)


if __name__ == "__main__":
    main()
