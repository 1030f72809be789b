"""A run whose files are damaged ends in the bits it would have had, or in an error that names the file.

The cases are drawn from all moments, files and harms of `recipes.damage`; AUXIN_DAMAGED=1000 tries them all (half an
hour), and AUXIN_DAMAGE_SEED=1 draws others, with other bytes and values harmed.
"""

import os

import pytest

from recipes.damage import HARMS, Case, Workshop

NUMBER = int(os.environ.get("AUXIN_DAMAGED", "4"))
SEED = int(os.environ.get("AUXIN_DAMAGE_SEED", "0"))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("damage"))


def drawn(workshop: Workshop) -> list[Case]:
    """As many cases as asked for, the harms in turn."""
    by_harm = {harm.name: [case for case in workshop.cases(SEED) if case.harm is harm] for harm in HARMS}
    longest = max(len(cases) for cases in by_harm.values())
    return [cases[n] for n in range(longest) for cases in by_harm.values() if n < len(cases)]


def test_damage_is_mended_or_named(workshop):
    tried = 0
    for case in drawn(workshop):
        outcome = workshop.outcome(case)
        if outcome is not None:
            assert outcome[0] in ("same", "named"), f"{case}: {outcome[1]}"
            tried += 1
        if tried == NUMBER:
            break


# Those that went on to other bits, or ended in a traceback, before files had sums.
KNOWN = [
    ("train stage to resume", "model.safetensors", "another step's"),
    ("trained, before growth", "training/state.safetensors", "another step's"),
    ("corpus", "train.npy", "a bit flipped"),
    ("grown, before training", "ledger.json", "another step's"),
]


@pytest.mark.parametrize(("moment", "file", "name"), KNOWN)
def test_damage_that_was_not_noticed(workshop, moment, file, name):
    harm = next(harm for harm in HARMS if harm.name == name)
    outcome = workshop.outcome(Case(moment, file, harm, 0))
    assert outcome is not None
    assert outcome[0] == ("named" if moment == "corpus" else "same"), outcome[1]
