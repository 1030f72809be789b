"""What every test needs: no network, one thread, hypothesis without deadlines (the machine may be busy)."""

import os

os.environ.pop("COLUMNS", None)  # test processes side by side get the width of a terminal that is none
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import hypothesis
import pytest
import torch

GPU_TESTS = Path(__file__).parent / "on_gpu"

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "auxin",
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    # Continuous integration judges a change, not the luck of a draw; every other run explores.
    derandomize="CI" in os.environ,
)
hypothesis.settings.load_profile("auxin")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is kept for the next time is kept for the next test, and not for the user's next command."""
    os.environ["AUXIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests marked `whole`: see tests/covering.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all, leave out what is marked `whole`; without a GPU, skip what needs one."""
    for item in items:
        if item.get_closest_marker("gpu"):
            if GPU_TESTS not in item.path.parents:  # where benchmarks/gpu.py looks for them
                raise pytest.UsageError(f"{item.nodeid} is marked gpu: put it into {GPU_TESTS}.")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("whole")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("whole")]
