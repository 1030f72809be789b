"""What the benchmarks that time code share: clocks, peaks of memory, the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from auxin.accounting.machine import processor_name


def chosen_clock(device: str) -> tuple[str, Callable[[], float]]:
    """A clock and its name: CPU time with one thread, so that a busy machine does not matter, else wall time."""
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return "wall", synchronised
    return ("cpu", time.thread_time) if torch.get_num_threads() == 1 else ("wall", time.perf_counter)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most that is allocated at once while `run` runs, beyond what is there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        current += change
        peak = max(peak, current)
    return peak


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
