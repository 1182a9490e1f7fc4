"""Measure time and copy bandwidth of a device, without the caches' help."""

import datetime
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..kernels.fp8 import quantise_rows, quantise_weight
from ..kernels.fp8_matmul import WAYS, way_of

RESULTS = Path(__file__).resolve().parent / "results"
FLUSH_BYTES = {"cuda": 2**28, "cpu": 2**26}  # more than the last-level cache of any card, of most processors
CLOCK_STEPS = 4 / 64 if sys.platform == "win32" else 0  # Windows counts processor time in steps of 1/64 s
FLUSHES = {"cuda": 4, "cpu": 1}  # so many that a card is busy until what is measured has been launched


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


def write_table(what, lines, folder=None):
    """Write the lines of a table about `what` on a processor to its `result_path`, say where, return the path."""
    path = result_path(what, torch.device("cpu"), folder)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


def milliseconds(call, device, seconds=0.3):
    """Return the median milliseconds of call(), repeated for about `seconds` after a warm-up, with cold caches.

    On a processor they are milliseconds of all threads together, so that other work on it does not count.
    """
    call()
    flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        for _ in range(FLUSHES[device.type]):
            flush.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            times.append(1000 * processor_seconds(call))
    return statistics.median(times)


def processor_seconds(call):
    """Return the processor seconds of one call() on all threads; the mean of several where the clock is coarse."""
    calls, spent, start = 0, 0.0, time.process_time()
    while calls == 0 or spent < CLOCK_STEPS:
        call()
        calls, spent = calls + 1, time.process_time() - start
    return spent / calls


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine reached in this run: bytes a second of a plain copy, operations a second of large matmuls."""

    copy: float
    bf16: float
    fp8: float | None  # None: no fp8 matmul here

    def floor(self, moved=0, operations=0, fp8=False):
        """Return the least milliseconds that so many bytes and operations take; None where fp8 cannot be multiplied."""
        rate = self.fp8 if fp8 else self.bf16
        return None if rate is None else 1000 * max(moved / self.copy, operations / rate)


def copy_time(moved, device):
    """Return the milliseconds of a plain copy that reads and writes `moved` bytes: small ones reach less bandwidth."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source), device)


def copy_bandwidth(device):
    """Return the bytes a second that a large copy reads and writes: the floor of every memory-bound op."""
    moved = 2 * (2**30 if device.type == "cuda" else 2**26)
    return moved / copy_time(moved, device) * 1000


def rates(device):
    """Measure the machine: a copy of 1 GiB, matmuls of 8192 x 8192 x 8192 (on a processor 64 MiB and 512)."""
    gpu = device.type == "cuda"
    copy = copy_bandwidth(device)
    size = 8192 if gpu else 512
    x, weight = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * size**3 * 1000
    bf16 = operations / milliseconds(lambda: F.linear(x, weight), device)
    way = way_of(torch.cuda.get_device_capability(device)) if gpu else None
    if way is None:
        return Rates(copy, bf16, None)
    rows, narrow = quantise_rows(x), quantise_weight(weight)
    return Rates(copy, bf16, operations / milliseconds(lambda: WAYS[way](rows, narrow), device))


def once(call, device):
    """Return the seconds of one call without warm-up, for what takes long; processor seconds on a processor."""
    if device.type == "cpu":
        return processor_seconds(call)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_gigabytes(call, device):
    """Run call(), return the most memory it held beyond what was held before, in GB; None on a processor."""
    if device.type != "cuda":
        call()
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def cell(value, form="{:.3f}"):
    """Write one value of a table; "-" for None."""
    return "-" if value is None else form.format(value)


def line(*cells):
    """Join cells to one line of a Markdown table."""
    return f"| {' | '.join(str(part) for part in cells)} |"


def head(*names):
    """Return the two lines that open a Markdown table."""
    return [line(*names), "|" + "---|" * len(names)]


def row_or_fault(name, make):
    """Return make() as a table line after `name`, or the error in its place: one failing row must not cost the rest."""
    try:
        return line(*name, *make())
    except Exception as error:  # out of memory, an operation this card or torch lacks
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return line(*name, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")
