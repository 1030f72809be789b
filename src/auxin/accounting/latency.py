"""How long something takes on this machine: several things timed in turns, once, and kept in a folder.

What is compared is timed together, one after the other, again and again, so that what else the machine does meets all
alike; the median of each counts. Times that were taken under the same conditions (`Conditions`) are not taken again.
"""

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch.utils._python_dispatch import _disable_current_modes

from auxin.accounting.machine import choose_device, processor_name
from auxin.files import cache_folder
from auxin.kept_records import alone, digest, find, keep
from auxin.settings import Settings

TICK = 1e-9
"""Seconds that anything takes: a share of no time is none."""
Phase = Literal["forward", "decoding"]
FORMAT = 2
FEWEST, MOST = 5, 99
"""Rounds in which everything is timed once."""
PATIENCE = 0.5
"""Seconds for each thing that is timed, after which no further round is begun, once there were the fewest."""


class Conditions(Settings):
    """Under what something is timed: with the same ones it takes as long."""

    phase: Phase
    """One pass over whole sequences ("forward"), or one more token for each ("decoding")."""
    batch_size: int
    """Sequences, images or recordings at once."""
    sequence_length: int
    """Tokens of each; in decoding those that it has already, whose keys and values are kept."""
    dtype: str
    device: Literal["cpu", "cuda"]
    processor: str
    """What computes, by its name: the processor, or the GPU."""
    threads: int
    """Of this process."""
    torch_version: str
    transformers_version: str

    @classmethod
    def here(
        cls,
        phase: Phase,
        batch_size: int,
        sequence_length: int,
        dtype: torch.dtype,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> Self:
        """Those of this process on this machine.

        Raises:
            ConfigError: a CUDA device is asked for where there is none.
        """
        chosen = choose_device(device)
        return cls(
            phase=phase,
            batch_size=batch_size,
            sequence_length=sequence_length,
            dtype=str(dtype).removeprefix("torch."),
            device="cuda" if chosen.type == "cuda" else "cpu",
            processor=torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else processor_name(),
            threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            transformers_version=importlib.metadata.version("transformers"),
        )

    def __str__(self) -> str:
        what = "a forward pass" if self.phase == "forward" else "decoding a token"
        at = "over" if self.phase == "forward" else "after"
        batch = f"{self.batch_size} x " if self.batch_size > 1 else ""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}, " * (self.device == "cpu")
        return (
            f"{what} {at} {batch}{self.sequence_length} tokens on {self.processor}, {threads}{self.dtype}, "
            f"torch {self.torch_version}"
        )


@dataclass(frozen=True)
class Run:
    """Something to be timed."""

    prepare: Callable[[], Callable[[], object]]
    """Makes what is timed; itself it is not."""
    times: int = 1
    """How often that does what is meant: its time is divided by this."""


class Stopwatch:
    """Times parts, unless it has done so before.

    What they execute is no cost of whatever asked for it: the next one who asks has none.

    Args:
        conditions: under which everything is timed.
        folder: of what was timed before; None: `latency` in the user's cache (`auxin.files.cache_folder`).
        clock: tells seconds; None: `chosen_clock`.
    """

    def __init__(
        self, conditions: Conditions, folder: Path | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        self.conditions = conditions
        self._folder = cache_folder("latency") if folder is None else folder
        self._clock = clock or chosen_clock(conditions.device)[1]

    def seconds(self, signatures: Sequence[str], runs: Callable[[], Sequence[Run]]) -> list[float]:
        """How long each of some things takes, the median of what was measured in turns.

        Args:
            signatures: what they are: under the same ones nothing is timed again.
            runs: makes them, in this order, where they have to be timed.
        """
        subject = {"format": FORMAT, "conditions": self.conditions.model_dump(), "parts": list(signatures)}
        path = self._folder / f"{digest(subject)[:32]}.json"
        known = find(path, subject)
        if known is None:
            with alone(self._folder):  # two that time at once would measure each other
                known = find(path, subject) or self._timed(path, subject, runs)
        return list(known["seconds"])

    def _timed(self, path: Path, subject: dict[str, Any], runs: Callable[[], Sequence[Run]]) -> dict[str, Any]:
        with _disable_current_modes():  # what counts operations would be timed with them
            values = {"subject": subject, "seconds": medians(runs(), self._clock)}
        keep(path, values, "Latencies were")
        return values


def medians(runs: Sequence[Run], clock: Callable[[], float]) -> list[float]:
    """Seconds that each of `runs` takes: all are done once to warm up, then in turns."""
    for run in runs:
        run.prepare()()
    taken: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    while len(taken[0]) < FEWEST or (len(taken[0]) < MOST and time.perf_counter() - started < PATIENCE * len(runs)):
        for run, seconds in zip(runs, taken, strict=True):
            call = run.prepare()
            began = clock()
            call()
            seconds.append((clock() - began) / run.times)
    return [max(statistics.median(seconds), TICK) for seconds in taken]


def chosen_clock(device: str) -> tuple[str, Callable[[], float]]:
    """A clock and its name: CPU time with one thread, so that a busy machine does not matter, else wall time."""
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return "wall", synchronised
    return ("cpu", time.thread_time) if torch.get_num_threads() == 1 else ("wall", time.perf_counter)
