"""How far fp8 and int8 are from bf16, forward by forward: `python as_package.py benchmarks.quantised`.

nano on prompts at every step of its sampler, all networks given the states of the bf16 one; and the golden
transformers, whose weights are random. Relative RMS of either velocity, the larger of the two; the bar is 4 %.
A scale a row for weights and for inputs. Attention in fp8 is what a Hopper card does: queries, keys, values and the
softmax's weights rounded.
"""

import argparse
import copy
import datetime
import math
from functools import partial
from pathlib import Path

import torch

from ..kernels import FP8
from ..kernels.reference import fp8_weights
from ..model_loader.checkpoint import Checkpoint
from ..model_loader.fp8_linear import with_fp8_linears
from ..model_loader.load import fill
from ..model_loader.row_scales import quantised
from ..nano.cases import InProcess, draw_cases
from ..nano.latents import LATENTS, SOUNDS
from ..sampler.denoise import denoise_renoise, seeded_noise
from ..sampler.schedule import flow_sigmas
from ..verify.case import GOLDEN, Case
from ..verify.dit import config_of
from .measure import card_name, head, write_table

STEPS = 8
WAYS = (
    "int8 weights",
    "int8 weights and inputs",
    "fp8 weights",
    "fp8 weights and inputs",
    "fp8 attention",
    "fp8 weights, inputs and attention",
)


def in_every_way(network):
    """Return a DiT in bf16 by each of the WAYS."""
    narrow = with_fp8_linears(network)
    attention = (partial(way, attention=rounding_weights, fp8_attention=True) for way in (network, narrow))
    int8 = with_rounded_weights(network, int8_rows)
    return int8, with_int8_inputs(int8), with_rounded_weights(network, fp8_rows), narrow, *attention


def rounding_weights(q, k, v):
    """Return attention of what fp8 leaves of q, k and v, weights as kernels/attention_fp8_hopper.py rounds them.

    It takes all keys for one block.
    """
    wide_k, wide_v = (heads.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    scores = q.float() @ wide_k.mT * (q.shape[-1] ** -0.5 / math.log(2))
    weights = fp8_weights(scores - scores.amax(-1, keepdim=True) + 8.75)
    return (weights @ wide_v / weights.sum(-1, keepdim=True)).to(q.dtype)


def int8_rows(x):
    """Return what int8 with a scale a row leaves of x [..., C], in fp32."""
    values, scale = quantised(torch.int8, x)
    return values * scale


def fp8_rows(x):
    """Return what e4m3 with a scale a row leaves of a weight [O, C], in fp32."""
    values, scale = quantised(FP8, x)
    return values.float() * scale


def with_rounded_weights(network, rounded_rows):
    """Return a copy of a DiT whose bf16 linears have rounded weights, and inputs in bf16."""
    rounded = copy.deepcopy(network)
    for linear in bf16_linears(rounded):
        linear.weight.copy_(rounded_rows(linear.weight))
    return rounded


def with_int8_inputs(network):
    """Return a copy of a DiT whose bf16 linears round their inputs to int8."""
    rounded = copy.deepcopy(network)
    for linear in bf16_linears(rounded):
        linear.register_forward_pre_hook(lambda _, inputs: int8_rows(inputs[0]).to(inputs[0].dtype))
    return rounded


def bf16_linears(network):
    """Return a DiT's linears but its fp32 islands."""
    linears = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
    return [linear for linear in linears if linear.weight.dtype == torch.bfloat16]


def errors(networks, wanted, clip):
    """Return the error of each network's forward of `clip` (video, audio, text) against `wanted`'s, in percent."""

    def error(found):
        return 100 * max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))

    return [error(network(*clip)) for network in networks]


@torch.inference_mode()
def of_nano(clips):
    """Return the errors [clips, steps, ways] of nano."""
    nano, found = InProcess(), []
    networks = in_every_way(nano.dit)
    for case in draw_cases(clips, "prompt"):
        text, noise, steps = nano.text(case.prompt), seeded_noise(case.number), []

        def velocity(video, audio, sigma, text=text, steps=steps):
            wanted = nano.dit(video, audio, text)
            steps.append(errors(networks, wanted, (video, audio, text)))
            return wanted

        start = noise(torch.empty(1, 48, LATENTS, 6, 6)), noise(torch.empty(1, SOUNDS, 64))
        denoise_renoise(velocity, *start, flow_sigmas(STEPS), noise=noise)
        found.append(steps)
    return torch.tensor(found)


@torch.inference_mode()
def of_golden(path):
    """Return the errors of one golden transformer case, one for each of the WAYS."""
    case = Case.read(path)
    network = fill("dit", config_of(case), Checkpoint.of_tensors(case.weights().tensors), dtype=torch.bfloat16)
    clip = case["in.x_t"], case["in.audio_x_t"], case["in.txt_feat"][:, : int(case["in.txt_feat_len"])]
    return errors(in_every_way(network), network(*clip), clip)


def main(arguments=None):
    """Measure, print the table, write it to results/, return its path."""
    parser = argparse.ArgumentParser(prog="benchmarks.quantised", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="where the table is written")
    options = parser.parse_args(arguments)
    lines = [
        f"# fp8 and int8 against bf16, relative RMS of a forward in percent, {card_name(torch.device('cpu'))}, "
        f"{datetime.date.today().isoformat()}",
        "",
        *head("network", "forwards", *(f"{way}: mean, largest" for way in WAYS)),
    ]
    print("\n".join(lines), flush=True)

    def add(network, found):
        cells = [f"{mean:.1f}, {most:.1f}" for mean, most in zip(found.mean(0), found.amax(0), strict=True)]
        lines.append(f"| {network} | {len(found)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)

    nano = of_nano(options.clips)
    for step in range(STEPS):
        add(f"nano, step {step + 1} of {STEPS}", nano[:, step])
    for path in sorted(GOLDEN.glob("dit_a*.json")):
        add(f"golden {path.stem}", torch.tensor([of_golden(path)]))
    return write_table("quantised-against-bf16", lines, options.out)


if __name__ == "__main__":
    main()
