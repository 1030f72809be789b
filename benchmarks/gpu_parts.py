"""The parts of `gpu.py`: each yields its rows, as they are measured."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altup_cost
import pattention
from gpu_training import training_rows
from measuring import exact_clock

ROOT = Path(__file__).resolve().parents[1]
WORKERS, PAUSE = 4, 0.1
"""Processes that run tests, and seconds between looks at what they say."""
Row = dict[str, Any]


def outcome_rows(device: str, quick: bool, seed: int) -> Iterator[Row]:
    """The tests that are marked `gpu`, by pytest, as they end; all of them are skipped where there is none."""
    options = ["-m", "gpu", "-p", "gpu_outcomes", "-p", "no:cacheprovider"]
    if not quick and importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling
        options += ["--numprocesses", str(WORKERS), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", *options, "tests/on_gpu"]
    with tempfile.TemporaryDirectory() as folder:
        outcomes, output = Path(folder) / "outcomes.jsonl", Path(folder) / "output"
        outcomes.touch()
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"},
            "AUXIN_OUTCOMES": str(outcomes),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")])),
            # What forbids kernels that are not deterministic asks cuBLAS for its workspaces, before the first product.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        with output.open("w") as file, outcomes.open(encoding="utf-8") as told:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            running = True
            while running:
                running = process.poll() is None
                yield from map(json.loads, told)
                time.sleep(PAUSE)
        words = output.read_text(encoding="utf-8", errors="replace")
    print(words, flush=True)
    if process.returncode > 1:
        raise RuntimeError(f"pytest ended with code {process.returncode}: {words.strip()[-500:]}")


def pattention_rows(device: str, quick: bool, seed: int) -> Iterator[Row]:
    """The layer beside a dense one and the products alone, shape by shape."""
    if quick:
        options = ["--shape", "16x8x16", "--repetitions", "2", "--dtype", "bfloat16", "--device", device]
    else:
        options = ["--device", device]
    parsed = pattention.parse([*options, "--seed", str(seed)])
    clock = exact_clock(device)[1]
    for shape in pattention.chosen_shapes(parsed):
        rows = pattention.measure(shape, parsed, clock)
        pattention.print_table(rows)
        yield from rows


def altup_rows(device: str, quick: bool, seed: int) -> Iterator[Row]:
    """Alternating updates beside the plain model, one as wide and the products alone; what is compiled without
    decoding, which is compiled once more."""
    sizes = ["--batch", "1", "--tokens", "16", "--repetitions", "2", "--widths", "64"]
    if not quick:
        sizes = ["--batch", "16", "--tokens", "2048", "--repetitions", "7", "--widths", "1024"]
    basic = ["plain", "recycled, K = 2", "dense, 2 times as wide"]
    clock = exact_clock(device)[1]
    for kind, names, decoded in (("eager", list(altup_cost.MODELS), 0 if quick else 32), ("compiled", basic, 0)):
        options = ["--device", device, "--dtype", "bfloat16", "--kinds", kind, "--decoded", str(decoded), *sizes]
        parsed = altup_cost.parse([*options, "--seed", str(seed), "--contenders", *(basic if quick else names)])
        (width,) = parsed.widths
        for row in altup_cost.measure(width, kind, parsed, clock):
            yield {**row, "layers": parsed.layers, "batch": parsed.batch, "tokens": parsed.tokens}


PARTS: dict[str, Callable[[str, bool, int], Iterator[Row]]] = {
    "tests": outcome_rows,
    "training": training_rows,
    "pattention": pattention_rows,
    "altup": altup_rows,
}
