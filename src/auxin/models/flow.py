"""Which modules read what another one gives, as it is: found by a run on shapes, in any architecture."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.models.places import running_on_shapes
from auxin.nn.calls import first_argument


@dataclass(frozen=True)
class Flow:
    """What every module of a model read and gave, its first tensor each; those that did not run are left out."""

    read: dict[str, Tensor]
    given: dict[str, Tensor]
    alone: frozenset[str]
    """The modules without modules in them."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """That of `model`, in evaluation mode; weights are not looked at.

        Raises:
            PlanError: no inputs are known that it runs on.
        """
        read: dict[str, Tensor] = {}
        given: dict[str, Tensor] = {}

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                first = output[0] if isinstance(output, tuple) and output else output
                taken = first_argument(args, kwargs) if args or kwargs else None
                for found, tensor in ((read, taken), (given, first)):
                    if isinstance(tensor, Tensor):
                        found[path] = tensor

            return hook

        with running_on_shapes(model) as (copy, inputs):
            for path, module in copy.named_modules():
                module.register_forward_hook(note(path), with_kwargs=True)
            copy(**inputs)
        alone = (path for path, module in model.named_modules() if not any(True for _ in module.children()))
        return cls(read, given, frozenset(alone))

    def readers(self, path: str) -> list[str]:
        """The innermost modules that read what the module at `path` gives, and all of it."""
        if path not in self.given:
            return []
        return [other for other in self.read if other in self.alone and other != path and self._same(path, other)]

    def width(self, path: str) -> int | None:
        """The last axis of what the module at `path` gives; None where it did not run."""
        return self.given[path].shape[-1] if path in self.given else None

    def _same(self, path: str, other: str) -> bool:
        one, two = self.given[path], self.read[other]
        return one.shape == two.shape and one.untyped_storage()._cdata == two.untyped_storage()._cdata
