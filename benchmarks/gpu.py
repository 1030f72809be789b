"""Every check of the project that needs a GPU, in less than eight minutes.

    python benchmarks/gpu.py                              all parts; writes the results and their page
    python benchmarks/gpu.py --parts tests training       some of them; the others' results stay
    python benchmarks/gpu.py --quick --output FOLDER      a rehearsal on the CPU, everything tiny; see below

Nobody has run it on a GPU yet: whether all parts are done there before they are cut off is not known.

The parts, in the order of what matters most, each with a time of its own, within which it is cut off; what one leaves
of its time the next ones have:

- tests: those marked `gpu`, by pytest
- training: steps of TokenFormer 124M and 354M and of a dense GPT-2 of 124M, eager and compiled, bfloat16: time, model
  FLOPs utilisation, memory beside what `auxin run --dry-run` tells, and the products of matrices alone
- pattention: the layer beside a dense one, eager and compiled, and the products alone
- altup: alternating updates beside the plain model and a dense one twice as wide, and the products alone

Each runs in a process of its own, and what it has found is written when it ends, however it ends: a run that is killed
leaves the parts before. With all parts done and no test failed the exit code is 0, else 1.

A rehearsal runs the same code on the CPU, without compiling. It writes gpu-quick.json and gpu-quick.md, which say what
they are, into the folder of --output alone.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_page import page_of
from gpu_parts import PARTS
from measuring import made_by, write_results

from auxin.errors import AuxinError, ConfigError
from auxin.files import make_folder, write_text
from auxin.interruption import ended_by_signals

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
SECONDS = {"tests": 100.0, "training": 190.0, "pattention": 95.0, "altup": 75.0}
"""Of each part; together less than eight minutes."""
GRACE = 5.0
"""Seconds from asking a process to end to ending it."""


def start(part: str, rows: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process, at the head of a group of its own, that measures a part and writes its rows to a file."""
    command = [sys.executable, str(Path(__file__).resolve()), "--take", part, "--rows", str(rows)]
    command += ["--seed", str(options.seed), *(["--quick"] if options.quick else [])]
    # What it leaves behind when it is killed lies where this process removes it.
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "TMPDIR": str(rows.parent)})


def ended(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How a process ended, in words: "done", its code, or that so many seconds were too few for it."""
    began = time.monotonic()
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return f"cut off after {time.monotonic() - began:.0f} s"
    return "done" if code == 0 else f"ended with code {code}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, where it has not ended, and whatever it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def found_in(rows: Path) -> dict[str, Any]:
    """What a part has written so far."""
    return json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else {"rows": []}


def take(part: str, rows: Path, quick: bool, seed: int) -> int:
    """Measure a part in this process, writing all rows so far after each."""
    device = "cpu" if quick else "cuda"
    found: dict[str, Any] = {**made_by(command_line(quick, [part])), "device": device, "quick": quick, "rows": []}
    if device == "cuda":
        found["versions"] |= {"CUDA": str(torch.version.cuda)}
    write_text(rows, json.dumps(found))
    try:
        # Compiling on a CPU takes a compiler and a minute, and would show nothing of a GPU.
        with torch.compiler.set_stance("force_eager" if quick else "default"):
            for row in PARTS[part](device, quick, seed):
                print(part, row, flush=True)
                found["rows"].append(row)
                write_text(rows, json.dumps(found))
    except Exception as error:
        traceback.print_exc()
        write_text(rows, json.dumps({**found, "failed": f"{type(error).__name__}: {error}"[:500]}))
        return 1
    return 0


def command_line(quick: bool, parts: Iterable[str]) -> str:
    """What one gives to get the figures of some parts."""
    return " ".join(["python benchmarks/gpu.py", *(["--quick"] if quick else []), "--parts", *parts])


def measured(options: argparse.Namespace, results: dict[str, Any], write: Callable[[], None]) -> None:
    """Run the parts that are asked for one after the other, and write after each."""
    until = time.monotonic()
    for part in options.parts:
        until += SECONDS[part] * options.scale
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="auxin-gpu-") as work:
            rows = Path(work) / "rows.json"
            process = start(part, rows, options)
            how = "interrupted"
            try:
                how = ended(process, until - time.monotonic())
            finally:
                stop(process)
                found = {**found_in(rows), "ended": how, "seconds": time.monotonic() - began}
                results["parts"][part] = found
                write()
        print(f"{part}: {how}, {len(found['rows'])} rows, {found['seconds']:.0f} s", flush=True)


def went_well(parts: Sequence[dict[str, Any]]) -> bool:
    """Whether each of these parts was done and no test failed."""
    failed = [row for part in parts for row in part["rows"] if row.get("outcome") == "failed"]
    return all(part["ended"] == "done" for part in parts) and not failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--quick", action="store_true", help="a rehearsal on the CPU; needs --output")
    parser.add_argument("--output", type=Path, help="folder for both files; default: the repository's own two")
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="for all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--take", choices=list(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick and options.output is None and options.take is None:
        parser.error("--quick: a rehearsal's figures are none of a GPU. Give --output FOLDER to put them apart.")
    if not 0 <= options.seconds < float("inf"):
        parser.error(f"--seconds: {options.seconds:g} is no time. Give 0 or more.")
    options.parts = [part for part in SECONDS if part in options.parts]
    options.scale = options.seconds / sum(SECONDS[part] for part in options.parts)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write."""
    options = parse(arguments)
    if options.take is not None:
        return take(options.take, options.rows, options.quick, options.seed)
    if not options.quick and not torch.cuda.is_available():
        print(
            "device: torch finds no CUDA device. Run this where there is one, or give --quick --output FOLDER for a "
            "rehearsal on the CPU.",
            file=sys.stderr,
        )
        return 2
    name = "gpu-quick" if options.quick else "gpu"
    path = (options.output or RESULTS) / f"{name}.json"
    page = (options.output or PAGES) / f"{name}.md"
    try:
        for file in (path, page):
            make_folder(file.parent)
        results: dict[str, Any] = {"quick": options.quick, "parts": known_parts(path)}
        with ended_by_signals():
            measured(options, results, lambda: write_results(results, path, page_of(results), page))
    except AuxinError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"written to {path} and {page}", flush=True)
    return 0 if went_well([results["parts"][part] for part in options.parts]) else 1


def known_parts(path: Path) -> dict[str, Any]:
    """What is known of each part from before; ConfigError where the file is another one."""
    if not path.exists():
        return {}
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (ValueError, KeyError, TypeError):
        parts = None
    if not isinstance(parts, dict):
        raise ConfigError(f"{path} holds no results of this script. Move it, or give another --output.")
    return parts


if __name__ == "__main__":
    sys.exit(main())
