"""Which way is tried next: every method alone first, then what a tree-structured Parzen estimator expects most of.

The search is optuna's. Each suggestion is drawn from a seed of its own and from the trials so far, so that a search
that was stopped goes on as if it had not been.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from auxin.errors import ConfigError
from auxin.shrinking.candidates import NONE, SHARES, Candidate, Space
from auxin.shrinking.trials import Trial

ATTEMPTS = 50
"""Suggestions that are drawn until one is new; where none is, the search has seen all."""
STARTUP = 10
"""Trials before the estimator is asked; until then chance draws."""


def refuse_without_optuna() -> None:
    """ConfigError where the library is missing that searches."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("The search needs the package optuna. Install it: pip install 'auxin[shrink]'.")


def candidates(
    space: Space, trials: list[Trial], seed: int, wanted: int, may_begin: Callable[[], bool] = lambda: True
) -> Iterable[Candidate]:
    """What to try next, one after the other; each trial is in `trials` before the next is asked for.

    Args:
        space: of the ways.
        trials: those that are done.
        seed: of the search.
        wanted: trials in all.
        may_begin: whether there is time for another one.
    """
    plain = list(space.plain())
    while len(trials) < wanted and may_begin():
        found = plain[len(trials)] if len(trials) < len(plain) else _suggested(space, trials, seed)
        if found is None:
            return
        yield found


def _suggested(space: Space, trials: list[Trial], seed: int) -> Candidate | None:
    """A way that was not tried; None where none is found."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces: dict[str, Any] = {}
    for kind in space.kinds:
        spaces[kind] = optuna.distributions.CategoricalDistribution([NONE, *space.choices[kind]])
        spaces[f"{kind}_share"] = optuna.distributions.FloatDistribution(*SHARES)
    known = [trial.steps for trial in trials]
    study = optuna.create_study(direction="minimize")
    for trial in trials:
        parameters = space.parameters(trial.candidate)
        refused = trial.loss is None
        study.add_trial(
            optuna.trial.create_trial(
                params=parameters,
                distributions={name: spaces[name] for name in parameters},
                value=trial.loss,
                # Of what was pruned the estimator knows that it is worse than all that was measured.
                state=optuna.trial.TrialState.PRUNED if refused else optuna.trial.TrialState.COMPLETE,
            )
        )
    for attempt in range(ATTEMPTS):
        drawn = (seed * 1_000_003 + len(trials) * ATTEMPTS + attempt) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=STARTUP)
        asked = study.ask()
        parameters = {}
        for kind in space.kinds:
            parameters[kind] = asked.suggest_categorical(kind, spaces[kind].choices)
            if parameters[kind] != NONE:
                parameters[f"{kind}_share"] = asked.suggest_float(f"{kind}_share", *SHARES)
        candidate = space.candidate(parameters)
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        if candidate is not None and candidate.dump() not in known:
            return candidate
    return None
