"""Words that recipes had before, and what says the same today."""

from typing import Any

FORMER_HOOKS = {
    "tau_anneal_steps": "{kind: tau_anneal, steps: ...}",
    "old_tokens_rate": "{kind: old_token_rates, ratio: ...}",
    "old_rate": "{kind: old_rates, ratio: ...}",
    "old_rate_steps": "{kind: old_rates, ratio: ..., steps: ...}",
    "exact_rates": "{kind: exact_rates}",
}
"""Fields that train stages had, and what says the same."""


def former_words(values: Any) -> list[str]:
    """What a recipe's `values`, not validated yet, say in former words, with the new ones."""
    if not isinstance(values, dict):
        return []
    found = ["corpus: is called data now. Write data: in its place"] if "corpus" in values else []
    for branch in _mappings(values.get("branches")):
        for stage in _mappings(branch.get("stages")):
            found += _in_stage(stage, f"{branch.get('name')}/{stage.get('name') or stage.get('kind')}")
    return found


def _in_stage(stage: dict[str, Any], place: str) -> list[str]:
    """What `stage` says in words that recipes had before, with the new ones."""
    found = []
    if stage.get("kind") == "grow":
        found.append(
            f"{place}: the stage kind 'grow' is called 'change' now. Write kind: change (a stage without a name is "
            "then called change too)"
        )
    found += [
        f"{place}: {name}: hooks are data now. Write hooks: [{hook}] in its place"
        for name, hook in FORMER_HOOKS.items()
        if name in stage
    ]
    return found


def _mappings(values: Any) -> list[dict[str, Any]]:
    """The mappings in a list that may be none."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
