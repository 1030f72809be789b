"""Linear layers that several processes divide among them, as transformers' plan of a model (`tp_plan`) says.

A layer that is divided by columns has some of the outputs in each process, and one that is divided by rows takes them
as inputs: heads of an attention, units of a feed-forward part. torch's styles do the rest: the second one's outputs are
added up, forward, and the gradients of the first one's inputs, backward.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from auxin.errors import ConfigError
from auxin.words.paths import encloses, path_pattern

_BY_COLUMNS, _BY_ROWS, _GATHERED = "colwise", "rowwise", "colwise_gather_output"
_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    _BY_COLUMNS: ColwiseParallel,
    _BY_ROWS: RowwiseParallel,
    _GATHERED: lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_SUMMED = "replicated_with_grad_allreduce"
"""Of modules that each process has whole, and runs on its own heads."""
_WHOLE = ("embedding_rowwise",)
"""Of modules that can as well stay whole, and do."""


class DividedLinear:
    """How the linear layers of a model are divided.

    Args:
        model: whole.
        size: how many processes there are.

    Raises:
        ConfigError: the model's plan says something that this does not know, or its sizes do not divide.
    """

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        plan = {path_pattern(pattern): style for pattern, style in (model.tp_plan or {}).items()}
        styles: dict[str, str] = {}
        for name in [name for name, _ in (*model.named_modules(), *model.named_parameters())]:
            found = [style for pattern, style in plan.items() if pattern.fullmatch(name)]
            if found and found[0] not in _WHOLE:
                styles[name] = found[0]
        shared = _shared_parameters(model)
        self._styles: dict[str, str] = {}
        self._summed: list[str] = []
        for name, style in styles.items():
            if style == _SUMMED:
                self._summed.append(name)
                continue
            module = model.get_submodule(name) if style in _STYLES else None
            if type(module) is not nn.Linear:
                raise ConfigError(
                    f"strategy: 'tensor' can't divide {name}, which transformers' plan divides as {style!r}. Set "
                    "strategy: sharded."
                )
            if shared.isdisjoint(module.parameters()):
                _check_sizes(model, name, style, size)
                self._styles[name] = style
            elif style != _GATHERED:  # whose output is whole in any case, as that of a head that is the embedding
                raise ConfigError(
                    f"strategy: 'tensor' can't divide {name}, whose weights are another module's, too. Set strategy: "
                    "sharded."
                )
        for name in self._styles:
            if self._styles[name] == _BY_COLUMNS:
                self._check_beside(model, name.rpartition(".")[0])
        config: Any = model.config.get_text_config()
        dropout: float = getattr(config, "attention_dropout", 0.0)
        if self._styles and dropout:
            raise _drawn("attention_dropout", dropout)

    def _check_beside(self, model: PreTrainedModel, scope: str) -> None:
        """Refuse what is in `scope`, where each process has some of the heads or units: parameters of which the plan
        does not say what becomes of their gradients, and what is drawn; ConfigError."""
        known = [*self._styles, *self._summed]
        for name, _ in model.get_submodule(scope).named_parameters(scope):
            if not any(encloses(path, name) for path in known):
                raise ConfigError(
                    f"strategy: 'tensor' can't train {name}: transformers' plan divides layers beside it, and does not "
                    "say what it is to do. Set strategy: sharded."
                )
        for path, module in model.get_submodule(scope).named_modules(prefix=scope):
            rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            if rate:
                raise _drawn(path if isinstance(module, nn.Dropout) else f"{path}.attention_dropout", rate)

    def __bool__(self) -> bool:
        return bool(self._styles)

    def apply(self, model: PreTrainedModel, mesh: DeviceMesh) -> set[nn.Parameter]:
        """Divide the layers; the parameters that stay whole, and whose gradients the processes have parts of."""
        styles = {name: _STYLES[style]() for name, style in self._styles.items()}
        parallelize_module(model, mesh, styles, src_data_rank=None)
        return {parameter for name in self._summed for parameter in model.get_submodule(name).parameters()}


def _drawn(what: str, rate: float) -> ConfigError:
    """Each process would drop the same of its own heads or units."""
    return ConfigError(
        f"{what}: {rate} is drawn for all heads or units at once, which strategy: 'tensor' divides. Set it to 0, or "
        "strategy: sharded."
    )


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    counts = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    return {parameter for parameter, count in counts.items() if parameter is not None and count > 1}


def _check_sizes(model: PreTrainedModel, name: str, style: str, size: int) -> None:
    """Units or heads that do not divide; ConfigError."""
    if style == _GATHERED:
        return
    module = cast(nn.Linear, model.get_submodule(name))
    parts, what = (module.out_features, "outputs") if style == _BY_COLUMNS else (module.in_features, "inputs")
    head_dim = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    if head_dim is not None:
        parts, what = parts // head_dim, "heads"
    if parts % size:
        raise ConfigError(
            f"strategy: 'tensor': {name} has {parts} {what}, which {size} processes can't divide. Start another number "
            "of them, or set strategy: sharded."
        )
