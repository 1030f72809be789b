"""The ledger sums what stages cost, survives a round trip and is never half-written."""

import math

import pytest

from auxin.accounting import Ledger, StageRecord
from auxin.errors import CheckpointError, ConfigError


def stage(name="train", **values):
    return StageRecord(name=name, kind="train", parameters=10, **values)


def test_a_child_carries_its_ancestors_costs():
    parent = Ledger().append(stage(units=100, flops=6e3, seconds=1.5))
    child = parent.append(stage(units=50, flops=9e3, seconds=2.0))
    assert (child.total_units(), child.total_flops, child.total_seconds) == (150, 15e3, 3.5)
    assert parent.total_units() == 100


def test_units_of_one_kind_are_added_up_alone():
    ledger = Ledger().append(stage(units=100)).append(stage(units=7, unit="image")).append(stage(units=20))
    assert (ledger.total_units(), ledger.total_units("image"), ledger.total_units("example")) == (120, 7, 0)


def test_round_trip(tmp_path):
    ledger = Ledger().append(stage(value_before=2.0, value_after=1.5, seed=3, notes=["skipped step 7"]))
    ledger.save(tmp_path)
    assert Ledger.load(tmp_path) == Ledger.load(tmp_path / "ledger.json") == ledger
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_a_measure_that_is_no_number_is_read_as_none(tmp_path):
    # JSON has no NaN; a branch of broken numbers must not take away the books of the others.
    Ledger().append(stage(value_after=math.nan, measures={"loss": math.nan, "accuracy": 0.5})).save(tmp_path)
    last = Ledger.load(tmp_path).stages[-1]
    assert (last.value_after, last.measures) == (None, {"loss": None, "accuracy": 0.5})


def test_versions_are_recorded():
    assert set(stage().versions) == {"auxin", "python", "torch", "transformers"}


def test_a_missing_a_broken_and_a_foreign_ledger_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Ledger.load(tmp_path)
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Ledger.load(tmp_path)
    (tmp_path / "ledger.json").write_text('{"stage": []}')
    with pytest.raises(ConfigError, match="Did you mean 'stages'"):
        Ledger.load(tmp_path)
