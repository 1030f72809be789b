"""Several real processes that train together, for the tests of what they learn."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.servers import served

Run = Callable[..., dict]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Ask the server for a run."""
    with served("ranks_server.py") as ask:
        yield lambda folder, size, scenario="train", **request: ask(
            {**request, "folder": str(folder), "size": size, "scenario": scenario}
        )


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a finished training by so many processes; each is done once."""
    done: dict[str, Path] = {}

    def of(size: int, model: str, **request: object) -> Path:
        key = json.dumps([size, model, request], sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp("trained") / "run"
            answer = run(folder, size, model=model, **request)
            assert answer["codes"] == [0] * size, answer["messages"]
            done[key] = folder
        return done[key]

    return of
