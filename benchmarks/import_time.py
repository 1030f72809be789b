"""What `import auxin` costs beyond what it needs of transformers.

Registering architectures needs the Auto classes, loading edited models the registry of quantizers; both are imported
whatever Auxin does. Each line is the best of several fresh processes, wall time within the process from its first
statement to its last, so that the start of the interpreter is not in it.

    python benchmarks/import_time.py --processes 7
"""

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version

from auxin.accounting.machine import describe_machine

AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"
REGISTRY = f"{AUTO}; from transformers.quantizers import auto"
COMMAND_LINE = "import sys; sys.argv = ['auxin', '--version']; from auxin.cli import main; main()"
PROGRAMS = {
    "transformers' Auto classes": AUTO,
    "the same and its registry of quantizers": REGISTRY,
    "`import auxin`": "import auxin",
    "`import auxin`, and the first use of its face": "import auxin; auxin.plan",
    "`auxin --version`": COMMAND_LINE,
}
TIMED = """
import atexit, time
start = time.perf_counter()
atexit.register(lambda: print(time.perf_counter() - start))
{program}
"""


def seconds(program: str) -> float:
    """Wall time of `program` in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(program=program)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{program}\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, in turns so that what slows the machine slows all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=7, help="fresh processes for each line; the best counts")
    processes = parser.parse_args().processes
    rounds = [{name: seconds(program) for name, program in PROGRAMS.items()} for _ in range(processes)]
    best = {name: min(measured[name] for measured in rounds) for name in PROGRAMS}
    print("| imported | seconds |\n|---|--:|")
    for name, value in best.items():
        print(f"| {name} | {value:.2f} |")
    needed, taken = (best[name] for name in list(PROGRAMS)[1:3])
    print(f"\n`import auxin` costs {taken - needed:.2f} s beyond what it needs of transformers.")
    machine = ", ".join(f"{what} {value}" for what, value in describe_machine().items())
    print(f"{machine}; Python {platform.python_version()}, transformers {version('transformers')}")


if __name__ == "__main__":
    main()
