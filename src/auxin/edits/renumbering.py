"""Plans that take tokens away, whose others get other ids (`Plan.kept_tokens`): the same text in old ids and in new
ones, and the generation config, which names tokens and is no part of the model's own config."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from auxin.accounting.inputs import DECODER_IDS, IDS
from auxin.data.tokenizer import has_tokenizer
from auxin.edits.plan import Plan
from auxin.edits.resolution import ResolvedPlan
from auxin.edits.tree import Undo
from auxin.errors import CheckpointError, PlanError
from auxin.files import write_text
from auxin.models.token_ids import named_ids, renumbered

GENERATION_CONFIG = "generation_config.json"


def check_kept_tokens(plan: Plan, resolved: ResolvedPlan) -> None:
    """PlanError when the plan's `kept_tokens` are not the old ids of as many tokens as the new model has."""
    if plan.kept_tokens is None:
        return
    old, new = (getattr(model.config.get_text_config(), "vocab_size", 0) for model in (resolved.before, resolved.after))
    if plan.kept_tokens[-1] >= old or len(plan.kept_tokens) != new:
        raise PlanError(
            f"kept_tokens of the plan of {plan.method} are {len(plan.kept_tokens)} ids up to {plan.kept_tokens[-1]}, "
            f"but the model has {old} tokens before and {new} after it. Correct the plan, or plan again."
        )


def refuse_old_tokenizer(plan: Plan, folder: Path) -> None:
    """PlanError when the plan gives tokens other ids and the tokenizer in `folder` would go on with the old ones."""
    if plan.kept_tokens is not None and has_tokenizer(folder) and not any(file.into for file in plan.files):
        raise PlanError(
            f"The plan of {plan.method} gives tokens other ids, and the tokenizer in {folder} would go on with the old "
            "ones. Make the plan for this folder, so that the tokenizer follows, or take its files out first."
        )


def with_kept_tokens(probe: dict[str, Tensor], kept: Sequence[int], config: PreTrainedConfig) -> dict[str, Tensor]:
    """The probe, in old ids, with tokens that go replaced by some that stay and that `config` does not name."""
    named = set[int]().union(*named_ids(vars(config)).values(), *named_ids(vars(config.get_text_config())).values())
    free = torch.tensor([old for old in kept if old not in named] or kept)
    replaced = {
        name: torch.where(_new_ids(probe[name], kept) < 0, free[probe[name] % len(free)], probe[name])
        for name in probe.keys() & {IDS, DECODER_IDS}
    }
    return probe | replaced


def in_new_ids(probe: dict[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """The probe, which is in old ids, in new ones.

    Raises:
        PlanError: it has a token that goes.
    """
    changed = {}
    for name in probe.keys() & {IDS, DECODER_IDS}:
        new = _new_ids(probe[name], kept)
        if (new < 0).any():
            raise PlanError(
                f"The probe's {name} hold the token {int(probe[name][new < 0][0])}, which the plan takes away. Give a "
                "probe of tokens that stay, in their old ids."
            )
        changed[name] = new.to(probe[name].dtype)
    return probe | changed


def _new_ids(ids: Tensor, kept: Sequence[int]) -> Tensor:
    """The new ids of old ones; -1 for tokens that go."""
    old = torch.tensor(kept, device=ids.device)
    places = torch.searchsorted(old, ids).clamp(max=len(old) - 1)
    return torch.where(old[places] == ids, places, -1)


def generation_changes(plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    """What becomes another value in the generation config of `model`, which is as before the plan.

    Raises:
        PlanError: it names a token that goes.
    """
    config = getattr(model, "generation_config", None)
    return _changed(plan, vars(config), model.config) if isinstance(config, GenerationConfig) else {}


def change_generation(model: PreTrainedModel, values: dict[str, Any], undo: Undo) -> None:
    """Put `values` into the generation config of `model`."""
    for name, value in values.items():
        undo.set(vars(model.generation_config), name, value)


def new_generation_file(plan: Plan, folder: Path, config: PreTrainedConfig) -> str | None:
    """The content of the new generation_config.json for that in `folder`; None where it stays, or there is none.

    Args:
        plan: the plan.
        folder: of the model before.
        config: of the model before.

    Raises:
        CheckpointError: it can't be read.
        PlanError: it names a token that goes.
    """
    if plan.kept_tokens is None:
        return None
    values = generation_values(folder)
    changed = _changed(plan, values, config)
    return json.dumps({**values, **changed}, indent=2, sort_keys=True) + "\n" if changed else None


def generation_values(folder: Path) -> dict[str, Any]:
    """What the generation_config.json in `folder` holds; nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Mend it, or remove it.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object. Mend it, or remove it.")
    return values


def write_generation_file(folder: Path, content: str | None) -> None:
    """Write what `new_generation_file` gave, if anything."""
    if content is not None:
        write_text(folder / GENERATION_CONFIG, content)


def _changed(plan: Plan, values: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    if plan.kept_tokens is None:
        return {}
    new_ids = {old: new for new, old in enumerate(plan.kept_tokens)}
    return renumbered(values, new_ids, int(config.get_text_config().vocab_size), "The generation config")
