"""INT8 that is computed in integers, by torchao (`pip install "auxin[torchao]"`), beside what is simulated."""

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auxin.analysis.measurement import Batch, samples_of
from auxin.analysis.quantized_losses import Losses, Quantized
from auxin.errors import ConfigError, PlanError
from auxin.models.evaluating import evaluating

RealScheme = Literal["w8a8", "w8"]
_CONFIGS = {"w8": "Int8WeightOnlyConfig", "w8a8": "Int8DynamicActivationInt8WeightConfig"}
"""torchao's names: each output of a weight has a grid, and with a8 each token of what a layer reads."""
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In which torchao takes a weight."""
FLOAT = "nothing"


class RealModels:
    """Copies of a model that torchao has quantized, and what they give.

    Args:
        model: it is left as it is.
        schemes: which copies are made; each takes a model's memory.
        layers: the linear layers of `model` to quantize.
        plain: losses in floating point, of the samples that are added.

    Raises:
        ConfigError: torchao is not installed.
        PlanError: there are no such layers, as in GPT-2, whose matrices are of another class, or they are in float64.
    """

    def __init__(
        self, model: PreTrainedModel, schemes: Sequence[RealScheme], layers: Collection[nn.Linear], plain: Losses
    ) -> None:
        self.weights = len(layers) if schemes else 0
        """How many weights are quantized."""
        self._models = {FLOAT: model} if schemes else {}
        self._models |= {scheme: _quantized(model, scheme, layers) for scheme in schemes}
        self._losses: dict[str, Losses] = {scheme: Losses(model, plain) for scheme in schemes}
        self._times: dict[str, list[float]] = {name: [] for name in self._models}

    def add(self, batch: Batch, inputs: Mapping[str, Tensor], whole: Any) -> None:
        """Run all of them on a batch, whose output in floating point is `whole`."""
        for name, model in self._models.items():
            with evaluating(model):
                began = time.perf_counter()
                output = model(**inputs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self._times[name].append((time.perf_counter() - began) / samples_of(batch))
            if name != FLOAT:
                self._losses[name].add(batch, output, whole)

    def found(self) -> list[Quantized]:
        """What was found of each scheme."""
        return [losses.found(scheme) for scheme, losses in self._losses.items()]

    def seconds(self) -> dict[str, float]:
        """What a sample took in the fastest batch, by scheme; "nothing" is the model as it is."""
        return {name: min(times) for name, times in self._times.items()}


def _quantized(model: PreTrainedModel, scheme: RealScheme, layers: Collection[nn.Linear]) -> PreTrainedModel:
    if find_spec("torchao") is None:
        raise ConfigError('real = ["w8", ...] needs torchao: pip install "auxin[torchao]", or leave real out.')
    from torchao import quantization

    if not layers:
        raise PlanError(
            f"real: torchao quantizes linear layers, and the {type(model).__name__} has none beside its head. Leave "
            "real out."
        )
    if other := next((layer.weight.dtype for layer in layers if layer.weight.dtype not in _TYPES), None):
        raise PlanError(
            f"real: torchao quantizes {', '.join(map(str, _TYPES))}, and the model has weights in {other}. Convert "
            "the model, or leave real out."
        )
    ids = set(map(id, layers))
    paths = {path for path, module in model.named_modules() if id(module) in ids}
    made = copy.deepcopy(model)
    config = getattr(quantization, _CONFIGS[scheme])()
    quantization.quantize_(made, config, filter_fn=lambda module, path: path in paths)
    return made
