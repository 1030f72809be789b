"""Tensor parallelism: every process computes its part of each layer, for the whole batch.

Layers of parameter tokens say themselves how they are divided (`auxin.nn.shared_rows`), linear ones by transformers'
plan of the model (`auxin.training.divided_linear`). The other parameters are whole in every process, which computes the
same with them as the others do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from auxin.errors import ConfigError
from auxin.nn.bricks import Brick
from auxin.nn.shared_rows import Processes
from auxin.objectives.objective import Objective
from auxin.training.divided_linear import DividedLinear
from auxin.training.ranks import ALONE, Ranks
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import Copies, Sharded, against_pieces, choose_strategy, refuse_to_cut, shapes_alone


class Split(Sharded):
    """Every process has the rows of some parameters that its part of a layer computes with, with their gradients and
    moments, and all of the others. All see the whole batch."""

    name = "tensor"
    gathers = False

    def __init__(self, ranks: Ranks, linear: DividedLinear) -> None:
        super().__init__(ranks)
        self.sharers = ALONE
        self._linear = linear

    def place(self, model: PreTrainedModel) -> None:
        """Cut the parameters of layers that can be divided."""
        self.skeleton = shapes_alone(model)
        mesh = init_device_mesh(model.device.type, (self.ranks.size,))
        processes = Processes(self.ranks.rank, self.ranks.size, self.ranks.add_up)
        pieces: dict[nn.Parameter, nn.Parameter] = {}
        for module in list(model.modules()):
            names = module.shared_rows() if isinstance(module, Brick) else ()
            for name in names:
                parameter = module.get_parameter(name)
                if parameter not in pieces:  # which other modules may have, too
                    cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                    pieces[parameter] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
                owner, _, key = name.rpartition(".")
                module.get_submodule(owner).register_parameter(key, pieces[parameter])
            if isinstance(module, Brick) and names:
                module.share(processes)
        self._summed = self._linear.apply(model, mesh)

    def begin_pass(self, model: nn.Module, is_last: bool) -> None:
        """Nothing goes round but what the layers send."""

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Of a whole parameter all have the same gradient, up to the rounding of kernels that sum in no fixed order:
        the leader's counts, so that the copies stay alike."""
        alike = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        for parameter in alike if not self.ranks.leads else ():
            if parameter.grad is not None and parameter not in self._summed:
                parameter.grad.zero_()
        if alike:
            Copies.add_up(self, alike)

    def total(self, loss: Tensor) -> None:
        """The leader's: each has computed that of the whole batch."""
        if not self.ranks.leads:
            loss.zero_()
        super().total(loss)


def choose_any_strategy(
    settings: TrainingSettings,
    ranks: Ranks,
    device: torch.device,
    model: PreTrainedModel,
    objective: Objective,
    hooks: Sequence[object],
) -> Copies:
    """The strategy that `settings` ask for, to train `model`, of which shapes are enough, on `device`.

    Raises:
        ConfigError: several processes can't train this as one would; of tensor parallelism: the model has no layers
            that can be divided, or something reads whole parameters.
    """
    if settings.strategy != "tensor" or not ranks.several:
        return choose_strategy(settings, ranks, device, model, objective, hooks)
    refuse_to_cut(settings, against_pieces(settings, model, hooks))
    linear = DividedLinear(model, ranks.size)
    rows = [module.shared_rows() for module in model.modules() if isinstance(module, Brick)]
    if not linear and not any(rows):
        raise ConfigError(
            "strategy: 'tensor' divides layers of parameter tokens, and linear ones by transformers' plan (tp_plan); "
            f"this model ({model.config.model_type}) has neither. Set strategy: sharded."
        )
    if linear and objective.sees_heads:
        raise ConfigError(
            "strategy: 'tensor' divides the heads of attentions, and what is learnt compares them. Set strategy: "
            "sharded."
        )
    return Split(ranks, linear)
