"""Which programs can load an edited checkpoint, and what to do about those that can't."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from auxin.edits.module_edits import RemoveModule, ReplaceModule, WrapModule
from auxin.edits.structure import REPLAY_METHOD, structural_edits
from auxin.models.tokenformer import TokenFormerConfig
from auxin.nn.bricks import find_brick


def about_runtimes(config: PreTrainedConfig) -> str:
    """What a person who wants to serve a model of `config` must know, in a few sentences."""
    edits = structural_edits(config)
    if not edits:
        if isinstance(config, TokenFormerConfig):
            return (
                "Loads in transformers after `import auxin`. Other runtimes have no TokenFormer, and no architecture "
                "of theirs computes what it does: serve it through transformers."
            )
        return "An ordinary checkpoint: config.json says all of it, and it loads without auxin."
    reasons = "; ".join(dict.fromkeys(_reasons(edits)))
    return (
        f"config.json keeps {len(edits)} structural edit(s), under quant_method {REPLAY_METHOD!r}: in transformers, "
        "`import auxin` before from_pretrained. vLLM and other runtimes refuse a quant_method that they don't know. "
        f"A form that they take: {reasons}."
    )


def _reasons(edits: Iterable[Any]) -> Iterable[str]:
    """For each kind of edit, the way to a checkpoint without it, or why there is none."""
    for edit in edits:
        if isinstance(edit, ReplaceModule | WrapModule):
            # A brick knows best; one that says nothing computes something that no other module does.
            told = getattr(find_brick(edit.brick), "plain_form", None)
            yield f"{edit.module} ({edit.brick}): " + (
                told
                or "none, for no module of the architecture computes what this one does; serve it through transformers"
            )
        elif isinstance(edit, RemoveModule):
            yield f"{edit.module} (removed): none, for the architecture always has it; serve it through transformers"
        else:
            yield f"{edit.parameter} (tied to {edit.to}): load the model, untie the two by a copy, save it again"
