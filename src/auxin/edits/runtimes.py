"""Which programs can load an edited checkpoint, and what to do about those that can't."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedConfig

from auxin.edits.kinds.module_edits import (
    ConfigureModule,
    RemoveModule,
    ReplaceModule,
    ResizeModule,
    TieParameters,
    WrapModule,
)
from auxin.edits.mark import REPLAY_METHOD
from auxin.edits.structure import structural_edits
from auxin.models.tokenformer.slots import ParameterTokensConfig
from auxin.models.weight_files import EDITED
from auxin.nn.bricks import find_brick


def about_runtimes(config: PreTrainedConfig, weights: str = EDITED) -> str:
    """What a person who wants to serve a model of `config` must know, in a few sentences; its weights lie in the file
    `weights`."""
    edits = structural_edits(config)
    if not edits:
        if isinstance(config, ParameterTokensConfig):
            return (
                "Loads in transformers after `import auxin`. Other runtimes have no TokenFormer, and no architecture "
                "of theirs computes what it does: serve it through transformers."
            )
        return "An ordinary checkpoint: config.json says all of it, and it loads without auxin."
    return (
        f"config.json keeps structural edits, under quant_method {REPLAY_METHOD!r}. vLLM and other runtimes refuse a "
        f"quant_method that they don't know. A form that they take, by kind of edit: {'; '.join(ways_out(edits))}. "
        f"{without_auxin(config, weights)}"
    )


def without_auxin(config: PreTrainedConfig, weights: str = EDITED) -> str | None:
    """What transformers does with a checkpoint of `config` where `auxin` is not imported, and what to do; None where
    the config holds no structural edits."""
    if not structural_edits(config):
        return None
    if isinstance(config, ParameterTokensConfig):
        return "In transformers, `import auxin` before from_pretrained: it knows no TokenFormer without it."
    before = "In transformers, `import auxin` before from_pretrained."
    if weights.startswith(EDITED):
        return (
            f"{before} Without it loading fails, since the weights lie in {weights}, which transformers does not look "
            "for. Don't rename the file: transformers would then return a model without these edits, another one than "
            "this, and only log that it doesn't know the quantization type."
        )
    return (
        f'{before} Without it transformers only logs "Unknown quantization type, got {REPLAY_METHOD}" and returns a '
        "model without these edits, another one than this. auxin.load and auxin.save make a folder that it refuses."
    )


def ways_out(edits: Iterable[Any]) -> Iterator[str]:
    """For each kind of edit, the way to a checkpoint without it, or why there is none."""
    bricks = Counter(edit.brick for edit in edits if isinstance(edit, ReplaceModule | WrapModule))
    for name, count in bricks.items():
        # A brick knows best; one that says nothing computes what no other module does.
        told = find_brick(name).plain_form
        reason = "none, for no module of the architecture computes what this one does; serve it through transformers"
        yield f"{name} ({count} edit(s)): {told or reason}"
    if any(isinstance(edit, RemoveModule) for edit in edits):
        yield "removed modules: none, since the architecture has them in every layer; serve it through transformers"
    if any(isinstance(edit, ConfigureModule) for edit in edits):
        yield (
            "modules with config values of their own: bring all layers to one width, for example with net2net and the "
            "largest intermediate_size there is; other values have no form that the config of these architectures knows"
        )
    if any(isinstance(edit, ResizeModule) for edit in edits):
        yield (
            "layers of a size of their own: none, since no value of the config says it; serve it through transformers"
        )
    if any(isinstance(edit, TieParameters) for edit in edits):
        yield "tied parameters: load the model, untie them by a copy, save it again without quantization_config"
