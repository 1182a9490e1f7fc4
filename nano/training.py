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
SLOW = 0.2  # of the rate: what the slow part of a module learns at


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


def build_optimizers(parameters, slow, muon, weight_decay):
    """Return the optimizers of `train`; each of their groups has its `share` of the rate, which is not set yet."""
    slow, muon = (set(part.parameters()) if part else set() for part in (slow, muon))
    matrices = [p for p in parameters if p in muon and p.ndim == 2]
    others = [p for p in parameters if p not in set(matrices)]
    groups = [
        {"params": group, "share": share}
        for share, group in ((1.0, [p for p in others if p not in slow]), (SLOW, [p for p in others if p in slow]))
        if group
    ]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)]
    if matrices:
        group = {"params": matrices, "share": 1.0}
        optimizers.append(torch.optim.Muon([group], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train(
    name,
    module,
    loss_of_step,
    *,
    steps,
    peak_rate,
    slow=None,
    muon=None,
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
    resumed run sees what an uninterrupted one would. slow: a part of `module` that learns at SLOW of the rate. muon: a
    part whose matrices learn by Muon (arXiv 2502.16982), by steps as large as AdamW's.
    State: nano/runs/<name>.pt, log: nano/runs/<name>.jsonl.
    """
    RUNS.mkdir(exist_ok=True)
    state_file, log_file = RUNS / f"{name}.pt", RUNS / f"{name}.jsonl"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizers = build_optimizers(parameters, slow, muon, weight_decay)
    average = copy.deepcopy(module).requires_grad_(False)
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first, spent = state["step"], state["seconds"]
    began, sums = time.time(), {}
    for step in range(first, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["share"] * learning_rate(step, steps, peak_rate, warmup)
        loss, numbers = loss_of_step(step)
        module.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
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
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "seconds": spent + time.time() - began,
                },
                state_file,
            )
    return average


def bf16_matmuls():
    """Return the context in which nano's networks train: matmuls in bf16, twice as fast on a CPU that has them."""
    return torch.autocast("cpu", torch.bfloat16)


def plain_attention(q, k, v):
    """Do what `grouped_attention` does with plain matmuls; torch's own is slow backwards on a CPU at 32 a head."""
    batch, heads, tokens, size = q.shape
    q = q.reshape(batch * k.shape[1], -1, size)  # the query heads of a group, one after the other
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    weights = (q @ k.transpose(1, 2) * size**-0.5).float().softmax(-1)
    return (weights.to(v.dtype) @ v).view(batch, heads, tokens, size)
