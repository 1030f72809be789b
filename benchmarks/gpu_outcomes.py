"""A plugin of pytest: appends the outcome of each test, as soon as it is known, to the file named in AUXIN_OUTCOMES."""

import json
import os
from pathlib import Path

import pytest

LONGEST = 1000
"""Characters of a message: a line is written at once, so that whoever reads along sees none by halves."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line of JSON for a test that has run, was skipped, or failed before or behind its run."""
    # With several workers the one that leads hears of every test.
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-300:]
    message = reason.removeprefix("Skipped: ") if crash is None else crash.message
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "message": message[:LONGEST]}
    with Path(os.environ["AUXIN_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
