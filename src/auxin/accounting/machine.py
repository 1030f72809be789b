"""The machine that a number was measured on."""

import os
import platform
from pathlib import Path
from typing import Literal

import torch

from auxin.errors import ConfigError


def describe_machine(threads: int | None = None) -> dict[str, str]:
    """Processor, cores, memory, accelerator and system, as a report prints them; and the `threads` of the process that
    computed, which are this one's unless they are given."""
    description = {
        "processor": processor_name(),
        "cores": str(usable_cores()),
        "threads": str(threads or torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
    }
    if (memory := memory_bytes()) is not None:
        description["memory"] = f"{memory / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        description["accelerator"] = torch.cuda.get_device_name()
    return description


def processor_name() -> str:
    """The processor's name as the system tells it; its architecture where it tells none."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Memory that a process can still get, in bytes: what Linux tells of it, swap included; elsewhere all there is.
    None where the system does not tell."""
    information = Path("/proc/meminfo")
    if information.exists():
        lines = (line.partition(":") for line in information.read_text(encoding="utf-8").splitlines())
        told = {name: int(rest.split()[0]) * 1024 for name, _, rest in lines if rest.strip().endswith("kB")}
        if "MemAvailable" in told:
            return told["MemAvailable"] + told.get("SwapFree", 0)
    return memory_bytes()


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to compute on.

    Raises:
        ConfigError: CUDA is asked for where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' is asked for, but torch finds no CUDA device. Use 'auto' or 'cpu'.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")
