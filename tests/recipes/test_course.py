"""A run says which stage of how many it is at, what comes after it, and how often its data is gone through."""

import pytest

from auxin.accounting import Ledger, StageRecord
from auxin.recipes import price_recipe
from auxin.recipes.course import Course
from auxin.recipes.folder import OUTCOME_FILE, stage_directory
from corpora import write_documents
from recipes.test_runner import tiny_recipe
from training.tiny import CONTEXT, TinyData


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    recipe = tiny_recipe(write_documents(folder / "corpus", documents=2))
    return Course.of(recipe, folder / "out", price_recipe(recipe, memory=False))


def stage_of(course, branch, stage):
    found = course.recipe.branch(branch)
    return found, next(one for one in found.stages if one.name == stage)


def test_a_stage_knows_its_number_and_what_comes_after(course):
    prices = {(price.branch, price.stage): price.flops for price in course.stages}
    order = list(prices)
    for index, (branch, stage) in enumerate(order):
        place = course.place(*stage_of(course, branch, stage))
        assert (place.number, place.total) == (index + 1, len(order))
        assert place.flops_after == pytest.approx(sum(prices[key] for key in order[index + 1 :]))
    part = course.of_branches(["grown"]).place(*stage_of(course, "grown", "base"))
    assert (part.number, part.total) == (2, 5)


def test_what_is_done_already_does_not_come_after(course):
    branch, stage = stage_of(course, "scratch", "train")
    before = course.place(*stage_of(course, "grown", "base")).flops_after
    folder = stage_directory(course.directory, branch, stage)
    folder.mkdir(parents=True)
    (folder / OUTCOME_FILE).touch()
    done = next(price.flops for price in course.stages if (price.branch, price.stage) == ("scratch", "train"))
    assert course.place(*stage_of(course, "grown", "base")).flops_after == pytest.approx(before - done)


def test_the_start_of_a_stage_counts_the_passes_over_the_data(course):
    # 6 steps of 4 contexts are 24 of the 48 that there are; 96 have been seen in an earlier stage.
    data = TinyData(contexts=48)
    seen = StageRecord(name="before", kind="train", parameters=1, units=96 * CONTEXT, data_fingerprint="f1")
    other = seen.model_copy(update={"data_fingerprint": "f2"})
    looked = seen.model_copy(update={"kind": "change"})
    base = stage_of(course, "grown", "base")
    start = "base: stage 2 of 8, 6 steps, 384 tokens: 0.5 passes over the 768 tokens to learn from"
    assert course.describe_start(*base, data, Ledger(stages=[other, looked])) == start
    assert (
        course.describe_start(*base, data, Ledger(stages=[other, seen])) == f"{start}, after 2 passes in earlier stages"
    )
    assert "1 pass over" in course.describe_start(*base, TinyData(contexts=24), Ledger())
