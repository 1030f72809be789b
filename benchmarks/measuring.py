"""What the benchmarks share: peaks of memory, clocks, the machine, how repeated numbers are written, results on the
disk."""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from auxin.accounting.latency import chosen_clock
from auxin.accounting.ledger import software_versions
from auxin.accounting.machine import describe_machine, processor_name
from auxin.files import write_text


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


def resident(kind: str) -> int:
    """Bytes of the resident set: VmRSS, RssAnon or RssFile (now), or VmHWM (its peak since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def reset_peak() -> None:
    """Count the resident set's peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


class StepCosts:
    """Training hook: what each step takes, without evaluations, checkpoints and lines of metrics, which `train` does
    between its steps. Give it to `train` before the other hooks and once more behind them, so that they are part of a
    step. Drawing the batch is part of it, too.

    Args:
        trim: give freed memory back to the system before each step, so that `rises` counts none of it; costs time.
    """

    def __init__(self, trim: bool = False) -> None:
        self.seconds: list[float] = []
        """Processor time of each step."""
        self.peaks: list[int] = []
        """Bytes of the resident set at each step's highest."""
        self.rises: list[int] = []
        """How far each step's peak lies above what is there without gradients and AdamW's state: the model, the code.
        Says something from the second step on, when they are there before it begins."""
        self._trim, self._running = trim, False

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Watch this training."""
        self._model, self._optimizer = model, optimizer

    def before_step(self, step: int) -> None:
        """Start the clock."""
        if self._running:
            return
        if self._trim:
            ctypes.CDLL(None).malloc_trim(0)
        gradients = sum(p.grad.nbytes for p in self._model.parameters() if p.grad is not None)
        self._floor = resident("VmRSS") - gradients - self.state_bytes
        reset_peak()
        self._running, self._start = True, time.process_time()

    def after_step(self, step: int) -> None:
        """Read the clock; the last reading of a step counts."""
        seconds, peak = time.process_time() - self._start, resident("VmHWM")
        if not self._running:
            for numbers in (self.seconds, self.peaks, self.rises):
                numbers.pop()
        self.seconds.append(seconds)
        self.peaks.append(peak)
        self.rises.append(peak - self._floor)
        self._running = False

    @property
    def state_bytes(self) -> int:
        """Of AdamW's moments."""
        return sum(t.nbytes for state in self._optimizer.state.values() for t in state.values() if t.ndim)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was measured belongs to this process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


AHEAD = 4_000_000
"""Cycles of a GPU, some two milliseconds, that it waits so that work is queued before it begins."""
ROUNDS = 21
"""Of which the median counts."""


class Instant:
    """A place in the queue of a GPU: the difference of two is the seconds of what was queued between them."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Self) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def exact_clock(device: str) -> tuple[str, Callable[[], Any]]:
    """A clock whose differences are seconds, and its name: on a GPU its own events, so that what the host takes to
    queue work (see `run_ahead`) is not counted; else `chosen_clock`."""
    return ("GPU", Instant) if device == "cuda" else chosen_clock(device)


def run_ahead(device: str) -> None:
    """Keep a GPU waiting for a moment, so that the host has queued what is timed, or much of it, before it begins."""
    if device == "cuda":
        torch.cuda._sleep(AHEAD)


def median_seconds(run: Callable[[], object], device: str, rounds: int = ROUNDS) -> float:
    """What `run` takes, by `exact_clock`: the median of so many rounds, after three that warm up."""
    clock = exact_clock(device)[1]
    taken = []
    for number in range(-3, rounds):
        run_ahead(device)
        start = clock()
        run()
        if number >= 0:
            taken.append(clock() - start)
    return statistics.median(taken)


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


def mean_and_range(numbers: Sequence[float], form: str = ".4f") -> str:
    """The mean of what several seeds gave, the least and the largest; a dash where there is nothing."""
    if not numbers:
        return "-"
    return f"{statistics.mean(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def made_by(command: str, **versions: str) -> dict[str, Any]:
    """What numbers were made by: the command line, the machine, and the versions, further ones among them."""
    return {"command": command, "machine": describe_machine(), "versions": {**software_versions(), **versions}}


def both_machines(now: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """What numbers were measured on, some now and some before: another machine gives other bits, and the same numbers
    within the noise of the seeds; both are named."""
    return {key: "; ".join(dict.fromkeys([value, *before.get(key, value).split("; ")])) for key, value in now.items()}


def made_by_line(results: dict[str, Any]) -> str:
    """The same as a line of a page."""
    machine, versions = (
        ", ".join(f"{key} {value}" for key, value in results[part].items()) for part in ("machine", "versions")
    )
    return f"Command: `{results['command']}`. Machine: {machine}. Versions: {versions}."


def asked_quick(description: str | None) -> bool:
    """Parse a command line with the one option --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run that writes nothing")
    quick: bool = parser.parse_args().quick
    return quick


def publish(results: dict[str, Any], path: Path, text: str, page: Path, quick: bool) -> None:
    """Print a page, and after a run that was not `quick` write it and its results."""
    print(text)
    if not quick:
        write_results(results, path, text, page)


def write_results(results: dict[str, Any], path: Path, text: str, page: Path) -> None:
    """Write results as JSON and their page as Markdown, so that neither is ever half there."""
    for folder in (path.parent, page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_text(page, text)
