"""What tests of data share."""

import pytest

from auxin.data.shards_ahead import ShardsAhead


@pytest.fixture
def nobody_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process that works ahead, for tests in which it would take longer to start than all the rest."""
    monkeypatch.setattr(ShardsAhead, "ask", lambda self, shards: None)
