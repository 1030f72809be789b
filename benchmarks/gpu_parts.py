"""The parts of `gpu.py`: each yields its rows, as they are measured."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altup_cost
import pattention
from gpu_training import training_rows
from measuring import exact_clock

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def test_rows(device: str, quick: bool, seed: int) -> Iterator[Row]:
    """The tests that are marked `gpu`, by pytest; all of them are skipped where there is none."""
    # What forbids kernels that are not deterministic asks cuBLAS for its workspaces, before the first product.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, "tests/gpu"]
        result = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(result.stdout, flush=True)
        if result.returncode > 1 or not report.exists():
            raise RuntimeError(f"pytest ended with code {result.returncode}: {result.stdout.strip()[-500:]}")
        yield from junit_rows(report.read_text(encoding="utf-8"))


def junit_rows(text: str) -> Iterator[Row]:
    """What a JUnit file says of each test: passed, failed or skipped, and why."""
    for case in ElementTree.fromstring(text).iter("testcase"):
        told = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if told is None else "skipped" if told.tag == "skipped" else "failed"
        yield {
            "test": f"{case.get('classname')}.{case.get('name')}",
            "outcome": outcome,
            "seconds": float(case.get("time", 0)),
            "message": "" if told is None else told.get("message", ""),
        }


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
    "tests": test_rows,
    "training": training_rows,
    "pattention": pattention_rows,
    "altup": altup_rows,
}
