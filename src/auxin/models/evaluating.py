"""Evaluation mode, for a while, and models that were made for evaluation alone."""

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


def about_inference_tensors(model: nn.Module) -> str | None:
    """Why `model` can be neither edited nor trained, and the mend, where it was made within `torch.inference_mode()`;
    None where it was not. Buffers don't count: a forward pass in inference mode may have put them there."""
    names = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if not names:
        return None
    return (
        f"Parameters of the model ({names[0]}, ...) were made within torch.inference_mode(), and torch lets nobody "
        "change or train such tensors. Make or load the model outside of it, or go on with a copy that is made "
        "outside: model = copy.deepcopy(model)."
    )
