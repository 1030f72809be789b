"""The gradients of one optimizer step, micro-batch by micro-batch."""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from auxin.nn.autocast import bfloat16_autocast
from auxin.objectives.objective import Objective
from auxin.training.hardware import choose_precision
from auxin.training.settings import TrainingSettings
from auxin.training.strategies import Copies, apart, samples_per_pass, whole


class BatchGradients:
    """Leaves the gradients of a batch in a model's parameters.

    Args:
        model: on the device on which it learns.
        objective: what it learns, bound to it.
        settings: of the stage: precision, micro-batch, clipping, compilation.
        strategy: how the model lies in the processes that train it together.
    """

    def __init__(
        self, model: PreTrainedModel, objective: Objective, settings: TrainingSettings, strategy: Copies
    ) -> None:
        self.objective, self.settings, self.device = objective, settings, model.device
        self.model, self.strategy, self.ranks = model, strategy, strategy.ranks
        self.precision = choose_precision(settings.precision, self.device)
        """Of matrix products."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forward = torch.compile(model) if settings.compile else model

    def autocast(self) -> AbstractContextManager[None]:
        """In which the model runs, to learn and to be measured."""
        on = self.precision == torch.bfloat16
        # The cache would hold on to what was made of every layer, when the layer itself lies in pieces again.
        return bfloat16_autocast(self.device.type, on, cached=not self.strategy.gathers)

    def of(self, inputs: dict[str, Tensor], seed: int) -> tuple[float, float]:
        """Leave the clipped gradients of the mean loss over the batch's targets; return loss and norm before clipping,
        both NaN where there is nothing to learn from.

        A micro-batch weighs as many targets as it has, so that how a batch is cut changes nothing but rounding, where
        the objective adds up (`Objective.adds_up`). Several processes take turns at the micro-batches; all of them get
        the same loss and norm.

        Args:
            inputs: the objective's, by name, each with the batch as its first axis, on any device.
            seed: of what several processes draw in the passes, such as dropout: each micro-batch draws its own numbers,
                whichever process has it, and behind them all draw alike. One process goes on from where torch's
                generator stands.
        """
        for parameter in self.parameters:
            parameter.grad = None
        together = self.strategy.shares_passes
        parts = self._turns(inputs)
        counts = [self.objective.targets(part) for part in parts]
        total = sum(counts)
        if not total:
            return math.nan, math.nan
        # A mean over nothing is not a number.
        shares = [(number, count / total) for number, count in enumerate(counts) if count or together]
        for number, count in enumerate(counts):
            if together and not count:  # it is passed for the sake of the others, and its loss weighs nothing
                parts[number] = {**parts[number], "labels": torch.zeros_like(parts[number]["labels"])}
        mine = self._own(shares)
        for number, _ in mine:
            parts[number] = self._here(parts[number])
        losses = []
        for place, (number, share) in enumerate(mine):
            if self.ranks.several:
                torch.manual_seed(seed + 1 + number)
            self.strategy.begin_pass(self.model, place == len(mine) - 1)
            losses.append(self.add(parts[number], share))
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)
        if self.ranks.several:
            torch.manual_seed(seed + 1 + len(parts))
            self.ranks.wait_for_others()
            loss = loss.double()  # of what type the losses are, a process without a part does not know
            self.strategy.total(loss)
        self.strategy.add_up(self.parameters)
        kinds = [kind for kind in apart(self.parameters) if any(p.grad is not None for p in kind)] or [self.parameters]
        norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))
        if self.settings.gradient_clip is not None:
            for kind in kinds:
                clip_grads_with_norm_(kind, self.settings.gradient_clip, norm)
        # One transfer, so that CUDA is waited for once per step.
        values = torch.stack([loss, whole(norm).to(loss.dtype)]).tolist()
        return values[0], values[1]

    def _turns(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The parts of a batch, of which the processes take turns: its micro-batches, or what each process has of the
        first one, of the second one and so on."""
        size = self.strategy.sharers.size
        if not self.strategy.shares_passes:
            return _parts(inputs, samples_per_pass(self.settings, size))
        turns = []
        for part in _parts(inputs, self.settings.samples_per_forward):
            shares = {name: value.tensor_split(size) for name, value in part.items()}
            turns += [{name: pieces[rank] for name, pieces in shares.items()} for rank in range(size)]
        return turns

    def _own(self, shares: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Of (micro-batch, its share of the loss) those of this process. Where a pass is one of all processes together,
        each has as many; what is there twice weighs nothing the second time."""
        sharers = self.strategy.sharers
        own = shares[sharers.rank :: sharers.size]
        most = math.ceil(len(shares) / sharers.size)
        return own + [(shares[0][0], 0.0)] * (most - len(own)) if self.strategy.in_step else own

    def _here(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return part
        return {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in part.items()}

    def add(self, part: dict[str, Tensor], share: float) -> Tensor:
        """Add the gradients of one micro-batch, on the model's device, of which the batch's loss has `share`; returns
        what it adds to that loss."""
        with self.autocast():
            loss = self.objective.loss(self.forward, part) * share
        loss.backward()
        return loss.detach()


def _parts(inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """`inputs` cut into micro-batches of `size` samples."""
    pieces = {name: value.split(size) for name, value in inputs.items()}
    count = len(next(iter(pieces.values())))
    return [{name: piece[number] for name, piece in pieces.items()} for number in range(count)]
