"""What a plan must have changed to be worth its method's intent; a promise alone is kept by doing nothing."""

from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel

from auxin.planning.method import Intent


@dataclass(frozen=True)
class Figures:
    """What the intents speak of, taken from a model."""

    parameters: int
    """Entries, tied ones once."""
    nonzero: int
    """Those that are not zero; pruning may leave the others where they are."""
    bytes: int
    """Of parameters and buffers."""
    structure: frozenset[tuple[str, ...]]
    """The modules with their classes, the parameters with their shapes."""
    trainable: frozenset[str]
    """Names of the parameters that training moves."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        parameters = dict(model.named_parameters())
        modules = {(name, type(module).__qualname__) for name, module in model.named_modules()}
        shapes = {(name, str(tuple(parameter.shape))) for name, parameter in parameters.items()}
        tensors = [*parameters.values(), *model.buffers()]
        return cls(
            parameters=sum(parameter.numel() for parameter in parameters.values()),
            nonzero=sum(int(parameter.count_nonzero()) for parameter in parameters.values()),
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            structure=frozenset(modules | shapes),
            trainable=frozenset(name for name, parameter in parameters.items() if parameter.requires_grad),
        )


def missed(intent: Intent, old: Figures, new: Figures, change: float) -> str | None:
    """What a plan of `intent` failed to do; None if nothing.

    Args:
        intent: what the method is for.
        old: the model before.
        new: the model after.
        change: of the logits, relative to the old ones.
    """
    other_structure, other_function = new.structure != old.structure, change > 0
    done, aim = {
        "grow": (new.parameters > old.parameters, "has no more parameters than before"),
        "prune": (new.nonzero < old.nonzero, "has no fewer parameters other than zero than before"),
        "factorize": (new.parameters < old.parameters, "has no fewer parameters than before"),
        "moe": (other_structure, "has the same modules as before"),
        "quantize": (new.bytes < old.bytes, "takes no fewer bytes than before"),
        "restructure": (other_structure or other_function, "has the same modules and the same function as before"),
        "adapt": (
            other_structure or other_function or new.trainable != old.trainable,
            "has the same modules, the same function and trains the same parameters as before",
        ),
    }[intent]
    return None if done else f"the intent is {intent!r}, but the model {aim}"
