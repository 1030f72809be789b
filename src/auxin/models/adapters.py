"""Models that carry a PEFT adapter (`model.add_adapter`), and what they are without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from transformers import PreTrainedModel

from auxin.accounting.shapes import shape_only_copy

_KEPT_AS = ("base_layer", "original_module")
"""As what peft's modules keep the module that they stand for."""


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` writes an adapter in place of the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within the context, `model` as it was before its adapter, without data; itself where it has none. A module that
    an adapter works on has the same path in both."""
    if not has_adapter(model):
        yield model
        return
    with shape_only_copy(model) as copied:
        copy = cast(PreTrainedModel, copied)
        for path, module in list(copy.named_modules()):
            kept = next((module._modules[name] for name in _KEPT_AS if name in module._modules), None)
            if kept is not None:
                copy.set_submodule(path, kept)
        yield copy
