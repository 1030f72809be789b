"""Asks the servers that run trainings in forked processes of their own: fork_server.py and ranks_server.py."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
SOURCES = Path(__file__).parents[2] / "src"


@contextlib.contextmanager
def served(script: str) -> Iterator[Callable[[dict], dict]]:
    """Within the context, the server of that file in this folder answers requests."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCES), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(TESTS / "training" / script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(request: dict) -> dict:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
