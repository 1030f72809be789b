"""What this machine has, and what Auxin will use of it."""

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

import torch

from auxin.accounting.ledger import software_versions
from auxin.accounting.machine import choose_device, describe_machine
from auxin.settings import Settings
from auxin.training.hardware import choose_precision, peak_flops

EXTRAS = {"lm_eval": "benchmarks of the field", "peft": "adapters", "torchao": "quantization", "gguf": "GGUF files"}


class Diagnosis(Settings):
    """The findings of `auxin doctor`."""

    machine: dict[str, str]
    versions: dict[str, str]
    used: dict[str, str]
    """What training will use if nothing else is asked for."""
    available: dict[str, str]
    """Optional things, and whether they are there."""
    warnings: list[str]
    """What will hurt, and the mend."""


def diagnose(folder: str | Path = ".") -> Diagnosis:
    """Look at this machine; `folder` is where runs will be written, for its free space."""
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    peak = peak_flops(device, precision)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    free = shutil.disk_usage(folder).free
    used = {
        "device": str(device),
        "matrix products": str(precision).removeprefix("torch."),
        "peak": f"{peak:.3g} FLOP/s (MFU is reported)" if peak else "unknown (no MFU)",
        "threads": str(torch.get_num_threads()),
        "free disk": f"{free / 2**30:.1f} GiB in {Path(folder).resolve()}",
    }
    available = {
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Apple GPU (MPS)": "there, but not used yet" if torch.backends.mps.is_available() else "none",
        "torch.compile on the CPU": f"yes, with {compiler}" if compiler else "no: needs a C++ compiler (g++)",
        "report test in a browser": shutil.which("chromium") or "no chromium",
    }
    for package, purpose in EXTRAS.items():
        found = importlib.util.find_spec(package) is not None
        available[f"{package} ({purpose})"] = importlib.metadata.version(package) if found else "not installed"
    warnings = []
    if device.type == "cpu":
        warnings.append("No CUDA device: models of more than some million parameters will train slowly.")
    else:
        warnings.append(
            "Nothing of Auxin has run on CUDA yet. In a clone of its repository, python benchmarks/gpu.py checks and "
            "measures everything there, in less than eight minutes: see docs/gpu.md."
        )
    if free < 2 * 2**30:
        warnings.append("Less than 2 GiB of disk are free: checkpoints may not fit. Give --output on another disk.")
    return Diagnosis(
        machine=describe_machine(), versions=software_versions(), used=used, available=available, warnings=warnings
    )
