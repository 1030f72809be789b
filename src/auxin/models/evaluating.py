"""Evaluation mode, for a while."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


def training_flags(model: nn.Module) -> Callable[[], None]:
    """What gives every module of `model` the training flag again that it has now."""
    flags = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in flags:
            module.training = training

    return put_back


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the context, all modules are in evaluation mode; afterwards each has its own flag again."""
    put_back = training_flags(model)
    try:
        model.eval()
        yield
    finally:
        put_back()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with evaluation_mode(model), torch.inference_mode():
        yield
