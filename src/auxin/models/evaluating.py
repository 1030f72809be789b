"""Evaluation mode, for a while, models that are run and stay as they are, and those made for evaluation alone."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def training_flags(model: nn.Module) -> Callable[[], None]:
    """What gives every module of `model` the training flag again that it has now."""
    flags = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in flags:
            module.training = training

    return put_back


@contextlib.contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Within the context `model` may be run; afterwards what a forward pass may set is what it was.

    Those are its configs' values (transformers' losses write what kind of labels they saw into `problem_type`), the
    modules' attributes, and buffers that no checkpoint holds (rotary embeddings that go by the length have both).
    Attributes whose names begin with an underscore are left alone: by such flags transformers knows what hooks it has
    put in place, which stay.
    """
    put_back = [_entries(vars(config)) for config in configs_of(model)]
    for module in model.modules():
        put_back += [_entries(vars(module), _is_public), _entries(module._buffers)]
        put_back += [
            _values(module._buffers[name]) for name in module._non_persistent_buffers_set & module._buffers.keys()
        ]
    try:
        yield
    finally:
        for each in put_back:
            each()


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs that the modules of `model` hold, each once; its own is the first."""
    found = [vars(module).get("config") for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name != "training"


def _entries(of: dict[str, Any], kept: Callable[[str], bool] = lambda name: True) -> Callable[[], None]:
    """What gives `of` the entries again that it has now, of those whose names are `kept`."""
    before = {name: value for name, value in of.items() if kept(name)}

    def put_back() -> None:
        for name in [name for name in of if kept(name) and name not in before]:
            del of[name]
        of.update(before)

    return put_back


def _values(buffer: Tensor | None) -> Callable[[], None]:
    """What writes into a buffer what it holds now, if something else was written there."""
    if buffer is None:
        return lambda: None
    before, version = buffer.clone(), None if buffer.is_inference() else buffer._version

    def put_back() -> None:
        if version is None or buffer._version != version:
            with torch.inference_mode(buffer.is_inference()):
                buffer.copy_(before)

    return put_back


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the context, all modules are in evaluation mode; afterwards each has its own flag again, and what a
    forward pass sets is as it was (`left_as_it_is`)."""
    put_back = training_flags(model)
    try:
        with left_as_it_is(model):
            model.eval()
            yield
    finally:
        put_back()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    # The room that FSDP2 gathers parameters in is made by the first pass, and has to serve training, too.
    in_pieces = any(base.__name__ == "FSDPModule" for base in type(model).__mro__)
    with evaluation_mode(model), torch.no_grad() if in_pieces else torch.inference_mode():
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
