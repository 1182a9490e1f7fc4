"""Measure time and copy bandwidth of a device, without the caches' help."""

import datetime
import platform
import re
import statistics
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
FLUSH_BYTES = 256 * 2**20  # more than the last-level cache of any card here


def card_name(device):
    """Return the name of the card or processor that `device` is, as it goes into a table or a file name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def result_path(what, device, folder=None):
    """Return where a table about `what` goes: FOLDER/<what-card>-<date>.md, in benchmarks/results unless given."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{what} {card_name(device)}").strip("-").lower()
    path = (folder or RESULTS) / f"{name}-{datetime.date.today().isoformat()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def milliseconds(call, device, seconds=0.3):
    """Return the median milliseconds of call(), repeated for about `seconds` after a warm-up, with cold caches."""
    call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        flush.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def copy_bandwidth(device):
    """Return the bytes a second that a plain copy reads and writes: the floor of every memory-bound op."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device) * 1000
