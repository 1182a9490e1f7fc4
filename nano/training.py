"""The loop that all of nano's trainings share: AdamW, warm-up and cosine, moving average, saving often, resuming."""

import copy
import json
import math
import os
import time
from pathlib import Path

import torch

RUNS = Path(__file__).parent / "runs"
WEIGHTS = Path(__file__).parent / "weights"


def learning_rate(step, steps, peak, warmup=100, floor=0.02):
    """Return the rate at `step`: linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))


def save_atomically(state, path):
    """Write `state` with torch.save and rename it into place, so that a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(
    name,
    module,
    loss_of_step,
    *,
    steps,
    peak_rate,
    seed=0,
    ema=0.999,
    save_every=200,
    log_every=50,
    weight_decay=0.01,
    clip=1.0,
    warmup=100,
):
    """Train `module` and return its exponential moving average.

    loss_of_step(step) returns (loss, {name: number}) and draws its own data from `step` and the seed alone, so that a
    resumed run sees what an uninterrupted one would. State: nano/runs/<name>.pt, log: nano/runs/<name>.jsonl.
    """
    RUNS.mkdir(exist_ok=True)
    state_file, log_file = RUNS / f"{name}.pt", RUNS / f"{name}.jsonl"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = copy.deepcopy(module).requires_grad_(False)
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    began, sums = time.time(), {}
    for step in range(first, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate, warmup)
        loss, numbers = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        for key, value in {"loss": loss.item(), "norm": norm.item(), **numbers}.items():
            sums.setdefault(key, []).append(float(value))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            seconds = spent + time.time() - began
            row = {
                "step": step + 1,
                "seconds": round(seconds),
                **{k: float(f"{sum(v) / len(v):.5g}") for k, v in sums.items()},
            }
            with log_file.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            sums = {}
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_atomically(
                {
                    "module": module.state_dict(),
                    "average": average.state_dict(),
                    "step": step + 1,
                    "optimizer": optimizer.state_dict(),
                    "seconds": spent + time.time() - began,
                },
                state_file,
            )
    return average
