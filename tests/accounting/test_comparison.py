"""Runs of one recipe with several seeds, put together."""

import json

import pytest

from auxin.accounting.comparison import Comparison, compare, mean_curve
from auxin.accounting.results import CurvePoint
from auxin.accounting.statistics import Estimate
from report.made_up_run import results, results_of_images, seeded


def points(*rows, stage="base"):
    return [CurvePoint(stage=stage, units=int(flops), flops=flops, seconds=flops, value=value) for flops, value in rows]


def test_curves_of_the_same_steps_are_averaged_point_by_point():
    found = mean_curve([points((1, 5.0), (2, 4.0), (3, None)), points((1, 7.0), (2, 4.0), (3, None))])
    assert [(point.flops, point.value) for point in found] == [(1, 6.0), (2, 4.0), (3, None)]
    assert found[0].half_width == Estimate.of([5.0, 7.0]).half_width
    assert found[1].half_width == 0.0
    assert found[2].half_width is None


def test_other_steps_are_read_between_measured_points_and_never_beyond():
    # A straight line read anywhere between its points is itself.
    coarse, fine = points((1, 9.0), (5, 5.0), (9, 1.0)), points((2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0))
    found = mean_curve([coarse, fine])
    assert [point.flops for point in found] == [2, 5, 8]
    assert [point.value for point in found] == pytest.approx([8.0, 5.0, 2.0])
    assert all(point.half_width == pytest.approx(0.0, abs=1e-9) for point in found)


def test_a_jump_between_stages_is_not_smoothed():
    one = points((1, 5.0), (2, 4.0)) + points((3, 9.0), (4, 8.0), stage="final")
    other = points((1, 5.0), (2.5, 4.0)) + points((3.5, 9.0), (4.5, 8.0), stage="final")
    for point in mean_curve([one, other]):
        low, high = (4.0, 5.0) if point.stage == "base" else (8.0, 9.0)
        assert low <= point.value <= high


def test_values_on_other_samples_are_not_read_between():
    # The first seed was resumed with larger evaluations: what it measured before lies on no line with the rest.
    resumed = points((1, 9.0), (3, 7.0)) + points((5, 50.0), (9, 10.0))
    resumed[:2] = [point.model_copy(update={"samples": 8}) for point in resumed[:2]]
    found = mean_curve([resumed, points((2, 80.0), (6, 40.0), (8, 20.0))])
    assert [(point.flops, point.value) for point in found if point.value is not None] == [(5, 50.0), (8, 20.0)]


def test_a_single_seed_has_no_interval_anywhere():
    comparison = compare([results()], "auxin run demo --seeds 0")
    for branch in comparison.branches:
        assert branch.value.half_width is None
        assert {point.half_width for point in branch.curve} == {None}
    assert comparison.main.difference is None


def test_branches_are_compared_seed_by_seed():
    runs = [seeded(0, 0.0, 0.0), seeded(1, 0.3, 0.01), seeded(2, -0.2, 0.02)]
    comparison = compare(runs, "auxin run demo --seeds 0 1 2")
    first = {branch.name: branch.value for branch in runs[0].branches}
    small = next(branch for branch in comparison.branches if branch.name == "small")
    gap = first["small"] - first["grown"]
    assert small.difference.mean == pytest.approx(gap + 0.01)
    assert small.difference.half_width == pytest.approx(Estimate.of([0.0, 0.01, 0.02]).half_width)
    # Not paired, the interval would be that of what the seeds shift.
    assert small.value.half_width > 10 * small.difference.half_width
    assert Comparison.parse(json.loads(comparison.model_dump_json())) == comparison


def test_every_measure_has_its_interval():
    runs = [results_of_images(), results_of_images()]
    runs[1] = with_loss_of_main(runs[1], 0.75).model_copy(update={"seed": 1})
    comparison = compare(runs, "")
    assert [measure.kind for measure in comparison.other_measures] == ["loss"]
    main, other = comparison.branches[0].measures["loss"], comparison.branches[1].measures["loss"]
    losses = [run.branches[0].measures["loss"] for run in runs]
    assert (main.mean, main.half_width) == (pytest.approx(sum(losses) / 2), Estimate.of(losses).half_width)
    assert other.half_width == 0
    # A mean of the others would hide that one was no number.
    runs[1] = with_loss_of_main(runs[1], None)
    assert compare(runs, "").branches[0].measures["loss"] is None


def with_loss_of_main(run, loss):
    main, *others = run.branches
    return run.model_copy(update={"branches": [main.model_copy(update={"measures": {"loss": loss}}), *others]})


def test_a_branch_is_compared_over_the_seeds_that_finished_it():
    runs = [seeded(0, 0.0, 0.0), seeded(1, 0.3, 0.01)]
    runs[1] = runs[1].model_copy(update={"branches": runs[1].branches[:1]})
    small = compare(runs, "").branches[1]
    assert small.seeds == [0]
    assert small.difference.count == 1
