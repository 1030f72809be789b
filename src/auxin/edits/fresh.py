"""Values of parameters that have no old ones to come from."""

import copy

import torch
from torch import Tensor, nn

from auxin.edits.kinds.parameter_edits import generator
from auxin.edits.origin import Fresh, Origin
from auxin.edits.resolution import ResolvedPlan
from auxin.models.loading import initialisers


class FreshValues:
    """Fills and initial values of the fresh tensors of a resolved plan; the same bits for the same seed and name."""

    def __init__(self, resolved: ResolvedPlan, seed: int) -> None:
        self._after, self._seed = resolved.after, seed
        self._tensors: dict[str, Tensor] = dict(resolved.after.named_parameters()) | dict(
            resolved.after.named_buffers()
        )
        self._initialised: dict[str, dict[str, Tensor]] = {}

    def placeholder(self, name: str) -> Tensor:
        """The tensor called `name` in the new model's skeleton."""
        return self._tensors[name]

    def value(self, name: str, origin: Origin) -> Tensor:
        """The values of the fresh tensor called `name`, on the CPU."""
        placeholder = self._tensors[name]
        if not placeholder.is_meta:
            return placeholder.detach().clone()
        assert isinstance(origin.source, Fresh)
        if origin.source.fill is None:
            return self._initial(name)
        new = torch.empty(placeholder.shape, dtype=placeholder.dtype)
        origin.source.fill.write(new, 0, 0, generator(self._seed, name, ()))
        return new

    def _initial(self, name: str) -> Tensor:
        """As the architecture initialises it: by the model's own rule, with everything around it in the same layer."""
        path = self._layer(name)
        if path not in self._initialised:
            layer = copy.deepcopy(self._after.get_submodule(path)).to_empty(device="cpu")
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.random.default_generator.manual_seed(generator(self._seed, path, ()).initial_seed())
                for parameter in layer.parameters():
                    parameter.zero_()
                for module, holder in initialisers(self._after, path, layer):
                    holder._init_weights(module)
            self._initialised[path] = dict(layer.named_parameters())
        return self._initialised[path][name[len(path) + 1 :]].detach()

    def _layer(self, name: str) -> str:
        """Path of the outermost layer that holds the tensor called `name`; its module where there is none."""
        parts = name.split(".")
        for length in range(1, len(parts)):
            above = self._after.get_submodule(".".join(parts[:length]))
            if isinstance(above, nn.ModuleList):
                return ".".join(parts[: length + 1])
        return ".".join(parts[:-1])
